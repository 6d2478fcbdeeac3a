package feed

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
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
	server   *Server
	ctx      context.Context    // of the caller
	forget   context.CancelFunc // ends recall
	line     *fleet.Line
	id       string
	labels   map[string]string
	deadline *time.Timer // of what is awaited of the edge
	probing  probing
	failing  failing

	previewing previewing
	previews   atomic.Bool   // the edge can
	done       chan struct{} // closed when the session has ended

	sharing atomic.Pointer[sharing] // nil: the edge has no pool that needs one; written by Next

	mu     sync.Mutex
	orders []order         // of the operator, for this edge
	drain  *resealv1.Drain // what the edge was told last, or is about to be, nil: nothing

	// The fields below belong to the methods of the conversation.

	hello        *resealv1.Hello // nil: it has not come yet
	welcomed     bool
	recalled     bool      // it is known what the edge holds
	held         *view     // nil: not known, or nothing
	heldRevision int64     // at which it holds that
	target       *view     // of the newest update, nil: none was sent
	targetSeen   time.Time // when this replica learned of it
	answered     bool      // the newest update is acked or nacked
	before       past      // the one before the newest
	repair       repair    // of an edge that drifted
}

// past is an update that was answered.
type past struct {
	revision int64
	seen     time.Time
	count    int
}

// order is something that an operator wants of an edge.
type order struct {
	message *resealv1.SyncResponse
	sent    chan struct{} // closed when gRPC took it, may be nil
}

// maxOrders bounds the orders that wait for an edge that does not read.
const maxOrders = 16

// Sync implements resealv1.FeedServiceServer.
func (s *Server) Sync(stream grpc.BidiStreamingServer[resealv1.SyncRequest, resealv1.SyncResponse]) error {
	return s.Syncs().Serve(stream)
}

// Syncs are the conversations in which edges get their configuration.
func (s *Server) Syncs() fleet.Service {
	return fleet.Service{Lines: s.lines, Open: s.open, Message: func() proto.Message { return &resealv1.SyncRequest{} }}
}

func (s *Server) open(ctx context.Context, line *fleet.Line) (fleet.Conversation, error) {
	id, labels, err := s.config.Edge(ctx)
	if err != nil {
		return nil, fleet.Denied(err)
	}
	c := &session{server: s, ctx: ctx, forget: func() {}, line: line, id: id, labels: labels, done: make(chan struct{})}
	c.deadline = time.AfterFunc(helloTimeout, c.late)
	return c, nil
}

// late ends a stream whose edge does not say what it should.
func (c *session) late() {
	c.line.Do(func() {
		switch {
		case c.hello == nil:
			c.line.End(status.Errorf(codes.DeadlineExceeded, "no Hello within %s", helloTimeout))
		case c.target != nil && !c.answered:
			c.line.End(status.Errorf(codes.DeadlineExceeded, "no answer to revision %d within %s", c.target.revision, answerTimeout))
		}
	})
}

// Close implements fleet.Conversation.
func (c *session) Close() {
	c.deadline.Stop()
	c.repair.stop()
	c.forget()
	c.server.table.disconnect(c)
	close(c.done)
	if c.hello != nil {
		c.server.config.Logger.Info("edge disconnected", "edge", c.id, "reason", status.Convert(c.line.Err()).Message())
	}
}

// Take implements fleet.Conversation.
func (c *session) Take(said proto.Message) (time.Duration, error) {
	message := said.(*resealv1.SyncRequest)
	if c.hello == nil {
		return 0, c.start(message.GetHello())
	}
	return 0, c.answer(message)
}

// start takes the Hello and enters the edge into the table.
func (c *session) start(hello *resealv1.Hello) error {
	if err := checkHello(hello, c.id); err != nil {
		return err
	}
	c.deadline.Stop()
	if c.labels != nil {
		hello.Labels = c.labels
	}
	c.labels = hello.GetLabels()
	var address string
	if from, ok := peer.FromContext(c.ctx); ok {
		address = from.Addr.String()
	}
	replaced, drain, err := c.server.table.connect(c, hello, address)
	if err != nil {
		return err
	}
	c.hello = hello
	c.previews.Store(hello.GetPreviews())
	if replaced != nil {
		replaced.line.End(fleet.Superseded(c.id))
	}
	c.beginDrain(drain)
	c.server.config.Logger.Info("edge connected", "edge", c.id, "address", address, "version", hello.GetVersion(),
		"boot_id", hello.GetBootId(), "revision", hello.GetRevision())
	for _, crashed := range hello.GetCrashed() {
		c.server.config.Logger.Warn("edge's process ended soon after it took a configuration", "edge", c.id, "hash", hex.EncodeToString(crashed.GetHash()),
			"revision", crashed.GetRevision(), "times", crashed.GetCrashes(), "given_up", crashed.GetGivenUp())
	}
	// It may have to wait, and no conversation may hold up another.
	ctx, cancel := context.WithCancel(c.ctx)
	c.forget = cancel
	go c.recall(ctx, hello)
	c.line.Wake()
	return nil
}

