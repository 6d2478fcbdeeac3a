package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// parallel makes n requests at the same time.
func (x *bench) parallel(n int, path string) []error {
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() {
			call := newCall()
			call.Client = uint64(i)
			_, _, errs[i] = x.try(newRequest(x.t, "GET", path, nil), call)
		})
	}
	wg.Wait()
	return errs
}

func wantNone(t testing.TB, errs []error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// gate is a handler that keeps requests until n of them have come.
func gate(n int) http.Handler {
	var wg sync.WaitGroup
	wg.Add(n)
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		wg.Done()
		wg.Wait()
		io.WriteString(w, "ok")
	})
}

func TestConcurrentRequests(t *testing.T) {
	s := serve(t, gate(32))
	x := newBench(t, []string{s.addr})
	wantNone(t, x.parallel(32, "/"))
	if n := s.opened.Load(); n < 32 {
		t.Errorf("%d connections for 32 requests at once", n)
	}
}

func TestMaxPerEndpoint(t *testing.T) {
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { time.Sleep(time.Millisecond) }))
	x := newBench(t, []string{s.addr}, connections(func(c *resealv1.Connections) { c.MaxPerEndpoint = 3 }))
	wantNone(t, x.parallel(40, "/"))
	if n := s.maxOpen.Load(); n > 3 {
		t.Errorf("%d connections at once, want at most 3", n)
	}
}

func TestMaxPending(t *testing.T) {
	release := make(chan struct{})
	s := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	x := newBench(t, []string{s.addr}, connections(func(c *resealv1.Connections) { c.MaxPerEndpoint, c.MaxPending = 1, 2 }))
	done := make(chan []error)
	go func() { done <- x.parallel(10, "/") }()
	eventually(t, "those over the limit are refused", func() bool {
		return x.tally.get(func(c *tally) int { return c.errors[ReasonOverloaded] }) == 7 ||
			x.tally.get(func(c *tally) int { return c.errors[ReasonOverloaded] }) == 8
	})
	close(release)
	for _, err := range <-done {
		if err != nil {
			wantReason(t, err, ReasonOverloaded, 503)
		}
	}
}

// An idle connection of another identity makes room when all slots are taken.
func TestFullHouseOfIdleConnections(t *testing.T) {
	s := serve(t, site(), "a.test", "b.test")
	x := newBench(t, []string{s.addr}, func(p *resealv1.BackendPool) { p.Tls.ServerName = "" },
		connections(func(c *resealv1.Connections) { c.MaxPerEndpoint = 1 }))
	for i := range 6 {
		call := newCall()
		call.ServerName = []string{"a.test", "b.test"}[i%2]
		x.do(newRequest(t, "GET", "/bytes/1", nil), call)
	}
	if n := s.opened.Load(); n != 6 {
		t.Errorf("%d connections, want 6", n)
	}
	if s.maxOpen.Load() > 1 {
		t.Errorf("%d at once", s.maxOpen.Load())
	}
}

func TestIdentitiesNeverShare(t *testing.T) {
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) }),
		"a.test", "b.test")
	x := newBench(t, []string{s.addr}, func(p *resealv1.BackendPool) { p.Tls.ServerName = "" })
	seen := map[string]string{}
	for i := range 10 {
		call := newCall()
		call.ServerName = []string{"a.test", "b.test"}[i%2]
		_, body := x.do(newRequest(t, "GET", "/", nil), call)
		if name, ok := seen[string(body)]; ok && name != call.ServerName {
			t.Fatalf("%s and %s shared a connection", name, call.ServerName)
		}
		seen[string(body)] = call.ServerName
	}
	if len(seen) != 2 {
		t.Errorf("%d connections, want 2", len(seen))
	}
	want := []exchange.Identity{exchange.Identity("identity|" + s.addr + "|a.test"), exchange.Identity("identity|" + s.addr + "|b.test")}
	if got := x.h.identities(); !slices.Equal(got, want) {
		t.Errorf("session identities %q, want %q", got, want)
	}
}

