package backend

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// updateServers are three servers: number i fails the health check /sick/i, and
// all answer with their number.
func updateServers(t *testing.T, gate *concurrency) []*server {
	var all []*server
	for i := range 3 {
		all = append(all, serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == fmt.Sprint("/sick/", i) {
				w.WriteHeader(500)
				return
			}
			if r.URL.Path == "/hold" {
				gate.hold(r.Context())
			}
			io.WriteString(w, fmt.Sprint(i))
		})))
	}
	return all
}

// concurrency counts how many requests are held at a time.
type concurrency struct {
	mu   sync.Mutex
	now  int
	most int
}

func (c *concurrency) hold(ctx context.Context) {
	c.mu.Lock()
	c.now++
	c.most = max(c.most, c.now)
	c.mu.Unlock()
	select {
	case <-time.After(20 * time.Millisecond):
	case <-ctx.Done():
	}
	c.mu.Lock()
	c.now--
	c.mu.Unlock()
}

// drawSpec draws a pool of some of the servers, and the numbers of those that
// are to get requests, by weight.
func drawSpec(rt *rapid.T, servers []*server, spec *resealv1.BackendPool) map[string]int {
	spec.Endpoints, spec.Dns, spec.HealthCheck, spec.OutlierDetection = nil, nil, nil, nil
	weights := map[string]int{}
	if rapid.IntRange(0, 3).Draw(rt, "dns") == 0 {
		i := rapid.IntRange(0, 2).Draw(rt, "server")
		spec.Dns = &resealv1.DNSEndpoints{
			Name: fmt.Sprintf("server%d.test", i), Port: uint32(netip.MustParseAddrPort(servers[i].addr).Port()),
		}
		weights[fmt.Sprint(i)] = 1
	} else {
		for i, s := range servers {
			weight := rapid.Uint32Range(0, 3).Draw(rt, "weight")
			if rapid.Bool().Draw(rt, "used") || len(weights) == 0 && i == 2 {
				spec.Endpoints = append(spec.Endpoints, &resealv1.Endpoint{Address: s.addr, Weight: &weight})
				weights[fmt.Sprint(i)] = int(weight)
			}
		}
	}
	if sick := rapid.IntRange(-1, 3).Draw(rt, "sick"); sick >= 0 {
		spec.HealthCheck = &resealv1.HealthCheck{
			Path: fmt.Sprint("/sick/", sick), UnhealthyThreshold: 1, HealthyThreshold: 1,
			Interval: dur(rapid.SampledFrom([]time.Duration{2 * time.Millisecond, 5 * time.Millisecond}).Draw(rt, "interval")),
		}
		healthy := maps.Clone(weights)
		delete(healthy, fmt.Sprint(sick))
		if slices.Max(append(slices.Collect(maps.Values(healthy)), 0)) > 0 {
			weights = healthy // otherwise a sick one is better than none
		}
	}
	maps.DeleteFunc(weights, func(_ string, weight int) bool { return weight == 0 })
	spec.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
	spec.Connections.MaxPerEndpoint = rapid.Uint32Range(1, 3).Draw(rt, "maxPerEndpoint")
	spec.Connections.MaxIdlePerEndpoint = rapid.Uint32Range(1, 3).Draw(rt, "maxIdlePerEndpoint")
	return weights
}

// However a pool came to its configuration, it behaves as one that had it from
// the start.
func TestUpdateIsAsGoodAsNew(t *testing.T) {
	gate := &concurrency{}
	servers := updateServers(t, gate)
	resolve := func(_ context.Context, name string) ([]netip.Addr, error) {
		time.Sleep(time.Millisecond)
		return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
	}
	rapid.Check(t, func(rt *rapid.T) {
		x := newBench(t, nil)
		defer x.stop()
		x.b.cfg.Resolve = resolve
		for range rapid.IntRange(1, 3).Draw(rt, "updates") {
			weights := drawSpec(rt, servers, x.spec)
			x.apply("identity")
			if rapid.Bool().Draw(rt, "hurry") {
				continue
			}
			total := 0
			for _, weight := range weights {
				total += weight
			}
			deadline := time.Now().Add(10 * time.Second)
			for right := 0; right < 3; { // times in a row
				got := x.spread(rt, total)
				right++
				if !maps.Equal(got, weights) {
					right = 0
				}
				if right == 0 && time.Now().After(deadline) {
					rt.Fatalf("of %d requests endpoints got %v, want %v", total, got, weights)
				}
			}
			x.wantConcurrency(rt, gate, int(x.spec.Connections.MaxPerEndpoint), len(weights))
		}
	})
}

// spread makes requests, one after the other, and says who answered how many. A
// pool without an endpoint that has a weight answers none.
func (x *bench) spread(rt *rapid.T, requests int) map[string]int {
	got := map[string]int{}
	for range requests {
		_, body, err := x.try(newRequest(x.t, "GET", "/", nil), nil)
		if err != nil {
			rt.Fatal(err)
		}
		got[string(body)]++
	}
	return got
}

func (x *bench) wantConcurrency(rt *rapid.T, gate *concurrency, each, endpoints int) {
	if endpoints == 0 {
		if _, _, err := x.try(newRequest(x.t, "GET", "/", nil), nil); reasonOf(err) != ReasonNoEndpoint {
			rt.Fatalf("a pool whose endpoints have no weight: %v", err)
		}
		return
	}
	gate.mu.Lock()
	gate.most = 0
	gate.mu.Unlock()
	var all sync.WaitGroup
	for range 3*endpoints + 2 {
		all.Go(func() {
			if _, _, err := x.try(newRequest(x.t, "GET", "/hold", nil), nil); err != nil {
				rt.Errorf("held request: %v", err)
			}
		})
	}
	all.Wait()
	gate.mu.Lock()
	defer gate.mu.Unlock()
	if gate.most > each*endpoints {
		rt.Fatalf("%d requests at a time at %d endpoints with maxPerEndpoint %d", gate.most, endpoints, each)
	}
}