// beginDrain tells an edge that has just connected whether it is to drain. before
// is what it was told on its last stream, nil for nothing.
func (c *session) beginDrain(before *resealv1.Drain) {
	if c.server.config.Drained != nil {
		wanted := c.server.config.Drained(c.id)
		c.server.table.drained(c, wanted)
		switch {
		case wanted != nil && c.hello.GetDraining():
			c.mu.Lock()
			c.drain, before = wanted, nil // it knows
			c.mu.Unlock()
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

// order has an order given, unless it is to drain as the edge was told last. It is
// false when too many wait.
func (c *session) order(o order) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	drain := o.message.GetDrain()
	switch {
	case drain != nil && c.drain != nil && proto.Equal(c.drain, drain):
		if o.sent != nil {
			close(o.sent)
		}
		return true
	case len(c.orders) >= maxOrders:
		return false
	case drain != nil:
		c.drain = drain
	}
	c.orders = append(c.orders, o)
	c.line.Wake()
	return true
}

func (c *session) nextOrder() (order, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.orders) == 0 {
		return order{}, false
	}
	next := c.orders[0]
	c.orders = c.orders[1:]
	return next, true
}

// Next implements fleet.Conversation. Orders and shares come before an update.
func (c *session) Next() (fleet.Outgoing, error) {
	if c.hello == nil {
		return fleet.Outgoing{}, nil
	}
	if !c.welcomed {
		c.welcomed = true
		return fleet.Outgoing{Message: fleet.Welcome}, nil
	}
	if !c.recalled {
		return fleet.Outgoing{}, nil
	}
	if next, ok := c.nextOrder(); ok {
		return fleet.Outgoing{Message: next.message, Sent: func(ok bool) {
			if ok && next.sent != nil {
				close(next.sent)
			}
		}}, nil
	}
	wanted := c.server.aims.Load().of(c.id, c.labels, c.hello.GetRevision() > 0 || c.target != nil)
	if wanted == nil {
		return fleet.Outgoing{}, nil
	}
	if shares := c.shares(wanted); shares != nil {
		return fleet.Outgoing{Message: shares}, nil
	}
	update, err := c.advance(wanted)
	if update == nil || err != nil {
		return fleet.Outgoing{}, err
	}
	return fleet.Outgoing{Message: update}, nil
}

// recall finds out what the edge holds, so that it gets only what is new to it.
func (c *session) recall(ctx context.Context, hello *resealv1.Hello) {
	held, err := c.holds(ctx, hello)
	c.line.Do(func() {
		c.forget()
		if err != nil {
			c.line.End(err)
			return
		}
		c.recalled, c.held, c.heldRevision = true, held, hello.GetRevision()
	})
}

// holds is what the edge holds, nil when that is not known, or nothing.
func (c *session) holds(ctx context.Context, hello *resealv1.Hello) (*view, error) {
	newest, err := c.caughtUp(ctx, hello)
	if newest == nil || err != nil {
		return nil, err
	}
	if hello.GetRevision() <= 0 || hello.GetClusterId() != newest.snapshot.ClusterID() {
		return nil, nil
	}
	if wanted := c.server.aims.Load().of(c.id, c.labels, true); wanted != nil {
		newest = wanted
	}
	now, err := c.view(newest)
	if err != nil {
		return nil, err
	}
	if bytes.Equal(now.hash, hello.GetHash()) {
		return now, nil
	}
	old := c.server.at(ctx, hello.GetRevision())
	if old == nil {
		return nil, nil
	}
	then, err := old.view(c.labels, old.encoder.pastForm)
	if err != nil {
		// The present may be sound where the past is not.
		c.server.config.Logger.Warn("history can't be sent", "edge", c.id, "revision", old.revision(), "error", err)
		return nil, nil
	}
	if bytes.Equal(then.hash, hello.GetHash()) {
		return then, nil
	}
	return nil, nil
}

// caughtUp returns the newest generation, after a moment for this replica to
// learn of what the edge has heard elsewhere: an edge should not go back in
// time because it came to a slower replica. ctx is the session's.
func (c *session) caughtUp(ctx context.Context, hello *resealv1.Hello) (*generation, error) {
	patience := time.NewTimer(catchUpTimeout)
	defer patience.Stop()
	expired := false
	for {
		newest, published := c.server.current()
		if newest != nil && (expired || newest.revision() >= hello.GetRevision() || newest.snapshot.ClusterID() != hello.GetClusterId()) {
			return newest, nil
		}
		select {
		case <-published:
		case <-patience.C:
			expired = true
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// view is what the edge should hold of a generation.
func (c *session) view(g *generation) (*view, error) {
	found, err := c.server.view(g, c.labels)
	if err != nil {
		// The edge learns that it is not its fault, the log says what it is.
		c.server.config.Logger.Error("configuration can't be sent", "edge", c.id, "revision", g.revision(), "error", err)
		return nil, status.Errorf(codes.Internal, "revision %d can't be encoded, see the control plane's log", g.revision())
	}
	return found, nil
}

// advance returns the update to the generation that is wanted, nil when the edge has it or
// still owes an answer.
func (c *session) advance(wanted *generation) (*fleet.Prepared, error) {
	if c.target != nil && (!c.answered || !c.repair.due && c.target.clusterID == wanted.snapshot.ClusterID() && c.target.revision == wanted.revision()) {
		return nil, nil
	}
	next, err := c.view(wanted)
	if err != nil {
		return nil, err
	}
	base := c.held
	if c.repair.due {
		base = nil
	}
	if base != nil && base.clusterID != next.clusterID {
		base = nil
	}
	made, err := next.update(base, c.heldRevision, wanted.encoder.marshal)
	if err != nil {
		c.server.config.Logger.Error("update can't be marshalled", "edge", c.id, "revision", next.revision, "error", err)
		return nil, status.Errorf(codes.Internal, "revision %d can't be marshalled", next.revision)
	}
	if size := len(made.message.Wire); size > MaxUpdate {
		c.server.config.Logger.Error("update is too large", "edge", c.id, "revision", next.revision, "bytes", size, "limit", MaxUpdate)
		return nil, status.Errorf(codes.ResourceExhausted, "revision %d needs %d bytes, an update holds at most %d: let edge selectors split the configuration", next.revision, size, MaxUpdate)
	}
	if c.target != nil {
		c.before = past{c.target.revision, c.targetSeen, len(c.target.held)}
	}
	c.target, c.targetSeen, c.answered = next, wanted.seen, false
	c.repair.due = false
	c.deadline.Reset(answerTimeout)
	c.server.metrics.updates.WithLabelValues(made.kind).Inc()
	if made.resources > 0 {
		c.server.metrics.resources.WithLabelValues(made.kind).Add(float64(made.resources))
	}
	c.server.table.sent(c, next.revision, made.resources)
	c.server.table.intend(c, next.hash)
	return made.message, nil
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
	case *resealv1.SyncRequest_FailuresReport:
		c.failing.answer(message.GetFailuresReport())
		return nil
	default:
		return status.Error(codes.InvalidArgument, "want an Ack, a Nack, a ProbeReport or a FailuresReport")
	}
	var about past
	if !c.answered {
		about = c.before
	}
	if c.target != nil && revision == c.target.revision {
		about = past{revision, c.targetSeen, len(c.target.held)}
		c.held, c.heldRevision, c.answered = c.target, revision, true
		c.deadline.Stop()
		c.line.Wake() // a newer one may wait
	}
	if about.revision != revision || revision == 0 {
		return status.Errorf(codes.InvalidArgument, "answer to revision %d, which was not the newest update", revision)
	}
	if nack == nil {
		c.server.table.acked(c, revision, about.seen, about.count)
		c.compare(message.GetAck().GetRunningHash())
		return nil
	}
	nack = boundNack(nack)
	c.server.metrics.nacks.Inc()
	c.server.table.nacked(c, nack, about.count)
	c.server.table.runs(c, nack.GetRunningHash())
	c.server.config.Logger.Warn("edge refused a revision", "edge", c.id, "revision", revision,
		"serving", nack.GetServingRevision(), "error", fmt.Sprint(&resealv1.ViolationsError{Violations: nack.GetViolations()}))
	return nil
}
