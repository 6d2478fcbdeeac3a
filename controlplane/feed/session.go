package feed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// helloTimeout bounds the wait for the first message.
	helloTimeout = 10 * time.Second
	// answerTimeout bounds the wait for the answer to an Update.
	answerTimeout = time.Minute
	// catchUpTimeout is how long an edge waits for this replica to learn of the
	// revision that another replica gave to the edge.
	catchUpTimeout = 2 * time.Second
)

// MaxUpdate bounds an Update, in bytes. Edges must accept messages of this size
// (grpc.MaxCallRecvMsgSize; gRPC's default is 4 MiB).
const MaxUpdate = 64 << 20

// session is one stream of one edge. Any error ends all of it; the edge comes
// back.
type session struct {
	server *Server
	stream grpc.BidiStreamingServer[resealv1.SyncRequest, resealv1.SyncResponse]
	id     string
	labels map[string]string
	hello  *resealv1.Hello

	received   chan *resealv1.SyncRequest
	receiveErr error         // set before received is closed
	sent       chan error    // how a send ended; there is room for the one under way
	orders     chan order    // of the operator, for this edge
	redrain    chan struct{} // whether the edge is to drain has changed
	probing    probing
	superseded chan struct{} // closed when a newer stream took over
	done       chan struct{} // closed when the session has ended

	// The fields below belong to run.

	held         *view     // what the edge holds, nil: not known, or nothing
	heldRevision int64     // at which it holds that
	target       *view     // of the newest update, nil: none was sent
	targetSeen   time.Time // when this replica learned of it
	answered     bool      // the newest update is acked or nacked
	waiting      bool      // the newest update is still in pending
	before       past      // the one before the newest
	deadline     *time.Timer
	drain        *resealv1.Drain // what the edge was told last, nil: nothing
	sending      bool            // a send is under way
	pending      []outgoing      // at most an update, and few orders
}

// past is an update that was answered.
type past struct {
	revision int64
	seen     time.Time
	count    int
}

type outgoing struct {
	message any           // *prepared, an update, or *resealv1.SyncResponse
	sent    chan struct{} // closed when gRPC took it, may be nil
}

type order struct {
	message *resealv1.SyncResponse
	sent    chan struct{} // closed when gRPC took it, may be nil
}

// Sync implements resealv1.FeedServiceServer.
func (s *Server) Sync(stream grpc.BidiStreamingServer[resealv1.SyncRequest, resealv1.SyncResponse]) error {
	ctx := stream.Context()
	id, labels, err := s.config.Edge(ctx)
	if err != nil {
		return denied(err)
	}
	c := &session{
		server:     s,
		stream:     stream,
		id:         id,
		received:   make(chan *resealv1.SyncRequest),
		sent:       make(chan error, 1),
		orders:     make(chan order),
		redrain:    make(chan struct{}, 1),
		superseded: make(chan struct{}),
		done:       make(chan struct{}),
		deadline:   time.NewTimer(answerTimeout),
	}
	c.deadline.Stop()
	// It ends with the stream, which gRPC ends when this function returns, as does
	// send, which runs only while there is something to send. Neither may hold up
	// the end: a receiver waits for the edge, a sender for the edge's flow control.
	go c.receive()
	defer close(c.done)

	defer s.table.disconnect(c)
	if err := c.start(ctx, labels); err != nil {
		return err
	}
	err = c.run(ctx)
	s.config.Logger.Info("edge disconnected", "edge", c.id, "reason", status.Convert(err).Message())
	return err
}

// denied makes a gRPC status of an error of Config.Edge.
func denied(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.PermissionDenied, err.Error())
}

func (c *session) receive() {
	defer close(c.received)
	for {
		message, err := c.stream.Recv()
		if err != nil {
			c.receiveErr = err
			return
		}
		select {
		case c.received <- message:
		case <-c.done:
			c.receiveErr = io.EOF
			return
		}
	}
}

func (c *session) send(out outgoing) {
	err := c.stream.SendMsg(out.message)
	if err == nil && out.sent != nil {
		close(out.sent)
	}
	c.sent <- err
}

// sendNext sends what is pending, one after the other.
func (c *session) sendNext() {
	if c.sending || len(c.pending) == 0 {
		return
	}
	next := c.pending[0]
	c.pending, c.sending = c.pending[1:], true
	if _, ok := next.message.(*prepared); ok {
		c.waiting = false
	}
	go c.send(next)
}

