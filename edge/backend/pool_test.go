package backend

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

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

func wantNone(t *testing.T, errs []error) {
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

func TestColdH2EndpointGetsOneConnection(t *testing.T) {
	s := serveH2(t, gate(32))
	x := newBench(t, []string{s.addr})
	wantNone(t, x.parallel(32, "/"))
	if n := s.opened.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
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
	want := []string{"identity|" + s.addr + "|a.test", "identity|" + s.addr + "|b.test"}
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
	if got := x.h.identities(); !slices.Equal(got, []string{"identity|pool uid|" + testName}) {
		t.Errorf("session identities %q", got)
	}
	x.set(func(p *resealv1.BackendPool) { p.Sessions = &resealv1.Sessions{Mode: resealv1.Sessions_MODE_OFF} })
	if !x.b.pools["p"].state.Load().tls.SessionTicketsDisabled {
		t.Error("mode off leaves tickets on")
	}
}

func TestReuseModes(t *testing.T) {
	type step struct {
		client uint64
		first  bool
		fresh  bool // must be served by a new connection
	}
	for mode, steps := range map[resealv1.Connections_Reuse][]step{
		resealv1.Connections_REUSE_ALWAYS:     {{1, true, true}, {2, true, false}, {2, false, false}},
		resealv1.Connections_REUSE_AGGRESSIVE: {{1, true, true}, {2, true, true}, {1, false, false}, {3, true, false}},
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

// dieAfter serves n requests per connection; then it dies while the next one is
// under way, after it was read as told.
func dieAfter(t *testing.T, n int, total *atomic.Int64) *server {
	return serveRaw(t, func(c *serverConn) {
		br := bufio.NewReader(c)
		for range n {
			if _, _, err := request(br); err != nil {
				return
			}
			total.Add(1)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
		br.Peek(1) // the next request has come
		total.Add(1)
		c.raw.Conn.(*net.TCPConn).SetLinger(0)
		c.raw.Conn.Close()
	})
}

// The stale connection matrix: what is sent again when a reused connection dies
// under a request.
func TestStaleConnection(t *testing.T) {
	for name, c := range map[string]struct {
		method  string
		body    func() io.Reader
		getBody bool
		again   bool
	}{
		"GET":                         {method: "GET", again: true},
		"HEAD":                        {method: "HEAD", again: true},
		"DELETE":                      {method: "DELETE", again: true},
		"PUT with a small body":       {method: "PUT", body: func() io.Reader { return bytes.NewReader(pattern(100)) }, again: true},
		"PUT with a stream":           {method: "PUT", body: func() io.Reader { return bytes.NewReader(pattern(100_000)) }},
		"PUT with a replayable body":  {method: "PUT", body: func() io.Reader { return bytes.NewReader(pattern(100_000)) }, getBody: true, again: true},
		"POST without body":           {method: "POST"},
		"POST with a small body":      {method: "POST", body: func() io.Reader { return bytes.NewReader(pattern(100)) }},
		"POST with a replayable body": {method: "POST", body: func() io.Reader { return bytes.NewReader(pattern(100_000)) }, getBody: true},
		"PATCH":                       {method: "PATCH", body: func() io.Reader { return bytes.NewReader(pattern(10)) }},
	} {
		t.Run(name, func(t *testing.T) {
			var total atomic.Int64
			s := dieAfter(t, 1, &total)
			x := newBench(t, []string{s.addr})
			x.get("/")
			var body io.Reader
			if c.body != nil {
				body = c.body()
			}
			req := newRequest(t, c.method, "/", body)
			if c.getBody {
				req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(c.body()), nil }
			}
			call := newCall()
			_, _, err := x.try(req, call)
			if c.again {
				if err != nil || call.Attempts != 2 || call.Reused {
					t.Fatalf("error %v, call %+v", err, call)
				}
				return
			}
			wantReason(t, err, ReasonStaleConnection, 502)
			if call.Attempts != 1 || total.Load() != 2 {
				t.Errorf("%d attempts, the server saw %d requests", call.Attempts, total.Load())
			}
		})
	}
	t.Run("retries off", func(t *testing.T) {
		var total atomic.Int64
		s := dieAfter(t, 1, &total)
		x := newBench(t, []string{s.addr}, retries(0))
		x.get("/")
		_, _, err := x.try(newRequest(t, "GET", "/", nil), nil)
		wantReason(t, err, ReasonStaleConnection, 502)
	})
	t.Run("a new connection that dies is not stale", func(t *testing.T) {
		var total atomic.Int64
		s := dieAfter(t, 0, &total)
		x := newBench(t, []string{s.addr})
		_, _, err := x.try(newRequest(t, "GET", "/", nil), nil)
		wantReason(t, err, ReasonReset, 502)
		if total.Load() != 1 {
			t.Errorf("%d tries", total.Load())
		}
	})
}

// All idle connections die at once, as when a backend restarts: requests that
// follow never notice, not even those that must not be repeated.
func TestBackendRestart(t *testing.T) {
	for proto, start := range map[string]func(testing.TB, http.Handler) *server{
		"h1": func(t testing.TB, h http.Handler) *server { return serve(t, h) },
		"h2": func(t testing.TB, h http.Handler) *server { return serveH2(t, h) },
	} {
		t.Run(proto, func(t *testing.T) {
			s := start(t, site())
			x := newBench(t, []string{s.addr})
			wantNone(t, x.parallel(8, "/bytes/100"))
			s.http.Close()
			eventually(t, "the deaths are noticed", func() bool {
				return x.tally.get(func(c *tally) int { return c.opened - c.closed }) == 0
			})
			l, err := net.Listen("tcp", s.addr)
			if err != nil {
				t.Skip("another process took the port meanwhile: ", err)
			}
			again := &http.Server{Handler: site(), TLSConfig: s.tls.Clone()}
			go again.ServeTLS(l, "", "")
			defer again.Close()
			x.do(newRequest(t, "POST", "/echo", strings.NewReader("once")), nil)
		})
	}
}

func TestConnectFailure(t *testing.T) {
	s := serve(t, site())
	dead := closedPort(t)
	x := newBench(t, []string{dead, s.addr}, func(p *resealv1.BackendPool) {
		p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
	})
	for range 4 {
		call := newCall()
		x.do(newRequest(t, "POST", "/echo", io.NopCloser(bytes.NewReader(pattern(100_000)))), call)
		if call.Endpoint != s.addr {
			t.Fatalf("%+v", call)
		}
	}
	x.set(retries(0), func(p *resealv1.BackendPool) { p.Endpoints = p.Endpoints[:1] })
	call := newCall()
	_, _, err := x.try(newRequest(t, "GET", "/", nil), call)
	wantReason(t, err, ReasonConnectFailure, 502)
	if call.Endpoint != dead || call.Attempts != 1 {
		t.Errorf("%+v", call)
	}
	for _, err := range x.parallel(10, "/") { // none waits for another's dial to fail first
		wantReason(t, err, ReasonConnectFailure, 502)
	}
}

func closedPort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestHandshakeTimeout(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // accepts in the kernel, says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	x := newBench(t, []string{l.Addr().String()}, retries(0),
		timeouts(func(b *resealv1.BackendTimeouts) { b.Handshake = dur(30 * time.Millisecond) }))
	_, _, err = x.try(newRequest(t, "GET", "/", nil), nil)
	wantReason(t, err, ReasonHandshakeFailure, 502)
}

func TestRetryOnStatus(t *testing.T) {
	bad := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503); io.WriteString(w, "no") }))
	good := serve(t, site())
	x := newBench(t, []string{bad.addr, good.addr}, retries(1, resealv1.Retries_CONDITION_503), func(p *resealv1.BackendPool) {
		p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
		p.OutlierDetection = &resealv1.OutlierDetection{ConsecutiveErrors: new(uint32)}
	})
	for range 6 {
		x.get("/bytes/5")
	}
	if n := x.tally.get(func(c *tally) int { return c.requests }); n != 6 {
		t.Errorf("%d requests counted, want 6", n)
	}
	codes := map[int]int{}
	for range 6 {
		resp, _ := x.do(newRequest(t, "POST", "/echo", strings.NewReader("x")), nil)
		codes[resp.StatusCode]++
	}
	if codes[503] != 3 || codes[200] != 3 {
		t.Errorf("POSTs were answered %v", codes)
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
	if !slices.Contains(x.h.forgot, "identity0|") {
		t.Errorf("forgot %q", x.h.forgot)
	}
}

