package backend

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestHealthChecks(t *testing.T) {
	for proto, start := range map[string]func(http.Handler) *server{
		"h1": func(h http.Handler) *server { return serve(t, h) },
		"h2": func(h http.Handler) *server { return serveH2(t, h) },
	} {
		t.Run(proto, func(t *testing.T) {
			var sick atomic.Bool
			handler := func(me string) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/health" && sick.Load() && me == "a" {
						w.WriteHeader(500)
						return
					}
					io.WriteString(w, me)
				})
			}
			a, b := start(handler("a")), start(handler("b"))
			x := newBench(t, []string{a.addr, b.addr}, func(p *resealv1.BackendPool) {
				p.HealthCheck = &resealv1.HealthCheck{Path: "/health", Interval: dur(10 * time.Millisecond), UnhealthyThreshold: 2}
				p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
			})
			first := x.current("p").state.Load().endpoints[a.addr]
			unhealthy := func() bool { return first.pool.state.Load().view.Unhealthy(first.Endpoint) }
			sick.Store(true)
			eventually(t, "a is unhealthy", unhealthy)
			for range 6 {
				if got := x.get("/"); got != "b" {
					t.Fatalf("an unhealthy endpoint was used")
				}
			}
			// With b gone a is the last one, and used however it is.
			x.set(func(p *resealv1.BackendPool) { p.Endpoints = p.Endpoints[:1] })
			if got := x.get("/"); got != "a" {
				t.Fatalf("got %q", got)
			}
			if x.current("p").state.Load().endpoints[a.addr] != first || !unhealthy() {
				t.Error("health was lost in an update")
			}
			sick.Store(false)
			eventually(t, "a is healthy", func() bool { return !unhealthy() })
			x.stop()
			if n := x.tally.requests; n != 7 {
				t.Errorf("%d requests counted, want 7: health checks are none", n)
			}
			if x.tally.full+x.tally.resumed < 4 {
				t.Errorf("health checks' handshakes are not counted")
			}
		})
	}
}

func TestOutlierDetection(t *testing.T) {
	bad := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503) }))
	good := serve(t, site())
	n := uint32(3)
	x := newBench(t, []string{bad.addr, good.addr}, func(p *resealv1.BackendPool) {
		p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
		p.OutlierDetection = &resealv1.OutlierDetection{ConsecutiveErrors: &n, EjectionTime: dur(time.Hour)}
	})
	codes := map[int]int{}
	for range 20 {
		resp, _ := x.do(newRequest(t, "GET", "/bytes/1", nil), nil)
		codes[resp.StatusCode]++
	}
	if codes[503] != 3 || codes[200] != 17 {
		t.Errorf("answers %v, want 3 errors before the ejection", codes)
	}
	x.set(func(p *resealv1.BackendPool) {}) // an update keeps it out
	if resp, _ := x.do(newRequest(t, "GET", "/bytes/1", nil), nil); resp.StatusCode != 200 {
		t.Error("the ejection was lost in an update")
	}
	e := x.current("p").state.Load().endpoints[bad.addr]
	if !e.pool.state.Load().view.Available(e.Endpoint, time.Now().Add(time.Hour)) {
		t.Error("the ejection never ends")
	}
}

func TestLastEndpointIsNeverEjected(t *testing.T) {
	bad := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503) }))
	n, all := uint32(1), uint32(100)
	x := newBench(t, []string{bad.addr, closedPort(t)}, func(p *resealv1.BackendPool) {
		p.OutlierDetection = &resealv1.OutlierDetection{ConsecutiveErrors: &n, MaxEjectionPercent: &all}
	})
	for range 20 {
		x.try(newRequest(t, "GET", "/", nil), nil)
		out := 0
		for _, e := range x.current("p").state.Load().endpoints {
			if e.pool.state.Load().view.Ejected(e.Endpoint, time.Now()) {
				out++
			}
		}
		if out > 1 {
			t.Fatal("both endpoints are out")
		}
	}
}

func TestDNSEndpoints(t *testing.T) {
	s := serve(t, site())
	addr := netip.MustParseAddrPort(s.addr)
	var mu sync.Mutex
	answer, failure := []netip.Addr{}, error(nil)
	var asked atomic.Int64
	x := newBench(t, nil)
	x.b.cfg.Resolve = func(_ context.Context, name string) ([]netip.Addr, error) {
		asked.Add(1)
		if name != "backends.test" {
			return nil, errors.New("unknown name")
		}
		mu.Lock()
		defer mu.Unlock()
		return answer, failure
	}
	answer = []netip.Addr{addr.Addr(), addr.Addr()}
	x.spec.Dns = &resealv1.DNSEndpoints{Name: "backends.test", Port: uint32(addr.Port()), RefreshInterval: dur(5 * time.Millisecond)}
	x.apply("identity with dns")
	x.get("/bytes/1") // waits for the first look-up
	mu.Lock()
	answer, failure = nil, errors.New("the resolver is down")
	mu.Unlock()
	n := asked.Load()
	eventually(t, "it asks again", func() bool { return asked.Load() > n+3 })
	x.get("/bytes/1") // the last addresses stay
	mu.Lock()
	answer, failure = []netip.Addr{netip.MustParseAddr("127.0.0.2")}, nil
	mu.Unlock()
	eventually(t, "the new address is used", func() bool {
		all := x.current("p").state.Load().view.Endpoints()
		return len(all) == 1 && strings.HasPrefix(all[0].Address, "127.0.0.2:")
	})
	eventually(t, "the old one's connection is closed", func() bool {
		return x.tally.get(func(c *tally) int { return c.opened - c.closed }) == 0
	})
}
