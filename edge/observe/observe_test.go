package observe

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func outcome() *exchange.Outcome {
	return &exchange.Outcome{
		Ended: time.Now(), Duration: 300 * time.Millisecond, Listener: "web", Route: "all", Pool: "app", Protocol: "HTTP/2.0",
		Method: "GET", Host: "App.test:8443", Name: "app.test", Path: "/shop/cart", Status: 503, Reason: "no_endpoint",
		Blame: resealv1.Failure_BLAME_EDGE, Err: errors.New(strings.Repeat("e", 2*maxTold)), In: 1, Out: 2,
		ClientMiss: resealv1.MissReason_MISS_REASON_NOT_OFFERED,
		Exchange:   &exchange.Exchange{Endpoint: "10.0.0.1:443", First: true, Resumed: true, TLSVersion: 0x304, Attempts: 2, Connect: time.Millisecond},
	}
}

func TestFilter(t *testing.T) {
	type filter = resealv1.RequestFilter
	full := outcome()
	full.Exchange.Resumed, full.Exchange.Miss = false, resealv1.MissReason_MISS_REASON_DECLINED
	reused := outcome()
	reused.Exchange.Reused, reused.Exchange.First = true, false
	// A connection that is reused came from a full handshake once: this request did not pay for it.
	reused.Exchange.Resumed, reused.Exchange.Miss = false, resealv1.MissReason_MISS_REASON_DECLINED
	refused := outcome()
	refused.Exchange = &exchange.Exchange{First: true}
	misses := func(reasons ...resealv1.MissReason) []resealv1.MissReason { return reasons }
	for i, test := range []struct {
		filter *filter
		o      *exchange.Outcome
		want   bool
	}{
		{nil, outcome(), true},
		{&filter{}, refused, true},
		{&filter{Pool: "app", Listener: "web", Route: "all", Host: "app.test", PathPrefix: "/shop/"}, outcome(), true},
		{&filter{Pool: "ap"}, outcome(), false},
		{&filter{Listener: "other"}, outcome(), false},
		{&filter{Route: "none"}, outcome(), false},
		{&filter{Host: "App.test:8443"}, outcome(), false},
		{&filter{PathPrefix: "/shops"}, outcome(), false},
		{&filter{Statuses: []*resealv1.StatusRange{{First: 200, Last: 299}, {First: 503, Last: 503}}}, outcome(), true},
		{&filter{Statuses: []*resealv1.StatusRange{{First: 500, Last: 502}, {First: 504, Last: 599}}}, outcome(), false},
		{&filter{Reasons: []string{"reset", "no_endpoint"}}, outcome(), true},
		{&filter{Reasons: []string{"reset"}}, outcome(), false},
		{&filter{SlowerThan: durationpb.New(300 * time.Millisecond)}, outcome(), true},
		{&filter{SlowerThan: durationpb.New(301 * time.Millisecond)}, outcome(), false},
		{&filter{Session: resealv1.RequestFilter_SESSION_RESUMED}, outcome(), true},
		{&filter{Session: resealv1.RequestFilter_SESSION_FULL}, outcome(), false},
		{&filter{Session: resealv1.RequestFilter_SESSION_FULL}, full, true},
		{&filter{Session: resealv1.RequestFilter_SESSION_FULL}, reused, false},
		{&filter{Session: resealv1.RequestFilter_SESSION_REUSED}, reused, true},
		{&filter{Session: resealv1.RequestFilter_SESSION_REUSED}, outcome(), false},
		{&filter{Session: resealv1.RequestFilter_SESSION_FULL}, refused, false},
		{&filter{Misses: misses(resealv1.MissReason_MISS_REASON_EXPIRED, resealv1.MissReason_MISS_REASON_DECLINED)}, full, true},
		{&filter{Misses: misses(resealv1.MissReason_MISS_REASON_EXPIRED)}, full, false},
		{&filter{Misses: misses(resealv1.MissReason_MISS_REASON_DECLINED)}, reused, false},
		{&filter{Side: resealv1.RequestFilter_SIDE_FRONTEND, Session: resealv1.RequestFilter_SESSION_FULL}, outcome(), true},
		{&filter{Side: resealv1.RequestFilter_SIDE_FRONTEND, Session: resealv1.RequestFilter_SESSION_FULL}, refused, true},
		{&filter{Side: resealv1.RequestFilter_SIDE_FRONTEND, Misses: misses(resealv1.MissReason_MISS_REASON_NOT_OFFERED)}, outcome(), true},
		{&filter{Side: resealv1.RequestFilter_SIDE_FRONTEND, Session: resealv1.RequestFilter_SESSION_REUSED}, reused, true},
		{&filter{Side: resealv1.RequestFilter_SIDE_FRONTEND, Session: resealv1.RequestFilter_SESSION_RESUMED}, outcome(), false},
	} {
		if got := fits(test.filter, test.o); got != test.want {
			t.Errorf("%d: %v fits %v", i, test.filter, got)
		}
	}
}

