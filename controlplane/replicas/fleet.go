package replicas

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Services are what the fleet's services need.
type Services struct {
	// Fleet and Tally answer for the edges that are connected to this replica.
	// Required.
	Fleet resealv1.FleetServiceServer
	Tally TallyServer
	// FromReplica tells whether a call comes from another replica. Required.
	FromReplica func(context.Context) bool
	// Store is what this replica knows of the store. Nil: nothing.
	Store func() *resealv1.StoreStatus
	// Preview finds out what changes would do. Without it no change is previewed.
	Preview Preview
	// Orders keeps what operators order edges. Required.
	Orders Orders
	// Rollout answers for the rollout, whichever replica carries it out. Nil: there is
	// none to answer for.
	Rollout Rollout
}

// TallyServer is the TallyService of one replica.
type TallyServer interface {
	resealv1.TallyServiceServer
	// Watch is WatchStats with what get says.
	Watch(
		request *resealv1.WatchStatsRequest, stream grpc.ServerStreamingServer[resealv1.WatchStatsResponse],
		get func(context.Context, *resealv1.GetStatsRequest) (*resealv1.GetStatsResponse, error),
	) error
}

// Fleet is the FleetService of all replicas. Questions of other replicas are for
// this one's edges alone.
type Fleet struct {
	resealv1.UnimplementedFleetServiceServer

	group *Group
	Services
}

// NewFleet makes a Fleet.
func NewFleet(group *Group, services Services) *Fleet {
	return &Fleet{group: group, Services: services}
}

// own are the edges of this replica.
func (f *Fleet) own(ctx context.Context, request *resealv1.ListEdgesRequest) ([]*resealv1.Edge, error) {
	list, err := f.Fleet.ListEdges(ctx, request)
	if err != nil {
		return nil, err
	}
	f.group.sign(list.GetEdges())
	return list.GetEdges(), nil
}

// sign says of edges that they are connected here.
func (g *Group) sign(edges []*resealv1.Edge) {
	for _, edge := range edges {
		edge.Replica = g.config.ID
	}
}

// ListEdges implements resealv1.FleetServiceServer.
func (f *Fleet) ListEdges(ctx context.Context, request *resealv1.ListEdgesRequest) (*resealv1.ListEdgesResponse, error) {
	own, err := f.own(ctx, request)
	if err != nil || f.FromReplica(ctx) {
		return &resealv1.ListEdgesResponse{Edges: own}, err
	}
	answers := ask(ctx, f.group, func(ctx context.Context, conn grpc.ClientConnInterface) (*resealv1.ListEdgesResponse, error) {
		return resealv1.NewFleetServiceClient(conn).ListEdges(ctx, request)
	})
	lists := [][]*resealv1.Edge{own}
	for _, a := range answers {
		if a.err != nil && !silent(a.err) {
			return nil, a.err
		}
		lists = append(lists, a.said.GetEdges())
	}
	return &resealv1.ListEdgesResponse{Edges: mergeEdges(lists), Unanswered: unanswered(f.group, answers)}, nil
}

// Labels are those of the live edges, as far as the replicas answer.
func (f *Fleet) Labels(ctx context.Context) []map[string]string {
	list, err := f.ListEdges(ctx, &resealv1.ListEdgesRequest{})
	if err != nil {
		f.group.config.Logger.Warn("the live edges are not known", "error", err)
	}
	labels := make([]map[string]string, 0, len(list.GetEdges()))
	for _, edge := range list.GetEdges() {
		labels = append(labels, edge.GetLabels())
	}
	return labels
}

// mergeEdges makes one list of those of several replicas, sorted by id. An edge
// that moved is known to more than one: the one that has it, or had it last, counts.
func mergeEdges(lists [][]*resealv1.Edge) []*resealv1.Edge {
	byID := map[string]*resealv1.Edge{}
	for _, list := range lists {
		for _, edge := range list {
			if before := byID[edge.GetId()]; before == nil || fresher(edge, before) {
				byID[edge.GetId()] = edge
			}
		}
	}
	return slices.SortedFunc(maps.Values(byID), func(a, b *resealv1.Edge) int { return cmp.Compare(a.GetId(), b.GetId()) })
}

// fresher tells whether a is newer than b.
func fresher(a, b *resealv1.Edge) bool {
	switch gone := a.GetDisconnectedAt() != nil; {
	case gone != (b.GetDisconnectedAt() != nil):
		return !gone
	case gone:
		return a.GetDisconnectedAt().AsTime().After(b.GetDisconnectedAt().AsTime())
	}
	return a.GetConnectedAt().AsTime().After(b.GetConnectedAt().AsTime())
}

