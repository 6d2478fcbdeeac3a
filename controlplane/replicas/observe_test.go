package replicas

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// local is the FleetService of one replica. What is put into say is what it observes.
type local struct {
	resealv1.UnimplementedFleetServiceServer
	say chan *resealv1.ObserveRequestsResponse
	err chan error
}

func (l *local) ObserveRequests(_ *resealv1.ObserveRequestsRequest, stream grpc.ServerStreamingServer[resealv1.ObserveRequestsResponse]) error {
	for {
		select {
		case said := <-l.say:
			if err := stream.Send(said); err != nil {
				return err
			}
		case err := <-l.err:
			return err
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

func (l *local) ListEdges(_ context.Context, request *resealv1.ListEdgesRequest) (*resealv1.ListEdgesResponse, error) {
	if request.GetId() != "e1" {
		return &resealv1.ListEdgesResponse{}, nil
	}
	return &resealv1.ListEdgesResponse{Edges: []*resealv1.Edge{{Id: "e1"}}}, nil
}

// caller takes what is observed.
type caller struct {
	grpc.ServerStream
	ctx  context.Context
	mu   sync.Mutex
	last string
}

func (c *caller) Context() context.Context { return c.ctx }

func (c *caller) Send(r *resealv1.ObserveRequestsResponse) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = fmt.Sprint(len(r.GetRequests()), " of ", r.GetMatched(), ", ", r.GetDropped(), " dropped")
	if f := r.GetFleet(); f != nil {
		c.last += fmt.Sprint("; ", f.GetEdges(), " edges, silent ", f.GetSilentEdges(), ",")
		for _, u := range f.GetUnanswered() {
			c.last += " no " + u.GetId()
		}
	}
	return nil
}

func (c *caller) check(t *testing.T, want string) {
	t.Helper()
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last != want {
		t.Errorf("got %q, want %q", c.last, want)
	}
}

func fleetOf(edges int32, silent ...string) *resealv1.ObservedFleet {
	return &resealv1.ObservedFleet{Edges: edges, SilentEdges: silent}
}

// TestObserveAll: what all replicas observe is one stream, with one sum, also when one of
// them begins anew, is gone, or does not answer.
func TestObserveAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		g := newGroup(t, &strings.Builder{})
		// The others talk by the test, not by a connection.
		g.peers["b"], g.peers["c"] = &peer{id: "b"}, &peer{id: "c"}
		defer clear(g.peers)
		o := &observing{fleet: &Fleet{group: g}, news: make(chan observed), sources: map[string]*source{
			"a": {}, "b": {peer: g.peers["b"], end: func() {}}, "c": {peer: g.peers["c"], end: func() {}},
		}}
		c := &caller{ctx: ctx}
		ended, failed := make(chan error, 1), make(chan error)
		go func() { ended <- o.run(ctx, c, failed) }()
		say := func(replica string, requests int, matched, dropped uint64, fleet *resealv1.ObservedFleet) {
			_ = o.tell(ctx, observed{replica: replica, said: &resealv1.ObserveRequestsResponse{
				Requests: make([]*resealv1.ObservedRequest, requests), Matched: matched, Dropped: dropped, Fleet: fleet,
			}})
		}
		say("a", 1, 2, 1, fleetOf(1, "z"))
		c.check(t, "1 of 2, 1 dropped")
		say("b", 0, 0, 0, fleetOf(2, "y"))
		c.check(t, "0 of 2, 1 dropped")
		time.Sleep(askTimeout)
		c.check(t, "0 of 2, 1 dropped; 3 edges, silent [y z], no c")
		say("c", 3, 10, 0, fleetOf(1))
		c.check(t, "3 of 12, 1 dropped; 4 edges, silent [y z],")
		_ = o.tell(ctx, observed{replica: "c", err: status.Error(codes.Unavailable, "connection reset")})
		c.check(t, "0 of 12, 1 dropped; 3 edges, silent [y z], no c")
		say("c", 1, 1, 0, fleetOf(1))
		c.check(t, "1 of 13, 1 dropped; 4 edges, silent [y z],")
		g.mu.Lock()
		delete(g.peers, "b")
		close(g.changed)
		g.changed = make(chan struct{})
		g.mu.Unlock()
		c.check(t, "0 of 13, 1 dropped; 2 edges, silent [z],")
		say("a", 0, 3, 1, nil)
		c.check(t, "0 of 14, 1 dropped")
		say("b", 5, 5, 5, nil) // it comes too late
		c.check(t, "0 of 14, 1 dropped")
		failed <- status.Error(codes.Unavailable, "this replica is stopping")
		if err := <-ended; status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
	})
}

// TestObserveHere: the call ends with what this replica says, or with the caller; an edge
// must be connected somewhere.
func TestObserveHere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &local{say: make(chan *resealv1.ObserveRequestsResponse), err: make(chan error)}
		f := NewFleet(newGroup(t, &strings.Builder{}), Services{Fleet: l, FromReplica: func(context.Context) bool { return false }})
		ctx, cancel := context.WithCancel(t.Context())
		c := &caller{ctx: ctx}
		ended := make(chan error, 1)
		begin := func(edge string) {
			go func() { ended <- f.ObserveRequests(&resealv1.ObserveRequestsRequest{Edge: edge}, c) }()
		}
		begin("e1")
		l.say <- &resealv1.ObserveRequestsResponse{Matched: 7, Fleet: fleetOf(1)}
		c.check(t, "0 of 7, 0 dropped; 1 edges, silent [],")
		l.err <- status.Error(codes.InvalidArgument, "filter.sample: no")
		if err := <-ended; status.Code(err) != codes.InvalidArgument {
			t.Error(err)
		}
		begin("nobody")
		if err := <-ended; status.Code(err) != codes.NotFound {
			t.Error(err)
		}
		begin("")
		synctest.Wait()
		cancel()
		if err := <-ended; status.Code(err) != codes.Canceled {
			t.Error(err)
		}
	})
}