func TestRemovedPoolDrains(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	resp, err := x.b.RoundTrip(newRequest(t, "GET", "/bytes/5000000", nil), newCall())
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

func TestH2SeveralConnections(t *testing.T) {
	s := serveH2(t, gate(12), func(h *http.Server) { h.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 4} })
	x := newBench(t, []string{s.addr})
	wantNone(t, x.parallel(12, "/"))
	if n := s.opened.Load(); n < 3 {
		t.Errorf("%d connections for 12 streams, 4 each", n)
	}
}

func TestH2GoAway(t *testing.T) {
	s := serveH2(t, site())
	x := newBench(t, []string{s.addr})
	x.get("/bytes/10")
	resp, err := x.b.RoundTrip(newRequest(t, "GET", "/bytes/3000000", nil), newCall())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.http.Shutdown(context.WithoutCancel(t.Context())) }()
	if body, err := io.ReadAll(resp.Body); err != nil || len(body) != 3_000_000 {
		t.Errorf("%d bytes, %v after GOAWAY", len(body), err)
	}
	resp.Body.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	eventually(t, "the connection is closed", func() bool { return x.tally.get(func(c *tally) int { return c.closed }) == 1 })
	if n := x.tally.get(func(c *tally) int { return c.kinds[notifyBoth] }); n != 1 {
		t.Errorf("ended %v", x.tally.kinds)
	}
}