// All that is told, with texts that are bounded and are copies.
func TestObserved(t *testing.T) {
	r := observed(outcome())
	if r.GetListener() != "web" || r.GetRoute() != "all" || r.GetPool() != "app" || r.GetEndpoint() != "10.0.0.1:443" || r.GetProtocol() != "HTTP/2.0" ||
		r.GetMethod() != "GET" || r.GetHost() != "App.test:8443" || r.GetPath() != "/shop/cart" || r.GetStatus() != 503 || r.GetReason() != "no_endpoint" ||
		r.GetBlame() != resealv1.Failure_BLAME_EDGE || r.GetDuration().AsDuration() != 300*time.Millisecond || r.GetAttempts() != 2 ||
		r.GetConnect().AsDuration() != time.Millisecond || r.GetBytesIn() != 1 || r.GetBytesOut() != 2 || r.GetTime().AsTime().IsZero() {
		t.Errorf("told %v", r)
	}
	if len(r.GetError()) > maxTold {
		t.Errorf("an error of %d bytes", len(r.GetError()))
	}
	if f, b := r.GetFrontend(), r.GetBackend(); f.GetReused() || f.GetResumed() || f.GetMiss() != resealv1.MissReason_MISS_REASON_NOT_OFFERED ||
		b.GetReused() || !b.GetResumed() || b.GetMiss() != resealv1.MissReason_MISS_REASON_UNSPECIFIED {
		t.Errorf("connections: %v", r)
	}
	o := outcome()
	o.Exchange = &exchange.Exchange{}
	if r := observed(o); r.Backend != nil || r.Connect != nil {
		t.Errorf("without a backend: %v", r)
	}
}

// What comes faster than the pace is counted and left out; what was saved may come at
// once; nothing is kept but for the next report.
func TestPace(t *testing.T) {
	for _, test := range []struct {
		pace         time.Duration
		burst, after int // in one moment, and a second later
	}{
		{0, 50, 50},
		{time.Millisecond, 50, 50},
		{100 * time.Millisecond, 10, 10},
		{5 * time.Second, 1, 0},
	} {
		o := newObservation(&resealv1.ObserveOrder{Pace: durationpb.New(test.pace)})
		now := time.Now()
		at := func(moment time.Time) int {
			for range 100 {
				out := outcome()
				out.Ended = moment
				o.see(out)
			}
			return len(o.report().GetRequests())
		}
		if got := at(now); got != test.burst {
			t.Errorf("%s: %d at once, want %d", test.pace, got, test.burst)
		}
		if got := at(now.Add(time.Second)); got != test.after {
			t.Errorf("%s: %d a second later, want %d", test.pace, got, test.after)
		}
		if r := o.report(); r.GetMatched() != 200 || r.GetDropped() != uint64(200-test.burst-test.after) {
			t.Errorf("%s: %v", test.pace, r)
		}
	}
}

