package tally

import (
	"context"
	"errors"
	"io"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

var errStopping = status.Error(codes.Unavailable, "this replica is stopping")

// stream is one stream of reports.
type stream struct {
	id         string
	wake       chan struct{} // something is to be asked
	superseded chan struct{} // closed when a newer stream took over
	done       chan struct{} // closed when the stream has ended

	// Of the goroutine that receives.

	stripped bool    // that was said
	last     *report // the newest on this stream, nil before the first

	// Guarded by Server.mu.

	counted  bool          // a report has come
	asked    uint64        // the newest request that somebody waits for
	sent     uint64        // the newest that was sent
	answered uint64        // the newest that a report answers
	reported chan struct{} // closed at the next report
}

// Report implements resealv1.TallyServiceServer.
func (s *Server) Report(reports grpc.BidiStreamingServer[resealv1.ReportRequest, resealv1.ReportResponse]) error {
	ctx := reports.Context()
	id, err := s.config.Edge(ctx)
	if err != nil {
		if _, ok := status.FromError(err); ok {
			return err
		}
		return status.Error(codes.PermissionDenied, err.Error())
	}
	c := &stream{
		id:         id,
		wake:       make(chan struct{}, 1),
		superseded: make(chan struct{}),
		done:       make(chan struct{}),
		reported:   make(chan struct{}),
	}
	defer close(c.done)
	defer s.leave(c)
	// It ends with the stream, which gRPC ends when this function returns.
	failed := make(chan error, 1)
	go func() { failed <- s.receive(c, reports) }()
	if err := reports.Send(&resealv1.ReportResponse{TakesPartial: true}); err != nil {
		return err
	}
	for {
		if request := s.due(c); request > 0 {
			if err := reports.Send(&resealv1.ReportResponse{Request: request}); err != nil {
				return err
			}
		}
		select {
		case <-c.wake:
		case err := <-failed:
			return err
		case <-c.superseded:
			return status.Errorf(codes.Aborted, "edge %q has started another stream", id)
		case <-s.stopped:
			return errStopping
		}
	}
}

func (s *Server) receive(c *stream, reports grpc.BidiStreamingServer[resealv1.ReportRequest, resealv1.ReportResponse]) error {
	for {
		message, err := reports.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if message.GetEdge() != c.id {
			return status.Errorf(codes.PermissionDenied, "edge %q can't report for another", c.id)
		}
		if len(message.GetBootId()) > maxName || message.GetBootId() != "" && !isName(message.GetBootId()) {
			return status.Errorf(codes.InvalidArgument, "boot_id has more than %d bytes, or holds a control character", maxName)
		}
		if message.GetPartial() && (c.last == nil || c.last.bootID != message.GetBootId()) {
			return status.Error(codes.InvalidArgument, "partial: the first report of a stream and of a process must be whole")
		}
		s.strip(reports.Context(), c, message)
		if err := s.take(c, message); err != nil {
			return err
		}
	}
}

// strip removes from a report what the edge does not have, or what is not a name.
// What its process reported before stays: the edge may serve an older
// configuration.
func (s *Server) strip(ctx context.Context, c *stream, message *resealv1.ReportRequest) {
	if len(message.GetPools())+len(message.GetListeners()) == 0 {
		return
	}
	var pools, listeners map[string]bool
	if s.config.Assigned != nil {
		pools, listeners = s.config.Assigned(ctx)
	}
	var known report
	s.mu.Lock()
	if e := s.edges[c.id]; e != nil && e.newest.bootID == message.GetBootId() {
		known = *e.newest
	}
	s.mu.Unlock()
	ignored := 0
	drop := func(all []*resealv1.Stats, assigned map[string]bool, before []*packed) []*resealv1.Stats {
		return slices.DeleteFunc(all, func(stats *resealv1.Stats) bool {
			name := stats.GetName()
			if s.config.Assigned == nil && isName(name) || assigned[name] || byName(before, name) != nil {
				return false
			}
			ignored++
			return true
		})
	}
	message.Pools = drop(message.GetPools(), pools, known.pools)
	message.Listeners = drop(message.GetListeners(), listeners, known.listeners)
	if ignored > 0 {
		s.ignored.Add(float64(ignored))
		if !c.stripped {
			c.stripped = true
			s.config.Logger.Warn("an edge reports pools or listeners that it does not have", "edge", c.id, "ignored", ignored)
		}
	}
}

// isName says whether a word may be shown to people.
func isName(text string) bool {
	return text != "" && resealv1.Legible(text)
}

// due returns the request to send now, or 0. At most one is under way, so an
// edge that does not answer is not asked over and over.
func (s *Server) due(c *stream) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.asked <= c.sent || c.answered < c.sent {
		return 0
	}
	c.sent = c.asked
	return c.sent
}

// askLocked asks for a report newer than now and returns the request's number.
// Callers that ask before it is sent share it.
func (c *stream) askLocked() uint64 {
	c.asked = c.sent + 1
	c.poke()
	return c.asked
}

func (c *stream) answeredLocked(request uint64) {
	c.answered = max(c.answered, min(request, c.sent))
	close(c.reported)
	c.reported = make(chan struct{})
	c.poke()
}

func (c *stream) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}