// ListReplicas implements resealv1.FleetServiceServer.
func (f *Fleet) ListReplicas(ctx context.Context, request *resealv1.ListReplicasRequest) (*resealv1.ListReplicasResponse, error) {
	response := &resealv1.ListReplicasResponse{AnsweredBy: f.group.config.ID}
	own := f.group.describe()
	if f.Store != nil {
		response.Store = f.Store()
		own.Problem = response.Store.GetProblem()
	}
	response.Replicas = []*resealv1.Replica{own}
	if f.FromReplica(ctx) {
		return response, nil
	}
	for _, a := range ask(ctx, f.group, func(ctx context.Context, conn grpc.ClientConnInterface) (*resealv1.ListReplicasResponse, error) {
		return resealv1.NewFleetServiceClient(conn).ListReplicas(ctx, request)
	}) {
		if a.err == nil && len(a.said.GetReplicas()) == 1 && a.said.GetReplicas()[0].GetId() == a.replica {
			response.Replicas = append(response.Replicas, a.said.GetReplicas()[0])
		} else if a.err != nil {
			response.Replicas = append(response.Replicas, f.group.remember(a.replica, a.err))
		}
	}
	slices.SortFunc(response.Replicas, func(a, b *resealv1.Replica) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return response, nil
}

// describe is this replica.
func (g *Group) describe() *resealv1.Replica {
	edges := g.config.Edges()
	g.mu.Lock()
	defer g.mu.Unlock()
	own := g.self.message()
	own.Edges = int32(edges)
	return own
}

// remember is what a replica that does not answer said last.
func (g *Group) remember(id string, err error) *resealv1.Replica {
	why := g.missing(id, err)
	g.mu.Lock()
	defer g.mu.Unlock()
	replica := &resealv1.Replica{Id: id}
	if p := g.peers[id]; p != nil {
		replica = p.said.message()
	}
	replica.State, replica.Problem = resealv1.Replica_STATE_UNANSWERED, why.GetReason()
	return replica
}

func (r *record) message() *resealv1.Replica {
	state := resealv1.Replica_STATE_SERVING
	if r.Leaving {
		state = resealv1.Replica_STATE_LEAVING
	}
	return &resealv1.Replica{
		Id: r.ID, Address: r.Address, Version: r.Version, StartedAt: timestamppb.New(r.StartedAt),
		Edges: int32(r.Edges), State: state,
	}
}

// errHere means that an edge is connected to this replica.
var errHere = errors.New("the edge is connected to this replica")

// holder finds the replica that an edge is connected to, for a call. It is errHere
// when that is this one; NOT_FOUND when no replica has it; and UNAVAILABLE when one
// that did not answer may have it.
func (f *Fleet) holder(ctx context.Context, id string) (*peer, error) {
	list, err := f.ListEdges(ctx, &resealv1.ListEdgesRequest{Id: id})
	if err != nil {
		return nil, err
	}
	for _, edge := range list.GetEdges() {
		switch {
		case edge.GetDisconnectedAt() != nil:
		case edge.GetReplica() == f.group.config.ID:
			return nil, errHere
		default:
			peers, _ := f.group.others()
			if i := slices.IndexFunc(peers, func(p *peer) bool { return p.id == edge.GetReplica() }); i >= 0 {
				return peers[i], nil
			}
		}
	}
	if missing := list.GetUnanswered(); len(missing) > 0 {
		return nil, notReached(id, missing)
	}
	return nil, status.Errorf(codes.NotFound, "edge %q: the edge is not connected", id)
}

// notReached is the error for an edge that only replicas may have which did not answer.
func notReached(edge string, missing []*resealv1.UnansweredReplica) error {
	var parts []string
	for _, m := range missing {
		parts = append(parts, fmt.Sprintf("replica %s did not: %s", m.GetId(), m.GetReason()))
	}
	return status.Errorf(codes.Unavailable, "edge %q is connected to no replica that answers; %s", edge, strings.Join(parts, "; "))
}

// ProbeBackend implements resealv1.FleetServiceServer.
func (f *Fleet) ProbeBackend(ctx context.Context, request *resealv1.ProbeBackendRequest) (*resealv1.ProbeBackendResponse, error) {
	if f.FromReplica(ctx) || request.GetEdge() == "" {
		return f.Fleet.ProbeBackend(ctx, request)
	}
	switch holder, err := f.holder(ctx, request.GetEdge()); {
	case status.Code(err) == codes.NotFound, errors.Is(err, errHere):
		return f.Fleet.ProbeBackend(ctx, request) // which also checks the order
	case err != nil:
		return nil, err
	default:
		return resealv1.NewFleetServiceClient(holder.conn).ProbeBackend(ctx, request)
	}
}

// ListFailures implements resealv1.FleetServiceServer.
func (f *Fleet) ListFailures(ctx context.Context, request *resealv1.ListFailuresRequest) (*resealv1.ListFailuresResponse, error) {
	if f.FromReplica(ctx) {
		return f.Fleet.ListFailures(ctx, request)
	}
	own := func(ctx context.Context) (*resealv1.ListFailuresResponse, error) {
		return f.Fleet.ListFailures(ctx, request)
	}
	here, answers := askAll(ctx, f.group, own, func(ctx context.Context, conn grpc.ClientConnInterface) (*resealv1.ListFailuresResponse, error) {
		return resealv1.NewFleetServiceClient(conn).ListFailures(ctx, request)
	})
	merged := &resealv1.ListFailuresResponse{Unanswered: unanswered(f.group, answers)}
	found := false
	for _, a := range append(answers, here) {
		switch {
		case a.err == nil:
			found = true
			merged.Failures = append(merged.Failures, a.said.GetFailures()...)
			merged.SilentEdges = append(merged.SilentEdges, a.said.GetSilentEdges()...)
		case status.Code(a.err) != codes.NotFound && !silent(a.err):
			return nil, a.err
		}
	}
	if !found && len(merged.GetUnanswered()) > 0 {
		return nil, notReached(request.GetEdge(), merged.GetUnanswered())
	}
	if !found {
		return nil, here.err
	}
	merged.Failures = request.Newest(merged.Failures)
	slices.Sort(merged.SilentEdges)
	return merged, nil
}