// Without its health check an endpoint is as good as any.
func TestHealthCheckRemoved(t *testing.T) {
	servers := updateServers(t, &concurrency{})
	x := newBench(t, []string{servers[0].addr, servers[1].addr}, func(p *resealv1.BackendPool) {
		p.HealthCheck = &resealv1.HealthCheck{Path: "/sick/0", Interval: dur(5 * time.Millisecond), UnhealthyThreshold: 1}
	})
	e := x.current("p").state.Load().endpoints[servers[0].addr]
	eventually(t, "the endpoint is unhealthy", func() bool { return e.pool.state.Load().view.Unhealthy(e.Endpoint) })
	x.set(func(p *resealv1.BackendPool) {
		p.HealthCheck = nil
		p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
	})
	used := map[string]int{}
	for range 10 {
		used[x.get("/")]++
	}
	if used["0"] != 5 {
		t.Errorf("of 10 requests endpoints got %v", used)
	}
}

// The answer of a look-up that was under way when the endpoints became static is
// worth nothing.
func TestLateLookUpChangesNothing(t *testing.T) {
	servers := updateServers(t, &concurrency{})
	x := newBench(t, nil)
	asked, release := make(chan struct{}), make(chan struct{})
	var lookUps atomic.Int64
	x.b.cfg.Resolve = func(context.Context, string) ([]netip.Addr, error) {
		if lookUps.Add(1) == 1 {
			close(asked)
			<-release
		}
		return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
	}
	x.spec.Dns = &resealv1.DNSEndpoints{Name: "late.test", Port: 1}
	x.apply("identity")
	<-asked
	x.spec.Dns, x.spec.Endpoints = nil, []*resealv1.Endpoint{{Address: servers[1].addr}}
	x.apply("identity")
	close(release)
	for range 20 {
		if got := x.get("/"); got != "1" {
			t.Fatalf("%q answered", got)
		}
		time.Sleep(time.Millisecond)
	}
}

// A pool that asks for another name keeps serving from its old addresses until the
// answer is there, and no longer.
func TestAnotherName(t *testing.T) {
	servers := updateServers(t, &concurrency{})
	port := func(i int) uint32 { return uint32(netip.MustParseAddrPort(servers[i].addr).Port()) }
	x := newBench(t, []string{servers[0].addr})
	asked, answer := make(chan struct{}, 100), make(chan error)
	x.b.cfg.Resolve = func(ctx context.Context, name string) ([]netip.Addr, error) {
		asked <- struct{}{}
		select {
		case err := <-answer:
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	x.spec.Endpoints, x.spec.Dns = nil, &resealv1.DNSEndpoints{Name: "first.test", Port: port(1)}
	x.apply("identity")
	<-asked
	if got := x.get("/"); got != "0" {
		t.Errorf("%q answered during the look-up", got)
	}
	answer <- nil
	eventually(t, "the answer is used", func() bool { return x.get("/") == "1" })
	x.spec.Dns = &resealv1.DNSEndpoints{Name: "second.test", Port: port(2)}
	x.apply("identity")
	answer <- &net.DNSError{Err: "no such host", Name: "second.test"}
	eventually(t, "nobody is asked for another name's sake", func() bool {
		_, _, err := x.try(newRequest(t, "GET", "/", nil), nil)
		return reasonOf(err) == ReasonNoEndpoint
	})
	answer <- nil
	eventually(t, "the second answer is used", func() bool {
		_, body, _ := x.try(newRequest(t, "GET", "/", nil), nil)
		return string(body) == "2"
	})
}

// Ejections hold by the present configuration.
func TestEjectionsFollowConfiguration(t *testing.T) {
	var all []string
	var sick atomic.Bool
	sick.Store(true)
	for range 4 {
		all = append(all, serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if sick.Load() {
				w.WriteHeader(503)
			}
		})).addr)
	}
	one, percent := uint32(1), uint32(100)
	x := newBench(t, all, func(p *resealv1.BackendPool) {
		p.OutlierDetection = &resealv1.OutlierDetection{ConsecutiveErrors: &one, MaxEjectionPercent: &percent, EjectionTime: dur(time.Hour)}
	})
	for range 20 {
		x.do(newRequest(t, "GET", "/", nil), nil)
	}
	sick.Store(false)
	out := func() int {
		n, s := 0, x.current("p").state.Load()
		for _, e := range s.view.Endpoints() {
			if s.view.Ejected(e, time.Now()) {
				n++
			}
		}
		return n
	}
	if out() != 3 {
		t.Fatalf("%d of 4 endpoints are out, want all but one", out())
	}
	for _, step := range []struct {
		what string
		set  option
		want int
	}{
		{"nothing", func(*resealv1.BackendPool) {}, 3},
		{"another bound", func(p *resealv1.BackendPool) { p.OutlierDetection.MaxEjectionPercent = proto.Uint32(50) }, 2},
		{"a shorter time", func(p *resealv1.BackendPool) { p.OutlierDetection.EjectionTime = dur(time.Nanosecond) }, 0},
		{"the time again", func(p *resealv1.BackendPool) { p.OutlierDetection.EjectionTime = dur(time.Hour) }, 0},
	} {
		x.set(step.set)
		if out() != step.want {
			t.Errorf("after a change of %s %d endpoints are out, want %d", step.what, out(), step.want)
		}
	}
}
