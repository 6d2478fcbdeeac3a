package feed

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	edgefeed "github.com/reseal/reseal/edge/feed"
	"github.com/reseal/reseal/edge/observe"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// startSeeing starts an edge whose requests can be observed, or with a nil os one of a
// version that knows nothing of that.
func startSeeing(t *testing.T, p *plane, id string, os *observe.Observers) (stop func()) {
	t.Helper()
	conn := p.dial(id)
	config := edgefeed.Config{
		Edge: id, BootID: "boot", Client: resealv1.NewFeedServiceClient(conn), State: newDisk(), Logger: testLogger(),
		Apply: func(context.Context, edgefeed.Candidate) edgefeed.Outcome { return edgefeed.Outcome{} },
	}
	if os != nil {
		config.Observe = func(ctx context.Context, order *resealv1.ObserveOrder) error {
			return os.Follow(ctx, resealv1.NewObservationServiceClient(conn), order)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	feed := edgefeed.New(config)
	go func() { ended <- feed.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("edge %s ended with %v", id, err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func outcome(pool, path string) *exchange.Outcome {
	return &exchange.Outcome{Ended: time.Now(), Pool: pool, Path: path, Status: 200, Exchange: &exchange.Exchange{}}
}

// watcher is a caller of ObserveRequests.
type watcher struct {
	grpc.ServerStream
	ctx     context.Context
	end     func() error
	held    chan struct{} // Send waits until it is closed, nil: it does not
	mu      sync.Mutex
	seen    []string
	matched uint64
	dropped uint64
	fleets  []string
}

func (w *watcher) Context() context.Context { return w.ctx }

func (w *watcher) Send(response *resealv1.ObserveRequestsResponse) error {
	if w.held != nil {
		select {
		case <-w.held:
		case <-w.ctx.Done():
			return w.ctx.Err()
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range response.GetRequests() {
		w.seen = append(w.seen, r.GetEdge()+" "+r.GetPath())
	}
	w.matched, w.dropped = response.GetMatched(), response.GetDropped()
	if f := response.GetFleet(); f != nil {
		w.fleets = append(w.fleets, fmt.Sprintf("%d%v", f.GetEdges(), f.GetSilentEdges()))
	}
	return nil
}

func watch(t *testing.T, p *plane, request *resealv1.ObserveRequestsRequest, held chan struct{}) *watcher {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &watcher{ctx: ctx, held: held}
	ended := make(chan error, 1)
	go func() { ended <- p.server.ObserveRequests(request, w) }()
	w.end = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() { _ = w.end() })
	return w
}

func (w *watcher) check(t *testing.T, seen []string, matched, dropped uint64, fleets ...string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	slices.Sort(w.seen)
	if !slices.Equal(w.seen, seen) || w.matched != matched || w.dropped != dropped || !slices.Equal(w.fleets, fleets) {
		t.Errorf("saw %q, %d matched, %d dropped, of %q; want %q, %d, %d, of %q", w.seen, w.matched, w.dropped, w.fleets, seen, matched, dropped, fleets)
	}
}

// TestObserve: what edges see that fits is passed on, with their names; edges that come
// take part, those that don't answer are named; and all end with the call.
func TestObserve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		a, b, later := observe.New("a"), observe.New("b"), observe.New("later")
		startSeeing(t, p, "a", a)
		startSeeing(t, p, "b", b)
		startSeeing(t, p, "old", nil)
		settle(time.Second)
		if a.Watching() {
			t.Error("somebody watches before anybody asked")
		}
		w := watch(t, p, &resealv1.ObserveRequestsRequest{Filter: &resealv1.RequestFilter{Pool: "app"}}, nil)
		settle(100 * time.Millisecond)
		if !a.Watching() || !b.Watching() {
			t.Fatal("not all edges are watched")
		}
		a.See(outcome("app", "/one\x1b[2J"))
		a.See(outcome("other", "/no"))
		b.See(outcome("app", "/two"))
		settle(1500 * time.Millisecond)
		w.check(t, []string{`a /one\x1b[2J`, "b /two"}, 2, 0, "2[old]")

		stop := startSeeing(t, p, "later", later)
		settle(2 * time.Second)
		later.See(outcome("app", "/three"))
		settle(time.Second)
		w.check(t, []string{`a /one\x1b[2J`, "b /two", "later /three"}, 3, 0, "2[old]", "3[old]")
		stop()
		settle(2 * time.Second)
		if later.Watching() {
			t.Error("an edge is watched whose stream has ended")
		}
		// The leases are renewed.
		settle(5 * time.Minute)
		a.See(outcome("app", "/four"))
		settle(time.Second)
		w.check(t, []string{"a /four", `a /one\x1b[2J`, "b /two", "later /three"}, 4, 0, "2[old]", "3[old]", "2[old]")
		if err := w.end(); status.Code(err) != codes.Canceled {
			t.Error(err)
		}
		synctest.Wait()
		if a.Watching() || b.Watching() {
			t.Error("edges are watched after the end of the call")
		}
	})
}

// TestObserveOneEdge: one edge alone, which may come back; it sees again what comes then.
func TestObserveOneEdge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		a, b := observe.New("a"), observe.New("b")
		stop := startSeeing(t, p, "a", a)
		startSeeing(t, p, "b", b)
		settle(time.Second)
		w := watch(t, p, &resealv1.ObserveRequestsRequest{Edge: "a"}, nil)
		settle(time.Second)
		if b.Watching() {
			t.Error("an edge is watched that is not meant")
		}
		a.See(outcome("app", "/before"))
		settle(time.Second)
		stop()
		settle(2 * time.Second)
		again := observe.New("a")
		startSeeing(t, p, "a", again)
		settle(2 * time.Second)
		again.See(outcome("app", "/after"))
		settle(time.Second)
		w.check(t, []string{"a /after", "a /before"}, 2, 0, "1[]", "0[]", "1[]")
	})
}