// While a report can't be sent, no more waits for the next than one may hold.
func TestUnsent(t *testing.T) {
	o := newObservation(nil)
	now := time.Now()
	for i := range 1000 {
		out := outcome()
		out.Ended = now.Add(time.Duration(i) * time.Second)
		o.see(out)
	}
	if r := o.report(); len(r.GetRequests()) != maxSaved || r.GetMatched() != 1000 || r.GetDropped() != 1000-maxSaved {
		t.Errorf("%d wait, %d matched, %d dropped", len(r.GetRequests()), r.GetMatched(), r.GetDropped())
	}
}

// The sample is of what fits, and is no loss.
func TestSample(t *testing.T) {
	o := newObservation(&resealv1.ObserveOrder{Filter: &resealv1.RequestFilter{Sample: 0.1}})
	now := time.Now()
	shown := 0
	for i := range 10_000 {
		out := outcome()
		out.Ended = now.Add(time.Duration(i) * time.Second)
		o.see(out)
		shown += len(o.report().GetRequests())
	}
	if r := o.report(); shown < 800 || shown > 1200 || r.GetMatched() != 10_000 || r.GetDropped() != 0 {
		t.Errorf("%d of %d shown, %d dropped", shown, r.GetMatched(), r.GetDropped())
	}
}

// controlPlane is a stream whose other end is the test's.
type controlPlane struct {
	grpc.ClientStream
	ctx   context.Context
	says  chan error // nil: go on
	heard chan *resealv1.ObserveRequest
}

func newControlPlane() *controlPlane {
	return &controlPlane{says: make(chan error, 10), heard: make(chan *resealv1.ObserveRequest, 100)}
}

func (c *controlPlane) Observe(ctx context.Context, _ ...grpc.CallOption) (grpc.BidiStreamingClient[resealv1.ObserveRequest, resealv1.ObserveResponse], error) {
	c.ctx = ctx
	return c, nil
}

func (c *controlPlane) Send(request *resealv1.ObserveRequest) error {
	select {
	case c.heard <- request:
		return nil
	case <-c.ctx.Done():
		return io.EOF
	}
}

func (c *controlPlane) Recv() (*resealv1.ObserveResponse, error) {
	select {
	case err := <-c.says:
		return &resealv1.ObserveResponse{}, err
	case <-c.ctx.Done():
		return nil, c.ctx.Err()
	}
}

// follow follows an order of a control plane of its own.
func follow(ctx context.Context, os *Observers, order *resealv1.ObserveOrder) (*controlPlane, <-chan error) {
	c, ended := newControlPlane(), make(chan error, 1)
	go func() { ended <- os.Follow(ctx, c, order) }()
	return c, ended
}

// TestFollow: nobody watches before the control plane has agreed, nor after either side
// has ended it, or has not said for a while that it is to go on.
func TestFollow(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(c *controlPlane, cancel func())
		want string
	}{
		{"the control plane ends it", func(c *controlPlane, _ func()) { c.says <- io.EOF }, "EOF"},
		{"the edge's session ends", func(_ *controlPlane, cancel func()) { cancel() }, "context canceled"},
		{"nobody says a word", func(*controlPlane, func()) { time.Sleep(lease) }, errLease.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				os := New("e1")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				c, ended := follow(ctx, os, &resealv1.ObserveOrder{Id: 7})
				if start := (<-c.heard).GetStart(); start.GetEdge() != "e1" || start.GetId() != 7 {
					t.Errorf("it begins with %v", start)
				}
				synctest.Wait()
				if os.Watching() {
					t.Error("it watches before the control plane has agreed")
				}
				c.says <- nil
				synctest.Wait()
				os.See(outcome())
				os.See(outcome())
				if r := (<-c.heard).GetReport(); len(r.GetRequests()) != 2 || r.GetMatched() != 2 {
					t.Errorf("it tells %v", r)
				}
				for range 10 {
					time.Sleep(lease / 2)
					c.says <- nil
				}
				synctest.Wait()
				if !os.Watching() {
					t.Error("it has ended though it is to go on")
				}
				test.end(c, cancel)
				synctest.Wait()
				if os.Watching() {
					t.Error("it still watches")
				}
				if err := <-ended; err == nil || err.Error() != test.want {
					t.Errorf("got %v, want %s", err, test.want)
				}
				if len(c.heard) > 0 {
					t.Errorf("it said without news: %v", <-c.heard)
				}
			})
		})
	}
}

