package fleetsim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/edge/link"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// reportInterval is that of edges.
const reportInterval = 4 * time.Second

// Bits of the conversations of an edge.
const (
	feedStream = 1 << iota
	keyringStream
	allStreams = 1<<iota - 1
)

var errEnded = errors.New("the control plane ended the stream")

// edge is one simulated edge. Of its configuration it holds no more than what it
// needs to say what it holds.
type edge struct {
	*Identity
	fleet     *Fleet
	bootID    string
	startedAt time.Time
	dialer    net.Dialer
	conn      *grpc.ClientConn
	link      *link.Link

	mu         sync.Mutex
	up         int // bits of streams that the control plane has answered
	upAt       time.Time
	clusterID  string
	revision   int64
	hash       []byte
	ackedAt    time.Time
	epoch      uint64 // that encrypts
	encryptsAt time.Time
}

// served notes that a stream is answered.
func (e *edge) served(stream int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.up&stream == 0 {
		e.up |= stream
		e.upAt = time.Now()
	}
}

func (e *edge) broken(stream int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.up &^= stream
}

// ended is why a stream ended, never nil.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return errEnded
	}
	return err
}

// sync is a stream of configuration.
func (e *edge) sync(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := resealv1.NewFeedServiceClient(e.link).Sync(ctx)
	if err != nil {
		return err
	}
	defer e.broken(feedStream)
	_ = stream.Send(e.hello()) // why it fails is what Recv returns, here and below
	for {
		response, err := stream.Recv()
		if err != nil {
			return ended(err)
		}
		update := response.GetUpdate()
		if update == nil {
			continue
		}
		if err := e.take(update); err != nil {
			return err
		}
		_ = stream.Send(&resealv1.SyncRequest{Message: &resealv1.SyncRequest_Ack{Ack: &resealv1.Ack{Revision: update.GetRevision()}}})
		e.served(feedStream)
	}
}

func (e *edge) hello() *resealv1.SyncRequest {
	e.mu.Lock()
	defer e.mu.Unlock()
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Hello{Hello: &resealv1.Hello{
		Edge: e.id, BootId: e.bootID, Version: "simulated", StartedAt: timestamppb.New(e.startedAt),
		ClusterId: e.clusterID, Revision: e.revision, Hash: e.hash,
	}}}
}

func (e *edge) take(update *resealv1.Update) error {
	counts := &e.fleet.counts
	counts.updateBytes.Add(int64(proto.Size(update)))
	e.mu.Lock()
	defer e.mu.Unlock()
	switch base := update.GetBaseRevision(); {
	case base == 0:
		counts.full.Add(1)
	case base != e.revision || update.GetClusterId() != e.clusterID:
		return fmt.Errorf("an update from revision %d, the edge holds %d", base, e.revision)
	case len(update.GetUpserts())+len(update.GetDeletes()) == 0:
		counts.empty.Add(1)
	default:
		counts.delta.Add(1)
	}
	e.clusterID, e.revision, e.hash, e.ackedAt = update.GetClusterId(), update.GetRevision(), update.GetHash(), time.Now()
	return nil
}

// hold is a stream of ticket keys.
func (e *edge) hold(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := resealv1.NewKeyringServiceClient(e.link).Hold(ctx)
	if err != nil {
		return err
	}
	defer e.broken(keyringStream)
	_ = stream.Send(&resealv1.HoldRequest{Edge: e.id})
	for {
		response, err := stream.Recv()
		if err != nil {
			return ended(err)
		}
		ack := &resealv1.HoldRequest{Serial: response.GetSerial()}
		for _, keyring := range response.GetKeyrings() {
			held := heldOf(keyring)
			ack.Keyrings = append(ack.Keyrings, held)
			if held.GetName() == resealv1.DefaultKeyring {
				e.encrypts(held.GetActive())
			}
		}
		_ = stream.Send(ack)
		e.served(keyringStream)
	}
}

func heldOf(keyring *resealv1.KeyringSecrets) *resealv1.HeldKeyring {
	held := &resealv1.HeldKeyring{Name: keyring.GetName()}
	for _, secret := range keyring.GetEpochs() {
		held.Epochs = append(held.Epochs, secret.GetEpoch().GetNumber())
		if secret.GetEpoch().GetState() == resealv1.EpochState_EPOCH_STATE_ACTIVE {
			held.Active = secret.GetEpoch().GetNumber()
		}
	}
	return held
}

func (e *edge) encrypts(epoch uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if epoch != e.epoch {
		e.epoch, e.encryptsAt = epoch, time.Now()
	}
}

// report is a stream of reports.
func (e *edge) report(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := resealv1.NewTallyServiceClient(e.link).Report(ctx)
	if err != nil {
		return err
	}
	r := &reporter{edge: e, stream: stream}
	defer r.stop()
	r.send(0)
	for {
		response, err := stream.Recv()
		if err != nil {
			return ended(err)
		}
		r.partial(response.GetTakesPartial())
		if response.GetRequest() > 0 {
			r.send(response.GetRequest())
		}
	}
}

// reporter sends reports, from whichever goroutine has a reason to.
type reporter struct {
	edge   *edge
	stream grpc.BidiStreamingClient[resealv1.ReportRequest, resealv1.ReportResponse]

	mu      sync.Mutex
	answers uint64
	takes   bool        // the control plane takes partial reports
	sent    bool        // a whole one was sent
	timer   *time.Timer // of the next; nil once stopped
	stopped bool
}

func (r *reporter) send(request uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return
	}
	r.answers = max(r.answers, request)
	report := &resealv1.ReportRequest{
		Edge: r.edge.id, BootId: r.edge.bootID, Answers: r.answers, Time: timestamppb.Now(),
	}
	if report.Partial = r.sent && r.takes; !report.Partial {
		report.Pools, report.Listeners = r.edge.fleet.pools, r.edge.fleet.listeners
	}
	r.sent = true
	r.edge.fleet.counts.reports.Add(1)
	r.edge.fleet.counts.reportBytes.Add(int64(proto.Size(report)))
	_ = r.stream.Send(report)
	if r.timer == nil {
		r.timer = time.AfterFunc(reportInterval, func() { r.send(0) })
	} else {
		r.timer.Reset(reportInterval)
	}
}

func (r *reporter) partial(takes bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.takes = r.takes || takes
}

func (r *reporter) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
	r.timer.Stop()
}
