package replicas

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxPreviewed bounds the edges that a preview asks.
	maxPreviewed = 50
	// previewTimeout bounds the wait for other replicas, which wait for their edges a
	// little shorter.
	previewTimeout = 7 * time.Second
	// maxNames bounds the edges that are named for each finding.
	maxNames = 5
)

// Preview finds out what changes would do.
type Preview struct {
	// Candidate is the configuration that a change would lead to. Its errors are gRPC
	// statuses.
	Candidate func(context.Context, *resealv1.ApplyRequest) (*resealv1.Snapshot, error)
	// Ask asks edges that are connected to this replica.
	Ask func(ctx context.Context, candidate *resealv1.Snapshot, edges []string) ([]*resealv1.EdgeImpact, error)
}

// PreviewChange implements resealv1.FleetServiceServer.
func (f *Fleet) PreviewChange(ctx context.Context, request *resealv1.PreviewChangeRequest) (*resealv1.PreviewChangeResponse, error) {
	if f.Preview.Candidate == nil {
		return nil, status.Error(codes.Unimplemented, "this replica previews no changes")
	}
	candidate, err := f.Preview.Candidate(ctx, request.GetApply())
	if err != nil {
		return nil, err
	}
	if f.FromReplica(ctx) {
		if len(request.GetEdges()) > maxPreviewed {
			return nil, status.Errorf(codes.InvalidArgument, "edges: at most %d are asked", maxPreviewed)
		}
		reports, err := f.Preview.Ask(ctx, candidate, request.GetEdges())
		return &resealv1.PreviewChangeResponse{Reports: reports}, err
	}
	list, err := f.ListEdges(ctx, &resealv1.ListEdgesRequest{})
	if err != nil {
		return nil, err
	}
	s := choose(list.GetEdges())
	reports, missing, err := f.askAll(ctx, request.GetApply(), candidate, s)
	if err != nil {
		return nil, err
	}
	response := s.summarize(reports)
	response.Unanswered = list.GetUnanswered()
	for _, m := range missing {
		if !slices.ContainsFunc(response.Unanswered, func(u *resealv1.UnansweredReplica) bool { return u.GetId() == m.GetId() }) {
			response.Unanswered = append(response.Unanswered, m)
		}
	}
	return response, nil
}

// askAll asks the edges of a sample, each replica for its own.
func (f *Fleet) askAll(ctx context.Context, apply *resealv1.ApplyRequest, candidate *resealv1.Snapshot, s *sample) ([]*resealv1.EdgeImpact, []*resealv1.UnansweredReplica, error) {
	ctx, cancel := context.WithTimeout(ctx, previewTimeout)
	defer cancel()
	byReplica := map[string][]string{}
	for _, edge := range s.asked {
		byReplica[edge.GetReplica()] = append(byReplica[edge.GetReplica()], edge.GetId())
	}
	peers, _ := f.group.others()
	var (
		all     sync.WaitGroup
		mu      sync.Mutex
		reports []*resealv1.EdgeImpact
		missing []*resealv1.UnansweredReplica
		failed  error
	)
	for replica, ids := range byReplica {
		all.Go(func() {
			found, err := f.askReplica(ctx, peers, replica, &resealv1.PreviewChangeRequest{Apply: apply, Edges: ids}, candidate)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				reports = append(reports, found...)
			case replica == f.group.config.ID || status.Code(err) == codes.ResourceExhausted || !silent(err):
				failed = err
			default:
				missing = append(missing, f.group.missing(replica, err))
			}
		})
	}
	all.Wait()
	slices.SortFunc(missing, func(a, b *resealv1.UnansweredReplica) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return reports, missing, failed
}

