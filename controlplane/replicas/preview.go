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
	if request.GetApply() == nil {
		return nil, status.Error(codes.InvalidArgument, "apply: say which change")
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

// finding is something that edges say, with the numbers of all edges for which those
// that say it stand.
type finding[T any] struct {
	is                             *T
	edges, connections, handshakes float64
}

// note adds what an edge says to the finding of a key.
func note[T any](all map[string]*finding[T], key string, fresh *T, weight float64, connections, handshakes int64) *T {
	f := all[key]
	if f == nil {
		f = &finding[T]{is: fresh}
		all[key] = f
	}
	f.edges += weight
	f.connections += weight * float64(connections)
	f.handshakes += weight * float64(handshakes)
	return f.is
}

func whole(x float64) int64 { return int64(math.Round(x)) }

// sorted are the findings by key.
func sorted[T any](all map[string]*finding[T]) []*finding[T] {
	found := make([]*finding[T], 0, len(all))
	for _, key := range slices.Sorted(maps.Keys(all)) {
		found = append(found, all[key])
	}
	return found
}

// summary is what a sample of edges says.
type summary struct {
	answered  int32
	unknown   map[string]*finding[resealv1.ImpactUnknown]
	refused   map[string]*finding[resealv1.ImpactViolation]
	pools     map[string]*finding[resealv1.PoolImpact]
	listeners map[string]*finding[resealv1.ListenerImpact]
}

// summarize makes one answer of those of the edges.
func (s *sample) summarize(reports []*resealv1.EdgeImpact) *resealv1.PreviewChangeResponse {
	slices.SortFunc(reports, func(a, b *resealv1.EdgeImpact) int { return cmp.Compare(a.GetEdge(), b.GetEdge()) })
	all := &summary{
		unknown: map[string]*finding[resealv1.ImpactUnknown]{}, refused: map[string]*finding[resealv1.ImpactViolation]{},
		pools: map[string]*finding[resealv1.PoolImpact]{}, listeners: map[string]*finding[resealv1.ListenerImpact]{},
	}
	weights := s.weights(reports)
	for _, report := range reports {
		all.add(report, weights[report.GetEdge()])
	}
	response := all.response()
	response.Edges, response.Asked = int32(s.edges), int32(len(s.asked))
	return response
}

// add takes what an edge says, which stands for as many as its weight.
func (s *summary) add(report *resealv1.EdgeImpact, weight float64) {
	if why := report.GetUnknown(); why != "" {
		is := note(s.unknown, why, &resealv1.ImpactUnknown{Reason: why}, 1, 0, 0)
		is.Names = someNames(is.Names, report.GetEdge())
		return
	}
	s.answered++
	for _, violation := range report.GetViolations() {
		is := note(s.refused, violation.Text(), &resealv1.ImpactViolation{Violation: violation}, weight, 0, 0)
		is.Names = someNames(is.Names, report.GetEdge())
	}
	for _, pool := range report.GetPools() {
		key := fmt.Sprint(pool.GetName(), "\x00", pool.GetRemoved(), pool.GetChanges())
		note(s.pools, key, &resealv1.PoolImpact{Name: pool.GetName(), Removed: pool.GetRemoved(), Changes: pool.GetChanges()},
			weight, pool.GetConnections(), pool.GetFullHandshakes())
	}
	for _, l := range report.GetListeners() {
		key := fmt.Sprint(l.GetName(), "\x00", l.GetAction(), l.GetAddress())
		note(s.listeners, key, &resealv1.ListenerImpact{Name: l.GetName(), Action: l.GetAction(), Address: l.GetAddress()}, weight, l.GetConnections(), 0)
	}
}

// response says all of it.
func (s *summary) response() *resealv1.PreviewChangeResponse {
	response := &resealv1.PreviewChangeResponse{Answered: s.answered}
	for _, f := range sorted(s.pools) {
		f.is.Edges, f.is.Connections, f.is.FullHandshakes = int32(whole(f.edges)), whole(f.connections), whole(f.handshakes)
		response.Pools = append(response.Pools, f.is)
		response.Connections += f.is.Connections
		response.FullHandshakes += f.is.FullHandshakes
	}
	for _, f := range sorted(s.listeners) {
		f.is.Edges, f.is.Connections = int32(whole(f.edges)), whole(f.connections)
		response.Listeners = append(response.Listeners, f.is)
		response.Connections += f.is.Connections
	}
	for _, f := range sorted(s.refused) { // by their texts
		f.is.Edges = int32(whole(f.edges))
		response.Violations = append(response.Violations, f.is)
	}
	slices.SortStableFunc(response.Violations, func(a, b *resealv1.ImpactViolation) int { return cmp.Compare(b.GetEdges(), a.GetEdges()) })
	for _, f := range sorted(s.unknown) {
		f.is.Edges = int32(whole(f.edges))
		response.Unknown = append(response.Unknown, f.is)
	}
	return response
}

func someNames(names []string, name string) []string {
	if len(names) < maxNames {
		names = append(names, name)
	}
	return names
}
