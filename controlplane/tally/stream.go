package tally

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// stream is one stream of reports.
type stream struct {
	server *Server
	ctx    context.Context // of the caller
	id     string
	line   *fleet.Line
	done   chan struct{} // closed when the stream has ended

	// Of Take and Next.

	greeted  bool    // the first response was sent
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
	return s.Reports().Serve(reports)
}

// Reports are the conversations in which edges report.
func (s *Server) Reports() fleet.Service {
	return fleet.Service{Lines: s.lines, Open: s.open, Message: func() proto.Message { return &resealv1.ReportRequest{} }, Raw: true}
}

func (s *Server) open(ctx context.Context, line *fleet.Line) (fleet.Conversation, error) {
	id, err := s.config.Edge(ctx)
	if err != nil {
		return nil, fleet.Denied(err)
	}
	return &stream{server: s, ctx: ctx, id: id, line: line, done: make(chan struct{}), reported: make(chan struct{})}, nil
}

// Close implements fleet.Conversation.
func (c *stream) Close() {
	c.server.leave(c)
	close(c.done)
}

// Take implements fleet.Conversation.
func (c *stream) Take(said proto.Message) (time.Duration, error) {
	data, err := said.(*fleet.Raw).Bytes()
	if err != nil {
		return 0, status.Error(codes.Internal, errReport.Error())
	}
	h, err := hear(data)
	if err != nil {
		return 0, status.Error(codes.Internal, err.Error())
	}
	if err := fleet.CheckID(h.edge, c.id); err != nil {
		return 0, err
	}
	if len(h.bootID) > maxName || h.bootID != "" && !isName(h.bootID) {
		return 0, status.Errorf(codes.InvalidArgument, "boot_id has more than %d bytes, or holds a control character", maxName)
	}
	if h.partial && (c.last == nil || c.last.bootID != h.bootID) {
		return 0, status.Error(codes.InvalidArgument, "partial: the first report of a stream and of a process must be whole")
	}
	pools, listeners, err := c.server.decode(c.ctx, c, h)
	if err != nil {
		return 0, status.Error(codes.Internal, err.Error())
	}
	return 0, c.server.take(c, h, pools, listeners)
}

// Next implements fleet.Conversation.
func (c *stream) Next() (fleet.Outgoing, error) {
	if !c.greeted {
		c.greeted = true
		return fleet.Outgoing{Message: &resealv1.ReportResponse{TakesPartial: true}}, nil
	}
	if request := c.server.due(c); request > 0 {
		return fleet.Outgoing{Message: &resealv1.ReportResponse{Request: request}}, nil
	}
	return fleet.Outgoing{}, nil
}

// decode decodes the counters in a report, but for those that the edge does not have, or
// that have no name. What its process reported before counts: the edge may serve an
// older configuration.
func (s *Server) decode(ctx context.Context, c *stream, h heard) (pools, listeners []*packed, err error) {
	if !h.counted {
		return nil, nil, nil
	}
	var poolNames, listenerNames map[string]bool
	if s.config.Assigned != nil {
		poolNames, listenerNames = s.config.Assigned(ctx)
	}
	var known report
	s.mu.Lock()
	if e := s.edges[c.id]; e != nil && e.newest.bootID == h.bootID {
		known = *e.newest
	}
	s.mu.Unlock()
	keep := func(assigned map[string]bool, before []*packed) func([]byte) bool {
		return func(name []byte) bool {
			return s.config.Assigned == nil && isName(string(name)) || assigned[string(name)] || byName(before, string(name)) != nil
		}
	}
	pools, strange, err := h.counters(poolsField, s.words, keep(poolNames, known.pools))
	if err != nil {
		return nil, nil, err
	}
	listeners, more, err := h.counters(listenersField, s.words, keep(listenerNames, known.listeners))
	if err != nil {
		return nil, nil, err
	}
	if strange += more; strange > 0 {
		s.ignored.Add(float64(strange))
		if !c.stripped {
			c.stripped = true
			s.config.Logger.Warn("an edge reports pools or listeners that it does not have", "edge", c.id, "ignored", strange)
		}
	}
	return pools, listeners, nil
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
	c.line.Wake()
	return c.asked
}

func (c *stream) answeredLocked(request uint64) {
	c.answered = max(c.answered, min(request, c.sent))
	close(c.reported)
	c.reported = make(chan struct{})
	c.line.Wake()
}