func TestSessionScopeAndMode(t *testing.T) {
	a, b := serve(t, site()), serve(t, site())
	x := newBench(t, []string{a.addr, b.addr}, func(p *resealv1.BackendPool) {
		p.Sessions = &resealv1.Sessions{Scope: resealv1.Sessions_SCOPE_POOL}
		p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
	})
	x.get("/bytes/1")
	x.get("/bytes/1")
	if got := x.h.identities(); !slices.Equal(got, []exchange.Identity{"identity|pool uid|" + testName}) {
		t.Errorf("session identities %q", got)
	}
	x.set(func(p *resealv1.BackendPool) { p.Sessions = &resealv1.Sessions{Mode: resealv1.Sessions_MODE_OFF} })
	if !x.current("p").state.Load().tls.SessionTicketsDisabled {
		t.Error("mode off leaves tickets on")
	}
}

// A pool whose identity changes says so before it makes handshakes with the new
// one; another pool of the same name is a stranger.
func TestIdentityReplaced(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	next := x.pool
	next.Identity = "changed"
	x.b.Update([]exchange.Pool{next})
	x.b.Update([]exchange.Pool{next})
	next.UID, next.Identity = "other", "again"
	x.b.Update([]exchange.Pool{next})
	if got, want := x.h.replaced, []string{"identity changed " + s.addr}; !slices.Equal(got, want) {
		t.Errorf("replaced %q, want %q", got, want)
	}
}

// A pool whose identity changes names its own places, as other pools may have
// had the same identity.
func TestPlacesReplaced(t *testing.T) {
	x := newBench(t, []string{"192.0.2.1:443", "192.0.2.2:443"})
	next := x.pool
	change := func(identity string) {
		t.Helper()
		next.Identity = identity
		x.h.replaced = nil
		x.b.Update([]exchange.Pool{next})
	}
	want := func(replaced string) {
		t.Helper()
		if got := x.h.replaced; !slices.Equal(got, []string{replaced}) {
			t.Errorf("replaced %q, want %q", got, replaced)
		}
	}
	change("two")
	want("identity two 192.0.2.1:443 192.0.2.2:443")

	var answer atomic.Pointer[[]netip.Addr]
	x.b.cfg.Resolve = func(context.Context, string) ([]netip.Addr, error) {
		if found := answer.Load(); found != nil {
			return *found, nil
		}
		return nil, errors.New("the resolver is down")
	}
	next.Spec = proto.CloneOf(next.Spec)
	next.Spec.Endpoints, next.Spec.Dns = nil, &resealv1.DNSEndpoints{
		Name: "backends.test", Port: 443, RefreshInterval: dur(5 * time.Millisecond),
	}
	change("three")
	change("four")
	want("three four 192.0.2.1:443 192.0.2.2:443") // no answer so far
	answer.Store(&[]netip.Addr{netip.MustParseAddr("192.0.2.3")})
	eventually(t, "the answer is used", func() bool { return len(x.current("p").state.Load().endpoints) == 1 })
	change("five")
	want("four five 192.0.2.3:443")

	next.Spec = proto.CloneOf(next.Spec)
	next.Spec.Sessions.Scope = resealv1.Sessions_SCOPE_POOL
	change("six")
	change("seven")
	want("six seven pool uid")
}

func TestReuseModes(t *testing.T) {
	type step struct {
		client uint64
		first  bool
		fresh  bool // must be served by a new connection
	}
	for mode, steps := range map[resealv1.Connections_Reuse][]step{
		resealv1.Connections_REUSE_ALWAYS:     {{1, true, true}, {2, true, false}, {2, false, false}},
		resealv1.Connections_REUSE_AGGRESSIVE: {{1, true, true}, {1, false, false}, {2, true, false}},
		resealv1.Connections_REUSE_SAFE:       {{1, true, true}, {1, false, false}, {2, true, true}, {2, false, false}},
		resealv1.Connections_REUSE_NEVER:      {{1, true, true}, {1, false, false}, {2, true, true}, {2, false, false}, {1, false, false}},
	} {
		t.Run(mode.String(), func(t *testing.T) {
			bothProtocols(t, func(t *testing.T, x *bench, s *server) {
				x.set(connections(func(c *resealv1.Connections) { c.Reuse = mode }))
				for i, st := range steps {
					before := s.opened.Load()
					call := newCall()
					call.Client, call.First = st.client, st.first
					x.do(newRequest(t, "GET", "/bytes/10", nil), call)
					if fresh := s.opened.Load() > before; fresh != st.fresh || call.Reused == st.fresh {
						t.Fatalf("step %d %+v: new connection %v, call.Reused %v", i, st, fresh, call.Reused)
					}
				}
			})
		})
	}
}

