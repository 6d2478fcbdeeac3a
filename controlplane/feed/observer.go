package feed

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxObserved bounds the requests of a report.
const maxObserved = 50

var errNotObserved = status.Error(codes.NotFound, "nobody observes this any more")

// Observer is the ObservationService of a Server.
type Observer struct {
	resealv1.UnimplementedObservationServiceServer
	server *Server
}

// Observer returns the ObservationService.
func (s *Server) Observer() *Observer { return &Observer{server: s} }

// Observe implements resealv1.ObservationServiceServer.
func (s *Observer) Observe(stream grpc.BidiStreamingServer[resealv1.ObserveRequest, resealv1.ObserveResponse]) error {
	return s.Service().Serve(stream)
}

// Service are the conversations in which edges tell of requests.
func (s *Observer) Service() fleet.Service {
	return fleet.Service{Lines: s.server.lines, Open: s.open, Message: func() proto.Message { return &resealv1.ObserveRequest{} }}
}

func (s *Observer) open(ctx context.Context, line *fleet.Line) (fleet.Conversation, error) {
	id, _, err := s.server.config.Edge(ctx)
	if err != nil {
		return nil, fleet.Denied(err)
	}
	c := &observed{server: s.server, line: line, id: id}
	c.deadline = time.AfterFunc(helloTimeout, func() {
		line.End(status.Errorf(codes.DeadlineExceeded, "no ObserveStart within %s", helloTimeout))
	})
	return c, nil
}

// observed is the conversation in which an edge tells of its requests.
type observed struct {
	server   *Server
	line     *fleet.Line
	id       string
	deadline *time.Timer
	by       *observation // nil: the edge has not said what it is about
	goOn     atomic.Bool  // the edge is to be told to go on

	matched, dropped uint64 // as the edge said last
}

// renew has the edge told to go on.
func (c *observed) renew() {
	c.goOn.Store(true)
	c.line.Wake()
}

// Take implements fleet.Conversation.
func (c *observed) Take(said proto.Message) (time.Duration, error) {
	message := said.(*resealv1.ObserveRequest)
	start, report := message.GetStart(), message.GetReport()
	switch {
	case start != nil && c.by == nil:
		return 0, c.start(start)
	case report != nil && c.by != nil:
		return 0, c.take(report)
	}
	return 0, status.Error(codes.InvalidArgument, "want an ObserveStart, then ObserveReports")
}

func (c *observed) start(start *resealv1.ObserveStart) error {
	if err := fleet.CheckID(start.GetEdge(), c.id); err != nil {
		return err
	}
	by := c.server.observations.find(start.GetId())
	if by == nil {
		return errNotObserved
	}
	if err := by.join(c); err != nil {
		return err
	}
	c.deadline.Stop()
	c.by = by
	c.renew()
	return nil
}

// take takes a report. What an edge says is bounded, and made such that it can be shown to
// people.
func (c *observed) take(report *resealv1.ObserveReport) error {
	if len(report.GetRequests()) > maxObserved || proto.Size(report) > maxReport {
		return status.Errorf(codes.InvalidArgument, "a report has more than %d requests or %d bytes", maxObserved, maxReport)
	}
	if report.GetMatched() < c.matched || report.GetDropped() < c.dropped {
		return status.Error(codes.InvalidArgument, "counts have gone back")
	}
	makeVisible(report.ProtoReflect())
	for _, request := range report.GetRequests() {
		request.Edge = c.id
	}
	c.by.add(report.GetRequests(), report.GetMatched()-c.matched, report.GetDropped()-c.dropped)
	c.matched, c.dropped = report.GetMatched(), report.GetDropped()
	return nil
}

// Next implements fleet.Conversation.
func (c *observed) Next() (fleet.Outgoing, error) {
	if !c.goOn.Swap(false) {
		return fleet.Outgoing{}, nil
	}
	return fleet.Outgoing{Message: &resealv1.ObserveResponse{}}, nil
}

// Close implements fleet.Conversation.
func (c *observed) Close() {
	c.deadline.Stop()
	if c.by != nil {
		c.by.leave(c)
	}
}
