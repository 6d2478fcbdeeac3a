package replicas

import (
	"cmp"
	"context"
	"maps"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Tally is the TallyService of all replicas. Edges report to one of them, the
// others are asked.
type Tally struct {
	resealv1.UnimplementedTallyServiceServer

	group *Group
	Services
}

// NewTally makes a Tally.
func NewTally(group *Group, services Services) *Tally {
	return &Tally{group: group, Services: services}
}

// Report implements resealv1.TallyServiceServer.
func (t *Tally) Report(stream grpc.BidiStreamingServer[resealv1.ReportRequest, resealv1.ReportResponse]) error {
	return t.Tally.Report(stream)
}

// GetStats implements resealv1.TallyServiceServer.
func (t *Tally) GetStats(ctx context.Context, request *resealv1.GetStatsRequest) (*resealv1.GetStatsResponse, error) {
	if t.FromReplica(ctx) {
		return t.Tally.GetStats(ctx, request)
	}
	own := func(ctx context.Context) (*resealv1.GetStatsResponse, error) { return t.Tally.GetStats(ctx, request) }
	here, answers := askAll(ctx, t.group, own, func(ctx context.Context, conn grpc.ClientConnInterface) (*resealv1.GetStatsResponse, error) {
		return resealv1.NewTallyServiceClient(conn).GetStats(ctx, request)
	})
	if here.err != nil && status.Code(here.err) != codes.NotFound {
		return nil, here.err
	}
	var found []*resealv1.GetStatsResponse
	if here.err == nil {
		found = append(found, here.said)
	}
	for _, a := range answers {
		if a.err == nil {
			found = append(found, a.said)
		}
	}
	missing := unanswered(t.group, answers)
	switch {
	case len(found) > 0:
	case len(missing) > 0:
		return nil, notReached(request.GetEdge(), missing)
	default:
		return nil, here.err
	}
	merged := mergeStats(found)
	merged.Unanswered = missing
	return merged, nil
}

// WatchStats implements resealv1.TallyServiceServer.
func (t *Tally) WatchStats(request *resealv1.WatchStatsRequest, stream grpc.ServerStreamingServer[resealv1.WatchStatsResponse]) error {
	return t.Tally.Watch(request, stream, t.GetStats)
}

// mergeStats adds up the edges of several replicas. An edge that moved is known to
// more than one: its newest report counts, once.
func mergeStats(all []*resealv1.GetStatsResponse) *resealv1.GetStatsResponse {
	byEdge := map[string]*resealv1.EdgeStats{}
	for _, stats := range all {
		for _, row := range stats.GetEdges() {
			before := byEdge[row.GetEdge()]
			if before == nil || before.GetStale() && !row.GetStale() ||
				before.GetStale() == row.GetStale() && row.GetTime().AsTime().After(before.GetTime().AsTime()) {
				byEdge[row.GetEdge()] = row
			}
		}
	}
	merged := &resealv1.GetStatsResponse{Time: timestamppb.Now()}
	pools, listeners := sum{}, sum{}
	for _, edge := range slices.Sorted(maps.Keys(byEdge)) {
		row := byEdge[edge]
		merged.Edges = append(merged.Edges, row)
		if row.GetStale() {
			merged.StaleEdges = append(merged.StaleEdges, edge)
		}
		pools.add(row.GetPools())
		listeners.add(row.GetListeners())
	}
	merged.Pools, merged.Listeners = pools.sorted(), listeners.sorted()
	return merged
}

// sum are counters by name.
type sum map[string]*resealv1.Stats

func (s sum) sorted() []*resealv1.Stats {
	return slices.SortedFunc(maps.Values(s), func(a, b *resealv1.Stats) int { return cmp.Compare(a.GetName(), b.GetName()) })
}

func (s sum) add(all []*resealv1.Stats) {
	for _, more := range all {
		total := s[more.GetName()]
		if total == nil {
			total = &resealv1.Stats{
				Name: more.GetName(), Handshakes: &resealv1.Handshakes{}, Connections: &resealv1.ConnectionStats{},
				Errors: map[string]uint64{}, Misses: map[string]uint64{}, Closes: map[string]uint64{}, ClosesBy: map[string]uint64{},
				Answers: map[string]uint64{}, Waits: map[string]uint64{},
			}
			s[more.GetName()] = total
		}
		addStats(total, more)
	}
}

func addStats(total, more *resealv1.Stats) {
	total.Requests += more.GetRequests()
	h, from := total.Handshakes, more.GetHandshakes()
	h.Full += from.GetFull()
	h.ResumedSessionId += from.GetResumedSessionId()
	h.ResumedTicket += from.GetResumedTicket()
	h.ResumedPsk += from.GetResumedPsk()
	h.Failed += from.GetFailed()
	c, of := total.Connections, more.GetConnections()
	c.Opened += of.GetOpened()
	c.Reused += of.GetReused()
	c.Active += of.GetActive()
	c.Idle += of.GetIdle()
	c.Share += of.GetShare()
	addCounts(total.Errors, more.GetErrors())
	addCounts(total.Misses, more.GetMisses())
	addCounts(total.Closes, more.GetCloses())
	addCounts(total.ClosesBy, more.GetClosesBy())
	addCounts(total.Answers, more.GetAnswers())
	addCounts(total.Waits, more.GetWaits())
	total.Epochs = addEpochs(total.Epochs, more.GetEpochs())
}

func addCounts(total, more map[string]uint64) {
	for key, n := range more {
		total[key] += n
	}
}

// addEpochs adds to what is sorted by keyring and number, and keeps it so.
func addEpochs(total, more []*resealv1.EpochStats) []*resealv1.EpochStats {
	order := func(a, b *resealv1.EpochStats) int {
		return cmp.Or(cmp.Compare(a.GetKeyring(), b.GetKeyring()), cmp.Compare(a.GetEpoch(), b.GetEpoch()))
	}
	for _, epoch := range more {
		i, found := slices.BinarySearchFunc(total, epoch, order)
		if !found {
			total = slices.Insert(total, i, &resealv1.EpochStats{Keyring: epoch.GetKeyring(), Epoch: epoch.GetEpoch(), Misses: map[string]uint64{}})
		}
		total[i].Resumed += epoch.GetResumed()
		addCounts(total[i].Misses, epoch.GetMisses())
	}
	return total
}