// start takes the Hello and enters the edge into the table.
func (c *session) start(ctx context.Context, labels map[string]string) error {
	timeout := time.NewTimer(helloTimeout)
	defer timeout.Stop()
	select {
	case message, ok := <-c.received:
		if !ok {
			return c.ended()
		}
		c.hello = message.GetHello()
	case <-timeout.C:
		return status.Errorf(codes.DeadlineExceeded, "no Hello within %s", helloTimeout)
	case <-c.server.stopped:
		return errStopping
	}
	if err := checkHello(c.hello, c.id); err != nil {
		return err
	}
	if labels != nil {
		c.hello.Labels = labels
	}
	c.labels = c.hello.GetLabels()
	var address string
	if from, ok := peer.FromContext(ctx); ok {
		address = from.Addr.String()
	}
	replaced, drain, err := c.server.table.connect(c, c.hello, address)
	if err != nil {
		return err
	}
	if replaced != nil {
		close(replaced.superseded)
	}
	c.beginDrain(drain)
	c.server.config.Logger.Info("edge connected", "edge", c.id, "address", address, "version", c.hello.GetVersion(),
		"boot_id", c.hello.GetBootId(), "revision", c.hello.GetRevision())
	// Headers tell the edge that it is welcome before there is anything to say.
	return c.stream.SendHeader(nil)
}

// beginDrain tells an edge that has just connected whether it is to drain. before
// is what it was told on its last stream, nil for nothing.
func (c *session) beginDrain(before *resealv1.Drain) {
	if c.server.config.Drained != nil {
		wanted := c.server.config.Drained(c.id)
		c.server.table.drained(c, wanted)
		switch {
		case wanted != nil && c.hello.GetDraining():
			c.drain, before = wanted, nil // it knows
		case wanted != nil:
			before = wanted
		case c.hello.GetDraining() || before != nil:
			before = &resealv1.Drain{} // it was taken back while the edge was away
		}
	}
	if before != nil {
		c.order(order{message: drainMessage(before)})
	}
}

// order has something said to the edge, unless it is what it was told last.
func (c *session) order(o order) {
	if drain := o.message.GetDrain(); drain != nil {
		if c.drain != nil && proto.Equal(c.drain, drain) {
			if o.sent != nil {
				close(o.sent)
			}
			return
		}
		c.drain = drain
	}
	c.pending = append(c.pending, outgoing{o.message, o.sent})
}

var errStopping = status.Error(codes.Unavailable, "this replica is stopping")

func (c *session) ended() error {
	if errors.Is(c.receiveErr, io.EOF) {
		return nil
	}
	return c.receiveErr
}

