package main

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// fakeEdges are one edge that serves the newest revision and one that refused
// it.
func fakeEdges() []*resealv1.Edge {
	pool := &resealv1.ResourceRef{Kind: "BackendPool", Name: "jetty"}
	return []*resealv1.Edge{
		{
			Id: "edge-1", Labels: map[string]string{"zone": "eu", "tier": "front"}, Version: "v0.1.0", BootId: "b1",
			Address: "10.0.0.1:4711", State: resealv1.Edge_STATE_SYNCED, AckedRevision: 7, TargetRevision: 7,
			StartedAt: timestamppb.New(fakeEpoch), ConnectedAt: timestamppb.New(fakeEpoch.Add(time.Second)),
			Resources: 4, ResourcesSent: 5, Convergence: durationpb.New(12 * time.Millisecond),
		},
		{
			Id: "edge-2", Labels: map[string]string{"zone": "us"}, Version: "v0.1.0", BootId: "b2",
			Address: "10.0.0.2:4711", State: resealv1.Edge_STATE_REFUSED, AckedRevision: 6, TargetRevision: 7,
			StartedAt: timestamppb.New(fakeEpoch), ConnectedAt: timestamppb.New(fakeEpoch.Add(time.Second)), Resources: 4,
			Nack: &resealv1.Nack{Revision: 7, ServingRevision: 6, Violations: []*resealv1.Violation{
				{Resource: pool, Field: "spec.tls.trust.caFile", Description: "no such file"},
				{Resource: pool, Description: "second reason"},
			}},
		},
	}
}

func fakeStats() *resealv1.GetStatsResponse {
	jetty := &resealv1.Stats{
		Name: "jetty", Requests: 1000, Errors: map[string]uint64{"connect_failure": 2, "reset": 1},
		Handshakes:  &resealv1.Handshakes{Full: 3, ResumedSessionId: 90, ResumedTicket: 7, Failed: 1},
		Misses:      map[string]uint64{"no_session": 1, "declined": 2},
		Connections: &resealv1.ConnectionStats{Opened: 100, Reused: 900, Active: 4, Idle: 6},
		Closes:      map[string]uint64{"close_notify_both": 88, "timeout": 2}, ClosesBy: map[string]uint64{"us": 89, "peer": 1},
	}
	web := &resealv1.Stats{
		Name: "web", Requests: 1000, Handshakes: &resealv1.Handshakes{Full: 10, ResumedPsk: 30},
		Misses:      map[string]uint64{"not_offered": 7, "key_unknown": 2, "expired": 1},
		Connections: &resealv1.ConnectionStats{Opened: 40, Reused: 960},
		Epochs: []*resealv1.EpochStats{
			{Misses: map[string]uint64{"key_unknown": 1}},
			{Keyring: "default", Epoch: 11, Resumed: 10, Misses: map[string]uint64{"expired": 1}},
			{Keyring: "default", Epoch: 12, Resumed: 20},
			{Keyring: "default", Epoch: 13, Misses: map[string]uint64{"key_unknown": 1}},
		},
	}
	return &resealv1.GetStatsResponse{
		Pools: []*resealv1.Stats{jetty}, Listeners: []*resealv1.Stats{web},
		Edges: []*resealv1.EdgeStats{
			{Edge: "edge-1", Pools: []*resealv1.Stats{jetty}, Listeners: []*resealv1.Stats{web}},
			{Edge: "edge-2", Stale: true},
		},
		StaleEdges: []string{"edge-2"}, Time: timestamppb.New(fakeEpoch),
	}
}

func (f *fakeServer) selectedEdges(labels map[string]string, id string) []*resealv1.Edge {
	var found []*resealv1.Edge
	for _, e := range f.edges {
		if hasLabels(e.GetLabels(), labels) && (id == "" || id == e.GetId()) {
			found = append(found, proto.CloneOf(e))
		}
	}
	return found
}

func (f *fakeServer) ListEdges(_ context.Context, req *resealv1.ListEdgesRequest) (*resealv1.ListEdgesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &resealv1.ListEdgesResponse{Edges: f.selectedEdges(req.GetMatchLabels(), req.GetId()), Unanswered: f.unanswered}, nil
}

func (f *fakeServer) WatchEdges(req *resealv1.WatchEdgesRequest, stream grpc.ServerStreamingServer[resealv1.WatchEdgesResponse]) error {
	return f.watch(stream.Context(), func() error {
		return stream.Send(&resealv1.WatchEdgesResponse{Edges: f.selectedEdges(req.GetMatchLabels(), "")})
	})
}

// ListReplicas knows itself, and c2 which may not answer.
func (f *fakeServer) ListReplicas(context.Context, *resealv1.ListReplicasRequest) (*resealv1.ListReplicasResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	two := &resealv1.Replica{
		Id: "c2", Address: "10.1.0.2:7443", Version: "v0.1.0", StartedAt: timestamppb.New(fakeEpoch), Edges: 1, State: resealv1.Replica_STATE_SERVING,
	}
	for _, r := range f.unanswered {
		two.State, two.Problem = resealv1.Replica_STATE_UNANSWERED, r.GetReason()
	}
	return &resealv1.ListReplicasResponse{
		AnsweredBy: "c1", Store: &resealv1.StoreStatus{SizeBytes: 1700 << 20, UsedBytes: 3 << 20, QuotaBytes: 2 << 30, Problem: "the store is 83% full"},
		Replicas: []*resealv1.Replica{
			{Id: "c1", Address: "10.1.0.1:7443", Version: "v0.1.0", StartedAt: timestamppb.New(fakeEpoch), Edges: 1, State: resealv1.Replica_STATE_SERVING, Problem: "the store is 83% full"},
			two,
		},
	}, nil
}

