package replicas

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func at(seconds int) *timestamppb.Timestamp {
	return timestamppb.New(time.Unix(int64(1000+seconds), 0))
}

// TestMergeEdges: an edge that moved stands once, where it is.
func TestMergeEdges(t *testing.T) {
	here := []*resealv1.Edge{
		{Id: "moved", Replica: "a", ConnectedAt: at(1), DisconnectedAt: at(5)},
		{Id: "back", Replica: "a", ConnectedAt: at(9)},
		{Id: "gone", Replica: "a", ConnectedAt: at(1), DisconnectedAt: at(2)},
	}
	there := []*resealv1.Edge{
		{Id: "back", Replica: "b", ConnectedAt: at(1)},
		{Id: "gone", Replica: "b", ConnectedAt: at(3), DisconnectedAt: at(4)},
		{Id: "moved", Replica: "b", ConnectedAt: at(4)},
		{Id: "other", Replica: "b", ConnectedAt: at(4)},
	}
	for _, lists := range [][][]*resealv1.Edge{{here, there}, {there, nil, here}} {
		got := map[string]string{}
		var ids []string
		for _, edge := range mergeEdges(lists) {
			ids = append(ids, edge.GetId())
			got[edge.GetId()] = edge.GetReplica()
		}
		if diff := cmp.Diff([]string{"back", "gone", "moved", "other"}, ids); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(map[string]string{"back": "a", "gone": "b", "moved": "b", "other": "b"}, got); diff != "" {
			t.Error(diff)
		}
	}
}

func counted(edge string, second int, stale bool, requests uint64) *resealv1.EdgeStats {
	return &resealv1.EdgeStats{Edge: edge, Time: at(second), Stale: stale, Pools: []*resealv1.Stats{{
		Name: "app", Requests: requests, Misses: map[string]uint64{"no_session": requests},
		Handshakes: &resealv1.Handshakes{Full: requests}, Connections: &resealv1.ConnectionStats{Active: int64(requests)},
		Epochs: []*resealv1.EpochStats{{Keyring: "k", Epoch: requests, Resumed: 1}},
	}}}
}

// TestMergeStats: each edge counts once, by its newest report.
func TestMergeStats(t *testing.T) {
	got := mergeStats([]*resealv1.GetStatsResponse{
		{Edges: []*resealv1.EdgeStats{counted("a", 9, true, 1), counted("b", 3, false, 10)}},
		{Edges: []*resealv1.EdgeStats{counted("a", 8, false, 100), counted("b", 2, false, 1000), counted("c", 1, true, 10)}},
	})
	got.Time = nil
	want := &resealv1.GetStatsResponse{
		Edges:      []*resealv1.EdgeStats{counted("a", 8, false, 100), counted("b", 3, false, 10), counted("c", 1, true, 10)},
		StaleEdges: []string{"c"},
		Pools: []*resealv1.Stats{{
			Name: "app", Requests: 120, Misses: map[string]uint64{"no_session": 120},
			Handshakes: &resealv1.Handshakes{Full: 120}, Connections: &resealv1.ConnectionStats{Active: 120},
			Epochs: []*resealv1.EpochStats{{Keyring: "k", Epoch: 10, Resumed: 2}, {Keyring: "k", Epoch: 100, Resumed: 1}},
		}},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestReason(t *testing.T) {
	for want, err := range map[string]error{
		"connection refused":                   status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:27033: connect: connection refused"`),
		"the connection broke":                 status.Error(codes.Unavailable, "error reading from server: EOF"),
		"no answer within 2s":                  status.FromContextError(context.DeadlineExceeded).Err(),
		"this replica is stopping":             status.Error(codes.Unavailable, "this replica is stopping"),
		"replica/r may not call ListEdges (a)": status.Error(codes.PermissionDenied, "replica/r may not call ListEdges (a)"),
	} {
		if got := reason(err); got != want {
			t.Errorf("%v: %q, want %q", err, got, want)
		}
		if !silent(err) {
			t.Errorf("%v is an answer", err)
		}
	}
	for _, err := range []error{nil, status.Error(codes.NotFound, ""), status.Error(codes.InvalidArgument, ""), errors.New("x")} {
		if silent(err) {
			t.Errorf("%v is no answer", err)
		}
	}
}