func (c *session) run(ctx context.Context) error {
	if err := c.recall(ctx); err != nil {
		return err
	}
	defer c.deadline.Stop()
	for {
		newest, published := c.server.current()
		if newest != nil {
			if err := c.advance(newest); err != nil {
				return err
			}
		}
		c.sendNext()
		var orders <-chan order
		if len(c.pending) == 0 {
			orders = c.orders
		}
		select {
		case order := <-orders:
			c.order(order)
		case <-c.redrain:
			c.order(order{message: drainMessage(c.server.table.drainOf(c))})
		case message, ok := <-c.received:
			if !ok {
				return c.ended()
			}
			if err := c.answer(message); err != nil {
				return err
			}
		case <-published:
		case <-c.deadline.C:
			return status.Errorf(codes.DeadlineExceeded, "no answer to revision %d within %s", c.target.revision, answerTimeout)
		case err := <-c.sent:
			if err != nil {
				return err
			}
			c.sending = false
		case <-c.superseded:
			return status.Errorf(codes.Aborted, "edge %q has started another stream; if it was not this process, two edges use one id", c.id)
		case <-c.server.stopped:
			return errStopping
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// recall finds out what the edge holds, so that it gets only what is new to it.
func (c *session) recall(ctx context.Context) error {
	newest, err := c.caughtUp(ctx)
	if newest == nil || err != nil {
		return err
	}
	if c.hello.GetRevision() <= 0 || c.hello.GetClusterId() != newest.snapshot.ClusterID() {
		return nil
	}
	now, err := c.view(newest)
	if err != nil {
		return err
	}
	if bytes.Equal(now.hash, c.hello.GetHash()) {
		c.held, c.heldRevision = now, c.hello.GetRevision()
		return nil
	}
	old := c.server.at(ctx, c.hello.GetRevision())
	if old == nil {
		return nil
	}
	then, err := old.view(c.labels, old.encoder.pastForm)
	if err != nil {
		// The present may be sound where the past is not.
		c.server.config.Logger.Warn("history can't be sent", "edge", c.id, "revision", old.revision(), "error", err)
		return nil
	}
	if bytes.Equal(then.hash, c.hello.GetHash()) {
		c.held, c.heldRevision = then, c.hello.GetRevision()
	}
	return nil
}

// caughtUp returns the newest generation, after a moment for this replica to
// learn of what the edge has heard elsewhere: an edge should not go back in
// time because it came to a slower replica. It returns nil when the session
// must not go on.
func (c *session) caughtUp(ctx context.Context) (*generation, error) {
	patience := time.NewTimer(catchUpTimeout)
	defer patience.Stop()
	expired := false
	for {
		newest, published := c.server.current()
		if newest != nil && (expired || newest.revision() >= c.hello.GetRevision() || newest.snapshot.ClusterID() != c.hello.GetClusterId()) {
			return newest, nil
		}
		select {
		case <-published:
		case <-patience.C:
			expired = true
		case <-c.superseded:
			return nil, nil // run says so
		case <-c.server.stopped:
			return nil, errStopping
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// view is what the edge should hold of the newest generation.
func (c *session) view(g *generation) (*view, error) {
	found, err := g.view(c.labels, g.encoder.newestForm)
	if err != nil {
		// The edge learns that it is not its fault, the log says what it is.
		c.server.config.Logger.Error("configuration can't be sent", "edge", c.id, "revision", g.revision(), "error", err)
		return nil, status.Errorf(codes.Internal, "revision %d can't be encoded, see the control plane's log", g.revision())
	}
	return found, nil
}

// advance sends the update to the newest generation, unless the edge has it or
// still owes an answer.
func (c *session) advance(newest *generation) error {
	if c.target != nil && (!c.answered || c.target.clusterID == newest.snapshot.ClusterID() && c.target.revision == newest.revision()) {
		return nil
	}
	next, err := c.view(newest)
	if err != nil {
		return err
	}
	base := c.held
	if base != nil && base.clusterID != next.clusterID {
		base = nil
	}
	made, err := next.update(base, c.heldRevision, newest.encoder.marshal)
	if err != nil {
		c.server.config.Logger.Error("update can't be marshalled", "edge", c.id, "revision", next.revision, "error", err)
		return status.Errorf(codes.Internal, "revision %d can't be marshalled", next.revision)
	}
	if size := len(made.message.wire); size > MaxUpdate {
		c.server.config.Logger.Error("update is too large", "edge", c.id, "revision", next.revision, "bytes", size, "limit", MaxUpdate)
		return status.Errorf(codes.ResourceExhausted, "revision %d needs %d bytes, an update holds at most %d: let edge selectors split the configuration", next.revision, size, MaxUpdate)
	}
	if c.target != nil {
		c.before = past{c.target.revision, c.targetSeen, len(c.target.held)}
	}
	c.target, c.targetSeen, c.answered = next, newest.seen, false
	c.waiting = true
	c.deadline.Reset(answerTimeout)
	c.pending = append(c.pending, outgoing{message: made.message})
	c.server.metrics.updates.WithLabelValues(made.kind).Inc()
	if made.resources > 0 {
		c.server.metrics.resources.WithLabelValues(made.kind).Add(float64(made.resources))
	}
	c.server.table.sent(c, made.resources)
	return nil
}

// answer takes an Ack or a Nack. The edge may answer a revision again while it
// holds it: one that it refused may compile later. Such an answer can cross the
// next update, and comes before the answer to that.
func (c *session) answer(message *resealv1.SyncRequest) error {
	var revision int64
	nack := message.GetNack()
	switch message.GetMessage().(type) {
	case *resealv1.SyncRequest_Ack:
		revision = message.GetAck().GetRevision()
	case *resealv1.SyncRequest_Nack:
		revision = nack.GetRevision()
	case *resealv1.SyncRequest_ProbeReport:
		c.probing.answer(message.GetProbeReport())
		return nil
	default:
		return status.Error(codes.InvalidArgument, "want an Ack, a Nack or a ProbeReport")
	}
	var about past
	if !c.answered {
		about = c.before
	}
	if c.target != nil && revision == c.target.revision && !c.waiting {
		about = past{revision, c.targetSeen, len(c.target.held)}
		c.held, c.heldRevision, c.answered = c.target, revision, true
		c.deadline.Stop()
	}
	if about.revision != revision || revision == 0 {
		return status.Errorf(codes.InvalidArgument, "answer to revision %d, which was not the newest update", revision)
	}
	if nack == nil {
		c.server.table.acked(c, revision, about.seen, about.count)
		return nil
	}
	nack = boundNack(nack)
	c.server.metrics.nacks.Inc()
	c.server.table.nacked(c, nack, about.count)
	c.server.config.Logger.Warn("edge refused a revision", "edge", c.id, "revision", revision,
		"serving", nack.GetServingRevision(), "error", fmt.Sprint(&resealv1.ViolationsError{Violations: nack.GetViolations()}))
	return nil
}