// DrainEdge takes edge-1's clients away at once; edge-2 keeps its own.
func (f *fakeServer) ListFailures(_ context.Context, req *resealv1.ListFailuresRequest) (*resealv1.ListFailuresResponse, error) {
	response := &resealv1.ListFailuresResponse{SilentEdges: []string{"edge-3"}}
	for i, failure := range []*resealv1.Failure{
		{
			Edge: "edge-1", RequestId: "r-1", Listener: "web", Route: "all", Pool: "jetty", Endpoint: "10.0.0.9:443", Status: 502, Reason: "reset",
			Blame: resealv1.Failure_BLAME_BACKEND, Miss: resealv1.MissReason_MISS_REASON_NO_SESSION, Attempts: 2,
			Method: "GET", Host: "app.test", Path: "/a", Error: "connection reset",
		},
		{Edge: "edge-2", Listener: "raw", Pool: "smtp", Blame: resealv1.Failure_BLAME_EDGE, Reason: "drain_timeout", Host: "mail.test", Reused: true},
	} {
		failure.Time, failure.Duration = timestamppb.New(fakeEpoch.Add(time.Duration(i)*time.Second)), durationpb.New(1500*time.Millisecond)
		if (req.GetPool() == "" || req.GetPool() == failure.GetPool()) && (req.GetEdge() == "" || req.GetEdge() == failure.GetEdge()) {
			response.Failures = append(response.Failures, failure)
		}
	}
	return response, nil
}

func (f *fakeServer) DrainEdge(_ context.Context, req *resealv1.DrainEdgeRequest) (*resealv1.DrainEdgeResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.edges {
		if e.GetId() != req.GetId() {
			continue
		}
		e.Draining, e.State = !req.GetUndo(), resealv1.Edge_STATE_SYNCED
		if e.Draining {
			e.State = resealv1.Edge_STATE_DRAINING
		}
		f.notify()
		return &resealv1.DrainEdgeResponse{Told: true}, nil
	}
	return nil, status.Errorf(codes.NotFound, "edge %q is not connected", req.GetId())
}

// GetStats counts its calls as requests, so that there are rates to show.
func (f *fakeServer) GetStats(_ context.Context, req *resealv1.GetStatsRequest) (*resealv1.GetStatsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if req.GetSince().AsDuration() > time.Hour {
		return nil, status.Error(codes.InvalidArgument, "since is more than 1h")
	}
	stats := proto.CloneOf(f.stats)
	for _, s := range stats.Pools {
		s.Requests += uint64(f.samples) * 1000
	}
	f.samples++
	if since := req.GetSince().AsDuration(); since > 0 {
		// edge-1 has reported for 5 minutes, edge-2 for longer.
		stats.Time = timestamppb.New(fakeEpoch.Add(time.Hour))
		for _, e := range stats.Edges {
			e.WindowStart = timestamppb.New(stats.Time.AsTime().Add(-since))
			if e.GetEdge() == "edge-1" {
				e.WindowStart = timestamppb.New(stats.Time.AsTime().Add(-min(since, 5*time.Minute)))
			}
		}
	}
	other := func(s *resealv1.Stats) bool { return req.GetName() != "" && s.GetName() != req.GetName() }
	stats.Unanswered = f.unanswered
	stats.Pools = slices.DeleteFunc(stats.Pools, other)
	stats.Listeners = slices.DeleteFunc(stats.Listeners, other)
	stats.Edges = slices.DeleteFunc(stats.Edges, func(e *resealv1.EdgeStats) bool {
		return req.GetEdge() != "" && e.GetEdge() != req.GetEdge()
	})
	return stats, nil
}

func (f *fakeServer) WatchStats(req *resealv1.WatchStatsRequest, stream grpc.ServerStreamingServer[resealv1.WatchStatsResponse]) error {
	return f.watch(stream.Context(), func() error {
		return stream.Send(&resealv1.WatchStatsResponse{Stats: proto.CloneOf(f.stats)})
	})
}

func (f *fakeServer) CreateToken(ctx context.Context, req *resealv1.CreateTokenRequest) (*resealv1.CreateTokenResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if req.GetId() == "bad id" {
		return nil, refuse([]*resealv1.Violation{{Resource: &resealv1.ResourceRef{Kind: "Edge", Name: req.GetId()}, Description: "an id has no spaces"}})
	}
	who, _ := callerOf(ctx)
	token := &resealv1.JoinToken{
		TokenId: "t" + string(rune('1'+len(f.tokens))), Edge: req.GetId(), Labels: req.GetLabels(), CreatedBy: who.String(),
		CreatedAt: timestamppb.New(fakeEpoch), ExpiresAt: timestamppb.New(time.Now().Add(req.GetTtl().AsDuration() + 30*time.Second)),
		UsesLeft: req.GetUses(),
	}
	f.tokens = append(f.tokens, token)
	return &resealv1.CreateTokenResponse{Token: "hash." + token.GetTokenId() + ".secret", Info: token}, nil
}

func (f *fakeServer) ListTokens(context.Context, *resealv1.ListTokensRequest) (*resealv1.ListTokensResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &resealv1.ListTokensResponse{Tokens: slices.Clone(f.tokens)}, nil
}

func (f *fakeServer) RevokeToken(_ context.Context, req *resealv1.RevokeTokenRequest) (*resealv1.RevokeTokenResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := len(f.tokens)
	f.tokens = slices.DeleteFunc(f.tokens, func(t *resealv1.JoinToken) bool { return t.GetTokenId() == req.GetTokenId() })
	if len(f.tokens) == before {
		return nil, status.Error(codes.NotFound, "no such token")
	}
	return &resealv1.RevokeTokenResponse{}, nil
}
