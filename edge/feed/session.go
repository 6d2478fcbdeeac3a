package feed

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/link"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

var errEnded = errors.New("the control plane ended the stream")

// connect runs one session after another.
func (f *Feed) connect(ctx context.Context) error {
	link.Keep(ctx, f.serve, func(err error, again time.Duration) {
		f.config.Logger.Warn("feed is lost, what is in force stays", "error", err, "again_in", again)
	})
	return nil
}

// session is one stream. Any error ends all of it.
type session struct {
	feed     *Feed
	stream   grpc.BidiStreamingClient[resealv1.SyncRequest, resealv1.SyncResponse]
	received chan *resealv1.SyncResponse
	late     chan *resealv1.SyncRequest // the newest late answer
	accepted bool                       // by the server; guarded by Feed.mu

	group   *errgroup.Group
	probed  chan *resealv1.ProbeReport
	probing bool // belongs to talk

	previewing atomic.Bool
	observing  atomic.Int32
}

// serve runs a session to its end.
func (f *Feed) serve(ctx context.Context) error {
	group, streamCtx := errgroup.WithContext(ctx)
	streamCtx, cancel := context.WithCancel(streamCtx)
	defer cancel()
	stream, err := f.config.Client.Sync(streamCtx)
	if err != nil {
		return err
	}
	s := &session{
		feed:     f,
		stream:   stream,
		received: make(chan *resealv1.SyncResponse),
		late:     make(chan *resealv1.SyncRequest, 1),
		group:    group,
		probed:   make(chan *resealv1.ProbeReport),
	}
	f.setSession(s)
	defer f.setSession(nil)
	group.Go(func() error { return s.receive(streamCtx) })
	group.Go(func() error {
		// A panic over what came costs the stream: what is in force stays.
		err := exchange.Guard("the feed was followed", func() error { return s.talk(ctx, streamCtx) })
		if errors.Is(err, io.EOF) {
			// The stream broke under a send. Why is what receive returns.
			return nil
		}
		return err
	})
	return group.Wait()
}

func (f *Feed) setSession(s *session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.session = s
}

// receive always returns an error.
func (s *session) receive(ctx context.Context) error {
	header, err := s.stream.Header()
	if err == nil && header != nil {
		s.feed.mu.Lock()
		s.accepted = true
		s.feed.mu.Unlock()
		s.feed.config.Logger.Info("feed is connected")
	}
	for {
		message, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			return errEnded
		}
		if err != nil {
			return err
		}
		select {
		case s.received <- message:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// talk says Hello and answers what comes. What has come is applied to the end
// even when the stream breaks meanwhile, hence ctx beside the stream's.
func (s *session) talk(ctx, streamCtx context.Context) error {
	if err := s.stream.Send(s.feed.hello()); err != nil {
		return err
	}
	var revision int64 // of the newest update
	for {
		var answer *resealv1.SyncRequest
		select {
		case <-streamCtx.Done():
			return streamCtx.Err()
		case answer = <-s.late:
			if answered(answer) != revision {
				continue // a newer update took its place
			}
		case report := <-s.probed:
			s.probing = false
			answer = probeAnswer(report)
		case message := <-s.received:
			if order := message.GetProbeOrder(); order != nil {
				if answer = s.probe(streamCtx, order); answer != nil {
					break
				}
				continue
			}
			if order := message.GetPreviewOrder(); order != nil {
				s.preview(streamCtx, order)
				continue
			}
			if order := message.GetObserveOrder(); order != nil {
				s.observe(streamCtx, order)
				continue
			}
			if order := message.GetFailuresOrder(); order != nil {
				answer = s.failures(order)
				break
			}
			if told := message.GetConnectionShares(); told != nil {
				s.feed.shareAnew(told)
				continue
			}
			if drain := message.GetDrain(); drain != nil && s.feed.config.Drain != nil {
				s.feed.drained.Store(drain.GetDrain())
				s.feed.config.Drain(drain.GetDrain(), drain.GetTimeout().AsDuration())
			}
			if move := message.GetMove(); move != nil && s.feed.config.Move != nil {
				s.feed.move(move)
			}
			if message.GetUpdate() == nil {
				continue
			}
			held, err := s.feed.take(message.GetUpdate())
			if err != nil {
				return err
			}
			revision = held.revision
			answer = s.feed.apply(ctx, held)
		}
		if err := s.stream.Send(answer); err != nil {
			return err
		}
	}
}

// move does what the control plane asks for as long as its edges are spread unevenly.
func (f *Feed) move(move *resealv1.Move) {
	log := f.config.Logger.With("reason", move.GetReason(), "addresses", move.GetAddresses())
	if f.config.Move(move.GetAddresses()) {
		log.Info("asked to connect to another replica")
		return
	}
	f.stays.Do(func() {
		log.Warn("asked to connect to another replica, but --control-plane names no other; that is said once")
	})
}

func answered(answer *resealv1.SyncRequest) int64 {
	return max(answer.GetAck().GetRevision(), answer.GetNack().GetRevision())
}

// answerLate sends a second answer to the newest update, soon.
func (s *session) answerLate(answer *resealv1.SyncRequest) {
	select {
	case <-s.late:
	default:
	}
	s.late <- answer
}

func (f *Feed) hello() *resealv1.SyncRequest {
	hello := &resealv1.Hello{
		Edge:      f.config.Edge,
		BootId:    f.config.BootID,
		Labels:    f.config.Labels,
		Version:   f.config.Version,
		StartedAt: timestamppb.New(f.config.StartedAt),
		Draining:  f.drained.Load(),
		Previews:  f.config.Preview != nil,
	}
	hello.Crashed = f.trial.crashed()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held != nil && !f.distrust {
		hello.ClusterId, hello.Revision, hello.Hash = f.held.clusterID, f.held.revision, f.held.hash
	}
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Hello{Hello: hello}}
}

// failures answers an order for failures.
func (s *session) failures(order *resealv1.FailuresOrder) *resealv1.SyncRequest {
	report := &resealv1.FailuresReport{}
	if s.feed.config.Failures != nil {
		report = s.feed.config.Failures(order)
	}
	report.Id = order.GetId()
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_FailuresReport{FailuresReport: report}}
}