// TestSlowObserver: a caller who takes nothing holds up nobody. What has no room is
// counted, and what is kept for it is bounded.
func TestSlowObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		a := observe.New("a")
		startSeeing(t, p, "a", a)
		settle(time.Second)
		held := make(chan struct{})
		w := watch(t, p, &resealv1.ObserveRequestsRequest{}, held)
		settle(time.Second)
		const seconds, rate = 60, 100
		for range seconds {
			for range rate {
				a.See(outcome("app", "/"))
			}
			settle(time.Second)
		}
		if !a.Watching() {
			t.Error("the edge is not watched any more")
		}
		for _, o := range p.server.observations.all {
			if len(o.waiting) > maxWaiting {
				t.Errorf("%d requests wait", len(o.waiting))
			}
		}
		close(held)
		settle(2 * time.Second)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.matched != seconds*rate || w.matched != w.dropped+uint64(len(w.seen)) || len(w.seen) < maxWaiting || len(w.seen) > maxWaiting+2*edgeRate {
			t.Errorf("%d matched, %d dropped, %d seen", w.matched, w.dropped, len(w.seen))
		}
	})
}

// TestObservations: there is a bound, and a place that is free again.
func TestObservations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		var all []*watcher
		for range maxObservations {
			all = append(all, watch(t, p, &resealv1.ObserveRequestsRequest{}, nil))
		}
		synctest.Wait()
		if err := p.server.ObserveRequests(&resealv1.ObserveRequestsRequest{}, &watcher{ctx: t.Context()}); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("one too many got %v", err)
		}
		_ = all[0].end()
		last := watch(t, p, &resealv1.ObserveRequestsRequest{}, nil)
		settle(time.Second)
		last.check(t, nil, 0, 0, "0[]")
		p.stop()
		if err := last.end(); status.Code(err) != codes.Unavailable {
			t.Errorf("after the server's end: %v", err)
		}
	})
}