func TestH2OnlyPoolRefusesH1(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr}, protocol(resealv1.BackendPool_PROTOCOL_HTTP2), retries(0))
	_, _, err := x.try(newRequest(t, "GET", "/", nil), nil)
	wantReason(t, err, ReasonProtocolError, 502)
}

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
			first := x.b.pools["p"].endpoints[a.addr]
			sick.Store(true)
			eventually(t, "a is unhealthy", first.unhealthy.Load)
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
			if x.b.pools["p"].endpoints[a.addr] != first || !first.unhealthy.Load() {
				t.Error("health was lost in an update")
			}
			sick.Store(false)
			eventually(t, "a is healthy", func() bool { return !first.unhealthy.Load() })
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
	bad := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) }))
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
	if codes[500] != 3 || codes[200] != 17 {
		t.Errorf("answers %v, want 3 errors before the ejection", codes)
	}
	x.set(func(p *resealv1.BackendPool) {}) // an update keeps it out
	if resp, _ := x.do(newRequest(t, "GET", "/bytes/1", nil), nil); resp.StatusCode != 200 {
		t.Error("the ejection was lost in an update")
	}
	e := x.b.pools["p"].endpoints[bad.addr]
	e.ejectedUntil.Store(time.Now().Add(-time.Second).UnixNano())
	if !e.available(time.Now()) {
		t.Error("the ejection never ends")
	}
}

func TestLastEndpointIsNeverEjected(t *testing.T) {
	bad := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) }))
	n, all := uint32(1), uint32(100)
	x := newBench(t, []string{bad.addr, closedPort(t)}, func(p *resealv1.BackendPool) {
		p.OutlierDetection = &resealv1.OutlierDetection{ConsecutiveErrors: &n, MaxEjectionPercent: &all}
	})
	for range 20 {
		x.try(newRequest(t, "GET", "/", nil), nil)
		out := 0
		for _, e := range x.b.pools["p"].endpoints {
			if e.ejected(time.Now()) {
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
		m := x.b.pools["p"].state.Load().members
		return len(m) == 1 && strings.HasPrefix(m[0].address, "127.0.0.2:")
	})
	eventually(t, "the old one's connection is closed", func() bool {
		return x.tally.get(func(c *tally) int { return c.opened - c.closed }) == 0
	})
}

func TestTunnel(t *testing.T) {
	s := serveRaw(t, func(c *serverConn) {
		io.WriteString(c, "220 ready\n") // a server that speaks first
		io.Copy(c, c)
		c.Conn.CloseWrite()
	})
	x := newBench(t, []string{closedPort(t), s.addr}, protocol(resealv1.BackendPool_PROTOCOL_TCP), func(p *resealv1.BackendPool) {
		p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
	})
	for range 4 {
		call := newCall()
		tunnel, err := x.b.Tunnel(t.Context(), call)
		if err != nil {
			t.Fatal(err)
		}
		if call.Protocol != "tcp" || call.Reused || call.Connect == 0 {
			t.Errorf("%+v", call)
		}
		io.WriteString(tunnel, "over and out\n")
		if err := tunnel.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(tunnel); err != nil || string(got) != "220 ready\nover and out\n" {
			t.Fatalf("%q %v", got, err)
		}
		tunnel.Close()
	}
	x.stop()
	if x.tally.requests != 4 || x.tally.kinds[notifyBoth] != 4 {
		t.Errorf("%d requests, ends %v", x.tally.requests, x.tally.kinds)
	}
}

func TestTunnelIdles(t *testing.T) {
	s := serveRaw(t, drainConn)
	x := newBench(t, []string{s.addr}, protocol(resealv1.BackendPool_PROTOCOL_TCP),
		timeouts(func(b *resealv1.BackendTimeouts) { b.Idle = dur(30 * time.Millisecond) }))
	tunnel, err := x.b.Tunnel(t.Context(), newCall())
	if err != nil {
		t.Fatal(err)
	}
	_, err = tunnel.Read(make([]byte, 1))
	wantReason(t, err, ReasonTimeoutIdle, 504)
	tunnel.Close()
}

func members(weights ...int) []*member {
	var all []*member
	for i, w := range weights {
		all = append(all, &member{endpoint: &endpoint{address: fmt.Sprintf("10.0.0.%d:443", i)}, weight: w})
	}
	return all
}

func anyEndpoint(*endpoint) bool { return true }

