package tally

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// askTimeout bounds the wait for reports.
	askTimeout = time.Second
	// The time between two responses of WatchStats.
	defaultInterval = 2 * time.Second
	minInterval     = 500 * time.Millisecond
)

// GetStats implements resealv1.TallyServiceServer. It is NOT_FOUND to ask for an
// edge that is not live. A name that nothing has yields nothing.
func (s *Server) GetStats(ctx context.Context, request *resealv1.GetStatsRequest) (*resealv1.GetStatsResponse, error) {
	since := request.GetSince()
	if since != nil && (since.CheckValid() != nil || since.AsDuration() < 0 || since.AsDuration() > maxSince) {
		return nil, status.Errorf(codes.InvalidArgument, "since: must be between 0s and %s", maxSince)
	}
	asked := s.ask(request.GetEdge())
	if request.GetEdge() != "" && len(asked) == 0 {
		return nil, status.Errorf(codes.NotFound, "edge %q is not live", request.GetEdge())
	}
	if err := s.await(ctx, asked); err != nil {
		return nil, err
	}
	return s.add(asked, request.GetName(), since.AsDuration()), nil
}

// question is what an edge was asked.
type question struct {
	edge    string
	stream  *stream // nil: it can't be asked
	request uint64
}

// ask asks all edges that count, or one, for a report.
func (s *Server) ask(only string) []question {
	live := s.live()
	s.mu.Lock()
	defer s.mu.Unlock()
	var asked []question
	for _, id := range s.presentLocked(live) {
		if only != "" && id != only {
			continue
		}
		q := question{edge: id}
		if e := s.edges[id]; e != nil && e.stream != nil {
			q.stream, q.request = e.stream, e.stream.askLocked()
		}
		asked = append(asked, q)
	}
	return asked
}

// await waits until all have answered, or it took too long.
func (s *Server) await(ctx context.Context, asked []question) error {
	timeout := time.NewTimer(askTimeout)
	defer timeout.Stop()
	for _, q := range asked {
		for reported := s.outstanding(q); reported != nil; reported = s.outstanding(q) {
			select {
			case <-reported:
			case <-q.stream.done:
			case <-timeout.C:
				return nil
			case <-s.stopped:
				return fleet.ErrStopping
			case <-ctx.Done():
				return status.FromContextError(ctx.Err()).Err()
			}
		}
	}
	return nil
}

// outstanding returns what is closed at the next report of an edge that owes an
// answer, and nil when it owes none or never will.
func (s *Server) outstanding(q question) <-chan struct{} {
	if q.stream == nil {
		return nil
	}
	select {
	case <-q.stream.done:
		return nil
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if q.stream.answered >= q.request {
		return nil
	}
	return q.stream.reported
}

// known is what is known of an edge that was asked. Reports don't change: they are
// read without a lock.
type known struct {
	edge    string
	stale   bool
	newest  *report // nil: it has never reported
	history history // nil unless it was asked for
}

func (s *Server) known(asked []question, windows bool) []known {
	found := make([]known, 0, len(asked))
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range asked {
		k := known{edge: q.edge, stale: q.stream == nil || q.stream.answered < q.request}
		if e := s.edges[q.edge]; e != nil {
			k.newest = e.newest
			if windows {
				k.history = slices.Clone(e.history)
			}
		}
		found = append(found, k)
	}
	return found
}

// add adds up the newest reports of the edges that were asked, of one name unless that
// is empty.
func (s *Server) add(asked []question, name string, since time.Duration) *resealv1.GetStatsResponse {
	now := time.Now()
	response := &resealv1.GetStatsResponse{Time: timestamppb.New(now)}
	pools, listeners := totals{}, totals{}
	for _, k := range s.known(asked, since > 0) {
		if k.stale {
			response.StaleEdges = append(response.StaleEdges, k.edge)
		}
		row := &resealv1.EdgeStats{Edge: k.edge, Stale: k.stale}
		response.Edges = append(response.Edges, row)
		if k.newest == nil {
			continue
		}
		ofPools, ofListeners := totals{}, totals{}
		if since > 0 {
			var from time.Time
			ofPools, ofListeners, from = k.history.window(s.words, k.newest, now.Add(-since), name)
			row.WindowStart = timestamppb.New(from)
		} else {
			ofPools.addPacked(s.words, only(k.newest.pools, name), everything)
			ofListeners.addPacked(s.words, only(k.newest.listeners, name), everything)
		}
		pools.addTotals(ofPools)
		listeners.addTotals(ofListeners)
		row.Pools, row.Listeners = ofPools.stats(), ofListeners.stats()
		row.Time = timestamppb.New(k.newest.at)
	}
	response.Pools, response.Listeners = pools.stats(), listeners.stats()
	slices.Sort(response.StaleEdges)
	return response
}

func (t totals) addTotals(other totals) {
	for _, c := range other {
		t.add(c)
	}
}

// WatchStats implements resealv1.TallyServiceServer.
func (s *Server) WatchStats(request *resealv1.WatchStatsRequest, stream grpc.ServerStreamingServer[resealv1.WatchStatsResponse]) error {
	return s.Watch(request, stream, s.GetStats)
}

// Watch is WatchStats with what get says, as of more edges than this server's.
func (s *Server) Watch(
	request *resealv1.WatchStatsRequest, stream grpc.ServerStreamingServer[resealv1.WatchStatsResponse],
	get func(context.Context, *resealv1.GetStatsRequest) (*resealv1.GetStatsResponse, error),
) error {
	interval := defaultInterval
	if asked := request.GetInterval(); asked != nil {
		if asked.CheckValid() != nil || asked.AsDuration() < minInterval {
			return status.Errorf(codes.InvalidArgument, "interval: must be at least %s", minInterval)
		}
		interval = asked.AsDuration()
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		stats, err := get(stream.Context(), &resealv1.GetStatsRequest{
			Name: request.GetName(), Since: request.GetSince(), Edge: request.GetEdge(),
		})
		if err != nil {
			return err
		}
		if err := stream.Send(&resealv1.WatchStatsResponse{Stats: stats}); err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-s.stopped:
			return fleet.ErrStopping
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}