func TestLimitsOfAConnection(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		x.set(connections(func(c *resealv1.Connections) { c.MaxRequests = 2 }))
		for range 6 {
			x.get("/bytes/10")
		}
		if n := s.opened.Load(); n != 3 {
			t.Errorf("%d connections for 6 requests, 2 each", n)
		}
		x.set(connections(func(c *resealv1.Connections) { c.MaxRequests, c.MaxLifetime = 0, dur(30*time.Millisecond) }))
		x.get("/bytes/10")
		eventually(t, "the old connection is closed", func() bool {
			return x.tally.get(func(c *tally) int { return c.opened - c.closed }) == 0
		})
	})
}

func TestMaxIdle(t *testing.T) {
	s := serve(t, gate(8))
	x := newBench(t, []string{s.addr}, connections(func(c *resealv1.Connections) { c.MaxIdlePerEndpoint = 2 }))
	wantNone(t, x.parallel(8, "/"))
	eventually(t, "two connections stay", func() bool {
		return x.tally.get(func(c *tally) int { return c.opened - c.closed }) == 2
	})
}

// A dial goes on when the request that caused it has gone, and serves the next.
func TestDialOutlivesRequest(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	ctx, cancel := context.WithCancel(t.Context())
	slow := make(chan struct{})
	x.b.cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		<-slow
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, _, err := x.try(newRequest(t, "GET", "/", nil).WithContext(ctx), nil); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	close(slow)
	eventually(t, "the connection is idle", func() bool { return x.tally.get(func(c *tally) int { return c.idle }) == 1 })
	call := newCall()
	x.do(newRequest(t, "GET", "/bytes/1", nil), call)
	if s.opened.Load() != 1 || call.Reused {
		t.Errorf("%d connections, reused %v", s.opened.Load(), call.Reused)
	}
}

func TestUpdateKeepsConnections(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	for i := range 50 {
		x.get("/bytes/100")
		x.set(timeouts(func(b *resealv1.BackendTimeouts) { b.Connect = dur(time.Duration(i+1) * time.Second) }))
	}
	if n := s.opened.Load(); n != 1 {
		t.Errorf("%d connections over 50 updates", n)
	}
}

func TestUpdateNeverCutsRequests(t *testing.T) {
	a, b := serve(t, site()), serveH2(t, site())
	x := newBench(t, []string{a.addr, b.addr})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var count atomic.Int64
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, body, err := x.try(newRequest(t, "GET", "/bytes/20000", nil), nil); err != nil || len(body) != 20000 {
					t.Errorf("%d bytes, %v", len(body), err)
					return
				}
				count.Add(1)
			}
		})
	}
	both := x.spec.Endpoints
	for i := range 60 {
		x.spec.Endpoints = [][]*resealv1.Endpoint{both, both[:1], both[1:]}[i%3]
		x.apply(fmt.Sprint("identity", i/2%2))
		time.Sleep(3 * time.Millisecond)
	}
	eventually(t, "requests got through", func() bool { return count.Load() > 50 })
	close(stop)
	wg.Wait()
	x.h.mu.Lock()
	defer x.h.mu.Unlock()
	if !slices.Contains(x.h.forgot, "identity0") {
		t.Errorf("forgot %q", x.h.forgot)
	}
}

func TestRemovedPoolDrains(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	resp, err := x.RoundTrip(newRequest(t, "GET", "/bytes/5000000", nil), newCall())
	if err != nil {
		t.Fatal(err)
	}
	x.b.Update(nil)
	if body, err := io.ReadAll(resp.Body); err != nil || len(body) != 5_000_000 {
		t.Errorf("%d bytes, %v", len(body), err)
	}
	resp.Body.Close()
	eventually(t, "the connection is closed", func() bool { return x.tally.get(func(c *tally) int { return c.closed }) == 1 })
	if s.count("reset") != 0 {
		t.Errorf("ends %s", s.describe())
	}
}

func TestDefaultsAreUsable(t *testing.T) {
	s := newSettings(proto.CloneOf(&resealv1.BackendPool{}).WithDefaults())
	if s.maxIdle != 256 || s.maxOpen != 1024 || s.closeTimeout != time.Second || s.retries != 1 || !s.retryStale ||
		!s.retryConnect || s.bodyTimeout != time.Minute {
		t.Errorf("%+v", s)
	}
}