func TestRoundRobinIsSmooth(t *testing.T) {
	p, m := &pool{}, members(5, 1, 1, 0)
	var order strings.Builder
	for range 7 {
		order.WriteString(p.rotate(m, anyEndpoint).address[7:8])
	}
	if order.String() != "0010200" {
		t.Errorf("order %s", order.String())
	}
}

func TestLeastRequest(t *testing.T) {
	m := members(1, 2, 4, 0)
	counts := map[string]int{}
	for range 70 {
		e := leastLoaded(m, anyEndpoint)
		e.inFlight.Add(1)
		counts[e.address]++
	}
	if counts["10.0.0.0:443"] != 10 || counts["10.0.0.1:443"] != 20 || counts["10.0.0.2:443"] != 40 {
		t.Errorf("70 requests went %v", counts)
	}
}

func TestRingMovesFewKeys(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(2, 12).Draw(rt, "endpoints")
		m := members(slices.Repeat([]int{1}, n)...)
		gone := m[rapid.IntRange(0, n-1).Draw(rt, "gone")]
		before := newRing(m)
		after := newRing(slices.DeleteFunc(slices.Clone(m), func(x *member) bool { return x == gone }))
		held := 0
		const keys = 500
		for i := range keys {
			key := hashString(fmt.Sprint("key", i))
			was, is := before.find(key, anyEndpoint), after.find(key, anyEndpoint)
			if was == gone.endpoint {
				held++
			} else if was != is {
				rt.Fatalf("a key moved from %s to %s", was.address, is.address)
			}
		}
		if held > 3*keys/n {
			rt.Fatalf("one of %d endpoints held %d of %d keys", n, held, keys)
		}
	})
}

func TestRingHash(t *testing.T) {
	a, b := serve(t, site()), serve(t, site())
	x := newBench(t, []string{a.addr, b.addr})
	endpointOf := func(hashOn string, change func(*http.Request, *Call)) string {
		x.set(func(p *resealv1.BackendPool) {
			p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_RING_HASH, HashOn: hashOn}
		})
		req, call := newRequest(t, "GET", "/bytes/1", nil), newCall()
		change(req, call)
		x.do(req, call)
		return call.Endpoint
	}
	for hashOn, set := range map[string]func(r *http.Request, c *Call, v string){
		"source_ip":   func(_ *http.Request, c *Call, v string) { c.Source = netip.MustParseAddrPort("192.0.2." + v + ":1") },
		"path":        func(r *http.Request, _ *Call, v string) { r.URL.Path = "/bytes/" + v },
		"host":        func(r *http.Request, _ *Call, v string) { r.Host = v + ".test" },
		"header:X-Id": func(r *http.Request, _ *Call, v string) { r.Header.Set("X-Id", v) },
		"cookie:id":   func(r *http.Request, _ *Call, v string) { r.AddCookie(&http.Cookie{Name: "id", Value: v}) },
	} {
		t.Run(hashOn, func(t *testing.T) {
			used := map[string]bool{}
			for v := range 16 {
				value := fmt.Sprint(v)
				first := endpointOf(hashOn, func(r *http.Request, c *Call) { set(r, c, value) })
				used[first] = true
				if again := endpointOf(hashOn, func(r *http.Request, c *Call) { set(r, c, value) }); again != first {
					t.Fatalf("%s went to %s, then %s", value, first, again)
				}
			}
			if len(used) != 2 {
				t.Errorf("16 keys used %d of 2 endpoints", len(used))
			}
		})
	}
}

func TestDefaultsAreUsable(t *testing.T) {
	s := newSettings(proto.CloneOf(&resealv1.BackendPool{}).WithDefaults())
	if s.maxIdle != 256 || s.maxOpen != 1024 || s.closeTimeout != time.Second || s.retries != 1 || !s.retryStale ||
		!s.retryConnect || s.ejectAfter != 5 || s.bodyTimeout != time.Minute {
		t.Errorf("%+v", s)
	}
}

// Calls that wait for a stream of an open h2 connection outlive a failed dial,
// which is not repeated without a break.
func TestWaitersOutliveFailedDials(t *testing.T) {
	release := make(chan struct{})
	s := serveH2(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }),
		func(h *http.Server) { h.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 1} })
	x := newBench(t, []string{s.addr})
	var dials atomic.Int64
	x.b.cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		if dials.Add(1) > 1 {
			return nil, errors.New("refused")
		}
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}
	done := make(chan []error)
	go func() { done <- x.parallel(1, "/") }()
	eventually(t, "the stream is taken", func() bool { return x.tally.get(func(c *tally) int { return c.active }) == 1 })
	go func() { done <- x.parallel(5, "/") }()
	eventually(t, "another dial has failed", func() bool { return dials.Load() > 1 })
	time.Sleep(50 * time.Millisecond)
	if n := dials.Load(); n > 3 {
		t.Errorf("%d dials", n)
	}
	close(release)
	wantNone(t, <-done)
	wantNone(t, <-done)
}
