package backend

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

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
		method string
		body   func() io.Reader
		again  bool
	}{
		"GET":                    {method: "GET", again: true},
		"HEAD":                   {method: "HEAD", again: true},
		"DELETE":                 {method: "DELETE", again: true},
		"PUT with a small body":  {method: "PUT", body: func() io.Reader { return bytes.NewReader(pattern(100)) }, again: true},
		"PUT with a stream":      {method: "PUT", body: func() io.Reader { return bytes.NewReader(pattern(100_000)) }, again: true},
		"POST without body":      {method: "POST"},
		"POST with a small body": {method: "POST", body: func() io.Reader { return bytes.NewReader(pattern(100)) }},
		"POST with a stream":     {method: "POST", body: func() io.Reader { return bytes.NewReader(pattern(100_000)) }},
		"PATCH":                  {method: "PATCH", body: func() io.Reader { return bytes.NewReader(pattern(10)) }},
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
				return x.dials() == 0 && x.tally.get(func(c *tally) int { return c.opened - c.closed }) == 0
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

// dials counts the dials under way.
func (x *bench) dials() int {
	n := 0
	for _, e := range x.current("p").state.Load().endpoints {
		e.mu.Lock()
		for _, set := range e.sets {
			n += set.dials
		}
		e.mu.Unlock()
	}
	return n
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