func (f *Fleet) askReplica(ctx context.Context, peers []*peer, replica string, request *resealv1.PreviewChangeRequest, candidate *resealv1.Snapshot) ([]*resealv1.EdgeImpact, error) {
	if replica == f.group.config.ID {
		return f.Preview.Ask(ctx, candidate, request.GetEdges())
	}
	i := slices.IndexFunc(peers, func(p *peer) bool { return p.id == replica })
	if i < 0 {
		return nil, status.Error(codes.Unavailable, "it is gone")
	}
	done, err := peers[i].turn(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	response, err := resealv1.NewFleetServiceClient(peers[i].conn).PreviewChange(ctx, request)
	return response.GetReports(), err
}

// sample is some of the edges, so chosen that as many labels and configurations as
// possible are among them.
type sample struct {
	edges  int // that are connected
	asked  []*resealv1.Edge
	kindOf map[string]string // by id
	kinds  map[string]int    // how many edges there are
}

func choose(edges []*resealv1.Edge) *sample {
	s := &sample{kindOf: map[string]string{}, kinds: map[string]int{}}
	groups := map[string][]*resealv1.Edge{}
	for _, edge := range edges {
		if edge.GetDisconnectedAt() != nil {
			continue
		}
		kind := kindOf(edge)
		s.edges++
		s.kinds[kind]++
		s.kindOf[edge.GetId()] = kind
		groups[kind] = append(groups[kind], edge)
	}
	order := slices.Sorted(maps.Keys(groups))
	for round := 0; len(s.asked) < min(maxPreviewed, s.edges); round++ {
		for _, kind := range order {
			if round < len(groups[kind]) && len(s.asked) < maxPreviewed {
				s.asked = append(s.asked, groups[kind][round])
			}
		}
	}
	return s
}

// kindOf is what edges of a kind have in common.
func kindOf(edge *resealv1.Edge) string {
	var kind strings.Builder
	for _, label := range slices.Sorted(maps.Keys(edge.GetLabels())) {
		fmt.Fprintf(&kind, "%s=%s\x00", label, edge.GetLabels()[label])
	}
	kind.Write(edge.GetIntendedHash())
	return kind.String()
}

// weights are how many edges each of those that answered stands for, by id.
func (s *sample) weights(reports []*resealv1.EdgeImpact) map[string]float64 {
	answered := map[string]int{}
	for _, report := range reports {
		if report.GetUnknown() == "" {
			answered[s.kindOf[report.GetEdge()]]++
		}
	}
	covered := 0
	for kind := range answered {
		covered += s.kinds[kind]
	}
	weights := map[string]float64{}
	for _, report := range reports {
		if kind := s.kindOf[report.GetEdge()]; report.GetUnknown() == "" {
			weights[report.GetEdge()] = float64(s.kinds[kind]) / float64(answered[kind]) * float64(s.edges) / float64(covered)
		}
	}
	return weights
}

// sums adds up numbers of edges that each stand for several.
type sums struct{ edges, connections, handshakes float64 }

func (s *sums) add(weight float64, connections, handshakes int64) {
	s.edges += weight
	s.connections += weight * float64(connections)
	s.handshakes += weight * float64(handshakes)
}

func whole(x float64) int64 { return int64(math.Round(x)) }

// summarize makes one answer of those of the edges.
func (s *sample) summarize(reports []*resealv1.EdgeImpact) *resealv1.PreviewChangeResponse {
	slices.SortFunc(reports, func(a, b *resealv1.EdgeImpact) int { return cmp.Compare(a.GetEdge(), b.GetEdge()) })
	response := &resealv1.PreviewChangeResponse{Edges: int32(s.edges), Asked: int32(len(s.asked))}
	weights := s.weights(reports)
	refused, unknown := map[string]*resealv1.ImpactViolation{}, map[string]*resealv1.ImpactUnknown{}
	counts := map[string]float64{}
	pools, poolSums := map[string]*resealv1.PoolImpact{}, map[string]*sums{}
	listeners, listenerSums := map[string]*resealv1.ListenerImpact{}, map[string]*sums{}
	for _, report := range reports {
		weight := weights[report.GetEdge()]
		if why := report.GetUnknown(); why != "" {
			at := entry(unknown, why, func() *resealv1.ImpactUnknown { return &resealv1.ImpactUnknown{Reason: why} })
			at.Edges, at.Names = at.Edges+1, someNames(at.Names, report.GetEdge())
			continue
		}
		response.Answered++
		for _, violation := range report.GetViolations() {
			text := violation.Text()
			at := entry(refused, text, func() *resealv1.ImpactViolation { return &resealv1.ImpactViolation{Violation: violation} })
			counts[text] += weight
			at.Names = someNames(at.Names, report.GetEdge())
		}
		for _, pool := range report.GetPools() {
			key := fmt.Sprint(pool.GetName(), "\x00", pool.GetRemoved(), pool.GetChanges())
			entry(pools, key, func() *resealv1.PoolImpact {
				return &resealv1.PoolImpact{Name: pool.GetName(), Removed: pool.GetRemoved(), Changes: pool.GetChanges()}
			})
			entry(poolSums, key, func() *sums { return &sums{} }).add(weight, pool.GetConnections(), pool.GetFullHandshakes())
		}
		for _, l := range report.GetListeners() {
			key := fmt.Sprint(l.GetName(), "\x00", l.GetAction(), l.GetAddress())
			entry(listeners, key, func() *resealv1.ListenerImpact {
				return &resealv1.ListenerImpact{Name: l.GetName(), Action: l.GetAction(), Address: l.GetAddress()}
			})
			entry(listenerSums, key, func() *sums { return &sums{} }).add(weight, l.GetConnections(), 0)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(pools)) {
		pool, sum := pools[key], poolSums[key]
		pool.Edges, pool.Connections, pool.FullHandshakes = int32(whole(sum.edges)), whole(sum.connections), whole(sum.handshakes)
		response.Pools = append(response.Pools, pool)
		response.Connections += pool.Connections
		response.FullHandshakes += pool.FullHandshakes
	}
	for _, key := range slices.Sorted(maps.Keys(listeners)) {
		l, sum := listeners[key], listenerSums[key]
		l.Edges, l.Connections = int32(whole(sum.edges)), whole(sum.connections)
		response.Listeners = append(response.Listeners, l)
		response.Connections += l.Connections
	}
	for text, at := range refused {
		at.Edges = int32(whole(counts[text]))
		response.Violations = append(response.Violations, at)
	}
	slices.SortFunc(response.Violations, func(a, b *resealv1.ImpactViolation) int {
		return cmp.Or(cmp.Compare(b.GetEdges(), a.GetEdges()), cmp.Compare(a.GetViolation().Text(), b.GetViolation().Text()))
	})
	for _, why := range slices.Sorted(maps.Keys(unknown)) {
		response.Unknown = append(response.Unknown, unknown[why])
	}
	return response
}

func entry[T any](entries map[string]*T, key string, fresh func() *T) *T {
	if entries[key] == nil {
		entries[key] = fresh()
	}
	return entries[key]
}

func someNames(names []string, name string) []string {
	if len(names) < maxNames {
		names = append(names, name)
	}
	return names
}
