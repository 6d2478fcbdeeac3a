package feed

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// failuresTimeout bounds the wait for edges' reports. Another replica waits twice
	// as long.
	failuresTimeout = time.Second
	// askedAtOnce bounds the edges that are asked at a time, and so what is held of
	// their reports.
	askedAtOnce = 256
	// edgeFailures is how many an edge is asked for.
	edgeFailures = 128
)

// failing are the questions that an edge has not answered yet.
type failing struct {
	mu     sync.Mutex
	newest uint64
	asked  map[uint64]chan<- *resealv1.FailuresReport
}

// begin notes a question. Its answer goes into reports, which has room.
func (f *failing) begin(reports chan<- *resealv1.FailuresReport) (id uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.asked == nil {
		f.asked = map[uint64]chan<- *resealv1.FailuresReport{}
	}
	f.newest++
	f.asked[f.newest] = reports
	return f.newest
}

func (f *failing) end(id uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.asked, id)
}

// answer takes a report. One that nobody waits for is dropped.
func (f *failing) answer(report *resealv1.FailuresReport) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if reports := f.asked[report.GetId()]; reports != nil {
		delete(f.asked, report.GetId())
		reports <- report
	}
}

// ListFailures implements resealv1.FleetServiceServer.
func (s *Server) ListFailures(ctx context.Context, request *resealv1.ListFailuresRequest) (*resealv1.ListFailuresResponse, error) {
	if request.GetLimit() < 0 || request.GetLimit() > resealv1.MaxFailures {
		return nil, status.Errorf(codes.InvalidArgument, "limit: must be from 1 to %d, or 0 for %d", resealv1.MaxFailures, resealv1.DefaultFailures)
	}
	var streams []*session
	if request.GetEdge() == "" {
		streams = s.table.streams()
	} else if stream := s.table.stream(request.GetEdge()); stream != nil {
		streams = []*session{stream}
	} else {
		return nil, status.Errorf(codes.NotFound, "edge %q: %s", request.GetEdge(), errNotConnected)
	}
	ctx, cancel := context.WithTimeout(ctx, failuresTimeout)
	defer cancel()
	var (
		mu       sync.Mutex
		response = &resealv1.ListFailuresResponse{}
		asking   sync.WaitGroup
		next     = make(chan *session)
	)
	for range min(askedAtOnce, len(streams)) {
		asking.Go(func() {
			for stream := range next {
				found, ok := stream.failures(ctx, request)
				mu.Lock()
				if !ok {
					response.SilentEdges = append(response.SilentEdges, stream.id)
				}
				response.Failures = request.Newest(append(response.Failures, found...))
				mu.Unlock()
			}
		})
	}
	for _, stream := range streams {
		next <- stream
	}
	close(next)
	asking.Wait()
	slices.Sort(response.SilentEdges)
	return response, nil
}

// failures asks the edge. ok is false when it does not answer in time, or not as it
// should.
func (c *session) failures(ctx context.Context, request *resealv1.ListFailuresRequest) (found []*resealv1.Failure, ok bool) {
	reports := make(chan *resealv1.FailuresReport, 1)
	id := c.failing.begin(reports)
	defer c.failing.end(id)
	if ctx.Err() != nil || !c.order(order{&resealv1.SyncResponse{Message: &resealv1.SyncResponse_FailuresOrder{FailuresOrder: &resealv1.FailuresOrder{
		Id: id, Pool: request.GetPool(), Listener: request.GetListener(), Limit: int32(min(request.Most(), edgeFailures)),
	}}}, nil}) {
		return nil, false
	}
	select {
	case report := <-reports:
		if len(report.GetFailures()) > edgeFailures || proto.Size(report) > maxReport {
			return nil, false
		}
		makeVisible(report.ProtoReflect())
		for _, f := range report.GetFailures() {
			f.Edge = c.id
		}
		return report.GetFailures(), true
	case <-c.done:
	case <-ctx.Done():
	}
	return nil, false
}
