package feed

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestTakeover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		older := p.hello("e1", &resealv1.Hello{Edge: "e1", BootId: "b1"})
		if _, err := older.Recv(); err != nil {
			t.Fatal(err)
		}
		newer := p.hello("e1", &resealv1.Hello{Edge: "e1", BootId: "b2"})
		if _, err := newer.Recv(); err != nil {
			t.Fatal(err)
		}
		if _, err := older.Recv(); status.Code(err) != codes.Aborted {
			t.Errorf("the older stream ended with %v", err)
		}
		settle(0)
		edges := p.edges()
		if len(edges) != 1 || edges[0].GetBootId() != "b2" || edges[0].GetState() != resealv1.Edge_STATE_SYNCING {
			t.Errorf("listed are %v", edges)
		}
	})
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		state := newDisk()
		n := p.node("e1", nil, state)
		settle(0)
		if _, err := p.server.DrainEdge(t.Context(), &resealv1.DrainEdgeRequest{Id: "e1", Timeout: durationpb.New(5 * time.Second)}); err != nil {
			t.Fatal(err)
		}
		settle(0)
		if edge := p.edge("e1"); edge.GetState() != resealv1.Edge_STATE_DRAINING || !edge.GetDraining() {
			t.Errorf("listed as %v", edge)
		}
		n.stop()
		settle(10 * time.Second)
		if _, err := p.server.DrainEdge(t.Context(), &resealv1.DrainEdgeRequest{Id: "e1"}); status.Code(err) != codes.NotFound {
			t.Errorf("drain of an edge that left: %v", err)
		}
		again := p.node("e1", nil, state)
		settle(0)
		if _, err := p.server.DrainEdge(t.Context(), &resealv1.DrainEdgeRequest{Id: "e1", Undo: true}); err != nil {
			t.Fatal(err)
		}
		settle(0)
		if diff := cmp.Diff([]string{"true 5s"}, n.drained); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{"true 5s", "false 0s"}, again.drained); diff != "" {
			t.Error(diff)
		}
		if got := p.edge("e1").GetState(); got != resealv1.Edge_STATE_SYNCED {
			t.Error(got)
		}
		for _, bad := range []*resealv1.DrainEdgeRequest{{}, {Id: "e1", Timeout: durationpb.New(-time.Second)}} {
			if _, err := p.server.DrainEdge(t.Context(), bad); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%v: %v", bad, err)
			}
		}
	})
}

func TestLiveFor30Seconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		n := p.node("e1", nil, newDisk())
		settle(0)
		n.stop()
		settle(29 * time.Second)
		if got := p.server.Live(); !slices.Equal(got, []string{"e1"}) || p.edge("e1").GetState() != resealv1.Edge_STATE_DISCONNECTED {
			t.Errorf("live after 29s: %v", got)
		}
		settle(2 * time.Second)
		if got := p.server.Live(); len(got) != 0 || len(p.server.table.edges) != 0 {
			t.Errorf("live after 31s: %v", got)
		}
	})
}

func TestWatchEdges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		p.node("e1", map[string]string{"site": "a"}, newDisk())
		p.node("e2", nil, newDisk())
		settle(time.Second)
		stream, err := resealv1.NewFleetServiceClient(p.dial("")).WatchEdges(t.Context(), &resealv1.WatchEdgesRequest{MatchLabels: map[string]string{"site": "a"}})
		if err != nil {
			t.Fatal(err)
		}
		lists := make(chan *resealv1.WatchEdgesResponse, 100)
		go func() {
			defer close(lists)
			for {
				list, err := stream.Recv()
				if err != nil {
					return
				}
				lists <- list
			}
		}()
		settle(0)
		first := <-lists
		if len(first.GetEdges()) != 1 || first.GetEdges()[0].GetId() != "e1" {
			t.Errorf("the first list is %v", first)
		}
		settle(10 * time.Second)
		if len(lists) != 0 {
			t.Error("a list came though nothing changed")
		}
		// 50 changes in 5 s are at most 11 lists, and the last says it all.
		for i := range 50 {
			s.apply(many(pool("app", fmt.Sprint("a:", i))))
			settle(100 * time.Millisecond)
		}
		settle(time.Second)
		if n := len(lists); n < 8 || n > 11 {
			t.Errorf("%d lists for 50 changes in 5s", n)
		}
		var last *resealv1.WatchEdgesResponse
		for len(lists) > 0 {
			last = <-lists
		}
		if got := last.GetEdges()[0]; got.GetAckedRevision() != 51 || got.GetState() != resealv1.Edge_STATE_SYNCED {
			t.Errorf("the last list is %v", last)
		}
		p.stop()
	})
}

func TestListEdgesFilters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		for _, id := range []string{"c", "a", "b"} {
			p.node(id, map[string]string{"first": fmt.Sprint(id == "a")}, newDisk())
		}
		settle(0)
		for _, test := range []struct {
			request *resealv1.ListEdgesRequest
			want    []string
		}{
			{&resealv1.ListEdgesRequest{}, []string{"a", "b", "c"}},
			{&resealv1.ListEdgesRequest{Id: "b"}, []string{"b"}},
			{&resealv1.ListEdgesRequest{Id: "x"}, nil},
			{&resealv1.ListEdgesRequest{MatchLabels: map[string]string{"first": "true"}}, []string{"a"}},
		} {
			response, err := p.server.ListEdges(t.Context(), test.request)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, edge := range response.GetEdges() {
				got = append(got, edge.GetId())
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("%v: %s", test.request, diff)
			}
		}
	})
}