// TestObserveContract: what an edge may not do in its conversation.
func TestObserveContract(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		a := observe.New("a")
		startSeeing(t, p, "a", a)
		settle(time.Second)
		w := watch(t, p, &resealv1.ObserveRequestsRequest{}, nil)
		settle(time.Second)
		start := func(edge string, id uint64) *resealv1.ObserveRequest {
			return &resealv1.ObserveRequest{Message: &resealv1.ObserveRequest_Start{Start: &resealv1.ObserveStart{Edge: edge, Id: id}}}
		}
		report := func(r *resealv1.ObserveReport) *resealv1.ObserveRequest {
			return &resealv1.ObserveRequest{Message: &resealv1.ObserveRequest_Report{Report: r}}
		}
		for _, test := range []struct {
			name string
			say  []*resealv1.ObserveRequest
			code codes.Code
		}{
			{"another edge's name", []*resealv1.ObserveRequest{start("b", 1)}, codes.PermissionDenied},
			{"no such order", []*resealv1.ObserveRequest{start("a", 7)}, codes.NotFound},
			{"a report first", []*resealv1.ObserveRequest{report(&resealv1.ObserveReport{})}, codes.InvalidArgument},
			{"two starts", []*resealv1.ObserveRequest{start("a", 1), start("a", 1)}, codes.InvalidArgument},
			{"nothing", nil, codes.DeadlineExceeded},
			{"counts that go back", []*resealv1.ObserveRequest{
				start("a", 1), report(&resealv1.ObserveReport{Matched: 2}), report(&resealv1.ObserveReport{Matched: 1}),
			}, codes.InvalidArgument},
			{"too many requests", []*resealv1.ObserveRequest{
				start("a", 1), report(&resealv1.ObserveReport{Requests: make([]*resealv1.ObservedRequest, maxObserved+1)}),
			}, codes.InvalidArgument},
		} {
			stream, err := resealv1.NewObservationServiceClient(p.dial("a")).Observe(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, message := range test.say {
				_ = stream.Send(message) // Recv says why it fails
			}
			for err == nil {
				_, err = stream.Recv()
			}
			if status.Code(err) != test.code {
				t.Errorf("%s: got %v, want %s", test.name, err, test.code)
			}
		}
		// The edge itself was superseded, and is asked again.
		settle(2 * renewInterval)
		a.See(outcome("app", "/still"))
		settle(time.Second)
		w.mu.Lock()
		defer w.mu.Unlock()
		if !slices.Contains(w.seen, "a /still") {
			t.Errorf("saw %q", w.seen)
		}
	})
}

func TestCheckFilter(t *testing.T) {
	many := make([]*resealv1.StatusRange, maxAlternatives+1)
	for i, test := range []struct {
		filter *resealv1.RequestFilter
		ok     bool
	}{
		{nil, true},
		{&resealv1.RequestFilter{Sample: 1, Statuses: []*resealv1.StatusRange{{First: 500, Last: 599}, {}}, SlowerThan: durationpb.New(time.Second)}, true},
		{&resealv1.RequestFilter{Sample: 1.5}, false},
		{&resealv1.RequestFilter{Sample: -1}, false},
		{&resealv1.RequestFilter{Sample: math.NaN()}, false},
		{&resealv1.RequestFilter{SlowerThan: durationpb.New(-1)}, false},
		{&resealv1.RequestFilter{Statuses: []*resealv1.StatusRange{{First: 500, Last: 499}}}, false},
		{&resealv1.RequestFilter{Statuses: many}, false},
		{&resealv1.RequestFilter{Reasons: make([]string, maxAlternatives+1)}, false},
		{&resealv1.RequestFilter{Misses: make([]resealv1.MissReason, 2*maxAlternatives+1)}, false},
		{&resealv1.RequestFilter{PathPrefix: string(make([]byte, maxFilter))}, false},
	} {
		if err := checkFilter(test.filter); (err == nil) != test.ok || err != nil && status.Code(err) != codes.InvalidArgument {
			t.Errorf("%d: %v", i, err)
		}
	}
}

// However many edges there are, all together tell of a bounded number.
func TestPace(t *testing.T) {
	for n, want := range map[int]time.Duration{0: 20 * time.Millisecond, 40: 20 * time.Millisecond, 400: 200 * time.Millisecond, 10_000: 5 * time.Second} {
		if got := pace(n); got != want {
			t.Errorf("of %d edges: %s, want %s", n, got, want)
		}
	}
}