// A report that the connection does not take holds up neither requests nor the end.
func TestStuckConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		os := New("e1")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c, ended := follow(ctx, os, &resealv1.ObserveOrder{})
		<-c.heard
		for range cap(c.heard) {
			c.heard <- nil
		}
		c.says <- nil
		synctest.Wait()
		for range 1000 {
			os.See(outcome())
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
		synctest.Wait()
		if os.Watching() {
			t.Error("it still watches")
		}
		<-ended
	})
}

// Counts are told also when all is left out.
func TestCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		os := New("e1")
		ctx, cancel := context.WithCancel(t.Context())
		c, ended := follow(ctx, os, &resealv1.ObserveOrder{Pace: durationpb.New(time.Minute)})
		<-c.heard
		c.says <- nil
		synctest.Wait()
		for range 3 {
			os.See(outcome())
		}
		if r := (<-c.heard).GetReport(); len(r.GetRequests()) != 1 || r.GetMatched() != 3 || r.GetDropped() != 2 {
			t.Errorf("first: %v", r)
		}
		os.See(outcome())
		for range 3 {
			time.Sleep(lease - time.Second)
			c.says <- nil
		}
		if r := (<-c.heard).GetReport(); len(r.GetRequests()) != 0 || r.GetMatched() != 4 || r.GetDropped() != 3 {
			t.Errorf("then: %v", r)
		}
		cancel()
		<-ended
	})
}

// TestTooMany: there is a bound, and a place that is free again.
func TestTooMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		os := New("e1")
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		first, endFirst := context.WithCancel(ctx)
		for i := range maxObservations {
			of := ctx
			if i == 0 {
				of = first
			}
			c := newControlPlane()
			c.says <- nil
			all.Go(func() { _ = os.Follow(of, c, nil) })
		}
		synctest.Wait()
		c := newControlPlane()
		c.says <- nil
		if err := os.Follow(ctx, c, nil); !errors.Is(err, errTooMany) {
			t.Errorf("one too many got %v", err)
		}
		endFirst()
		synctest.Wait()
		c = newControlPlane()
		c.says <- nil
		all.Go(func() { _ = os.Follow(ctx, c, nil) })
		synctest.Wait()
		os.See(outcome())
		<-c.heard
		if r := (<-c.heard).GetReport(); len(r.GetRequests()) != 1 {
			t.Errorf("the one in its place saw %v", r)
		}
		cancel()
		all.Wait()
		if os.Watching() {
			t.Error("somebody still watches")
		}
	})
}

// While nobody watches, a request costs no memory; while somebody watches others, neither.
func TestCost(t *testing.T) {
	os, o := New("e1"), outcome()
	cost := func() float64 {
		return testing.AllocsPerRun(1000, func() {
			if os.Watching() {
				os.See(o)
			}
		})
	}
	if got := cost(); got > 0 {
		t.Errorf("%g allocations while nobody watches", got)
	}
	other := newObservation(&resealv1.ObserveOrder{Filter: &resealv1.RequestFilter{Pool: "other"}})
	if err := os.add(other); err != nil {
		t.Fatal(err)
	}
	if got := cost(); got > 0 {
		t.Errorf("%g allocations while somebody watches others", got)
	}
}

// Loops see while observers come and go.
func TestConcurrent(t *testing.T) {
	os := New("e1")
	var seeing, coming sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		seeing.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					os.See(outcome())
				}
			}
		})
	}
	for range 4 {
		coming.Go(func() {
			for range 200 {
				o := newObservation(nil)
				if err := os.add(o); err != nil {
					t.Error(err)
				}
				if r := o.report(); len(r.GetRequests()) > maxSaved {
					t.Errorf("%d requests", len(r.GetRequests()))
				}
				os.remove(o)
			}
		})
	}
	coming.Wait()
	close(stop)
	seeing.Wait()
	if os.Watching() {
		t.Error("somebody still watches")
	}
}
