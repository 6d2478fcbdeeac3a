package backend

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// quietBody is a client's body that stays away after its first bytes.
type quietBody struct {
	ctx   context.Context
	begun bool
	err   error // how it ends, at once; nil: never, but for ctx
}

func (b *quietBody) Read(p []byte) (int, error) {
	if !b.begun {
		b.begun = true
		return copy(p, "some"), nil
	}
	if b.err != nil {
		return 0, b.err
	}
	<-b.ctx.Done()
	return 0, b.ctx.Err()
}

func (b *quietBody) Close() error { return nil }

// blameSite plays all parts of the test, well or badly.
func blameSite() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	mux.HandleFunc("/both", func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		_ = control.EnableFullDuplex() // HTTP/2 needs no word
		control.Flush()
		io.Copy(io.Discard, r.Body)
	})
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "data: 1\n\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	mux.HandleFunc("/promise", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		io.WriteString(w, "some")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	mux.HandleFunc("/refuse", func(w http.ResponseWriter, r *http.Request) {
		_, _ = r.Body.Read(make([]byte, 1))
		panic(http.ErrAbortHandler)
	})
	mux.HandleFunc("/never", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	for _, status := range []int{500, 501, 502, 503, 504} {
		mux.HandleFunc("/"+http.StatusText(status)[:3], func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) })
	}
	return mux
}

// Only what an endpoint itself gets wrong takes it out, and only what goes wrong
// on this leg is an error of the pool.
func TestBlame(t *testing.T) {
	upload := func(path string, length int64, err error) func(*bench) error {
		return func(x *bench) error {
			ctx, cancel := context.WithTimeout(x.t.Context(), 20*time.Second)
			defer cancel()
			req := newRequest(x.t, "POST", path, nil).WithContext(ctx)
			req.Body, req.ContentLength = &quietBody{ctx: ctx, err: err}, length
			_, _, err := x.try(req, nil)
			return err
		}
	}
	get := func(path string) func(*bench) error {
		return func(x *bench) error {
			_, _, err := x.try(newRequest(x.t, "GET", path, nil), nil)
			return err
		}
	}
	refusal := func(x *bench) error {
		ctx, cancel := context.WithTimeout(x.t.Context(), 20*time.Second)
		defer cancel()
		req := newRequest(x.t, "POST", "/refuse", nil).WithContext(ctx)
		req.Body, req.ContentLength = io.NopCloser(unending{ctx}), -1
		_, _, err := x.try(req, nil)
		return err
	}
	upgrade := func(x *bench) error {
		req := newRequest(x.t, "GET", "/upload", nil)
		req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"x"}}
		_, _, err := x.try(req, nil)
		return err
	}
	for name, c := range map[string]struct {
		do      func(*bench) error
		set     option
		reason  string // of the error
		counted bool   // as the pool's
		ejects  bool
	}{
		"stalled upload":           {upload("/upload", -1, nil), nil, ReasonClientStalled, false, false},
		"stalled upload, length":   {upload("/upload", 100_000, nil), nil, ReasonClientStalled, false, false},
		"stalled upload, answered": {upload("/both", -1, nil), nil, ReasonTimeoutIdle, false, false},
		"broken upload":            {upload("/upload", 100_000, errors.New("broken")), nil, "", false, false},
		"broken upload, answered":  {upload("/both", 100_000, errors.New("broken")), nil, "", false, false},
		"short upload":             {upload("/upload", 100_000, io.EOF), nil, "", false, false},
		"refused upload":           {refusal, nil, ReasonReset, true, false},
		"reset":                    {get("/refuse"), nil, ReasonReset, true, true},
		"quiet events":             {get("/events"), nil, ReasonTimeoutIdle, false, false},
		"501":                      {get("/Not"), nil, "", false, false},
		"500":                      {get("/Int"), nil, "", false, false},
		"503":                      {get("/Ser"), nil, "", false, true},
		"501, chosen": {get("/Not"), func(p *resealv1.BackendPool) {
			p.OutlierDetection.Statuses = []uint32{501}
		}, "", false, true},
		"503, not chosen": {get("/Ser"), func(p *resealv1.BackendPool) {
			p.OutlierDetection.Statuses = []uint32{501}
		}, "", false, false},
		"stalled answer":    {get("/promise"), nil, ReasonTimeoutIdle, true, true},
		"answer that never": {get("/never"), nil, ReasonTimeoutHeader, true, true},
		"upgrade":           {upgrade, nil, "", false, false},
	} {
		for leg, start := range map[string]func(http.Handler) *server{
			"h1": func(h http.Handler) *server { return serve(t, h) },
			"h2": func(h http.Handler) *server { return serveH2(t, h) },
		} {
			t.Run(name+"/"+leg, func(t *testing.T) {
				t.Parallel()
				a, b := start(blameSite()), start(blameSite())
				x := newBench(t, []string{a.addr, b.addr}, ejecting, retries(0))
				// Only what has to run out is short.
				switch c.reason {
				case "", ReasonReset:
				case ReasonTimeoutHeader:
					x.set(timeouts(func(p *resealv1.BackendTimeouts) { p.ResponseHeader = dur(200 * time.Millisecond) }))
				default:
					x.set(timeouts(func(p *resealv1.BackendTimeouts) { p.Idle = dur(200 * time.Millisecond) }))
				}
				if leg == "h2" {
					x.spec.Protocol = resealv1.BackendPool_PROTOCOL_HTTP2
					x.apply("h2")
				}
				if c.set != nil {
					x.set(c.set)
				}
				for range 2 {
					err := c.do(x)
					early := !c.counted && reasonOf(err) == ReasonClientStalled // before the answer
					if reasonOf(err) != c.reason && !(early && c.reason == ReasonTimeoutIdle) {
						t.Fatalf("got error %v, want reason %q", err, c.reason)
					}
				}
				x.wantBlame(c.counted, c.ejects)
			})
		}
	}
}

// ejecting takes an endpoint out after its first failure.
func ejecting(p *resealv1.BackendPool) {
	p.OutlierDetection = &resealv1.OutlierDetection{
		ConsecutiveErrors: proto.Uint32(1), MaxEjectionPercent: proto.Uint32(100), EjectionTime: dur(time.Hour),
	}
}

func (x *bench) wantBlame(counted, ejects bool) {
	x.t.Helper()
	out := 0
	state := x.current("p").state.Load()
	for _, e := range state.view.Endpoints() {
		if state.view.Ejected(e, time.Now()) {
			out++
		}
	}
	if ejects != (out > 0) {
		x.t.Errorf("%d endpoints were ejected", out)
	}
	x.tally.with(func() {
		if counted != (len(x.tally.errors) > 0) {
			x.t.Errorf("errors counted for the pool: %v", x.tally.errors)
		}
	})
}

// An edge that lacks descriptors, ports or memory takes no endpoint out, and
// doubts no session.
func TestOwnFailuresEjectNobody(t *testing.T) {
	for _, errno := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EADDRNOTAVAIL} {
		t.Run(errno.Error(), func(t *testing.T) {
			x := newBench(t, []string{"192.0.2.1:1", "192.0.2.2:1"}, ejecting)
			x.b.cfg.Dial = func(_ context.Context, network, _ string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("socket", errno)}
			}
			x.set(func(p *resealv1.BackendPool) {
				p.HealthCheck = &resealv1.HealthCheck{Path: "/", Interval: dur(time.Millisecond), UnhealthyThreshold: 1}
			})
			for range 3 {
				_, _, err := x.try(newRequest(t, "GET", "/", nil), nil)
				wantReason(t, err, ReasonLocalFailure, 503)
			}
			x.wantBlame(true, false)
			view := x.current("p").state.Load().view
			for _, e := range view.Endpoints() {
				if view.Unhealthy(e) {
					t.Error("an endpoint is unhealthy")
				}
			}
		})
	}
}

// A client that may choose the name can't take endpoints out with one that they
// don't have. For a name that they had they are to blame.
func TestInventedNamesEjectNobody(t *testing.T) {
	var broken atomic.Bool
	var all []string
	for range 2 {
		s := serve(t, blameSite())
		s.tls.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
			if broken.Load() {
				return nil, errors.New("broken")
			}
			return nil, nil
		}
		all = append(all, s.addr)
	}
	x := newBench(t, all, ejecting, retries(0), func(p *resealv1.BackendPool) {
		p.Tls.ServerName, p.Connections.MaxRequests = "", 1
		p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN}
	})
	ask := func(name string) error {
		call := newCall()
		call.ServerName = name
		_, _, err := x.try(newRequest(t, "GET", "/upload", nil), call)
		return err
	}
	for range 3 {
		wantReason(t, ask("invented.test"), ReasonVerifyFailure, 502)
	}
	x.wantBlame(true, false)
	for range 4 {
		if err := ask(testName); err != nil {
			t.Fatal(err)
		}
	}
	broken.Store(true)
	wantReason(t, ask(testName), ReasonHandshakeFailure, 502)
	x.wantBlame(true, true)
}

// A server that speaks only HTTP/2 can't be given an Upgrade, and is not to blame.
func TestUpgradeToServerWithoutH1EjectsNobody(t *testing.T) {
	var all []string
	for range 2 {
		s := serveRaw(t, func(c *serverConn) { _ = c.Handshake() })
		s.tls.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if !slices.Contains(hello.SupportedProtos, "h2") {
				return nil, errors.New("no protocol in common") // crypto/tls would go on without one
			}
			return nil, nil
		}
		all = append(all, s.addr)
	}
	x := newBench(t, all, ejecting, retries(0))
	for range 3 {
		req := newRequest(t, "GET", "/", nil)
		req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}
		_, _, err := x.try(req, nil)
		wantReason(t, err, ReasonHandshakeFailure, 502)
	}
	x.wantBlame(true, false)
}

// A header that the endpoint takes no more of is the client's.
func TestHeaderTooLargeForEndpoint(t *testing.T) {
	small := func(h *http.Server) { h.MaxHeaderBytes = 4 << 10 }
	x := newBench(t, []string{serveH2(t, blameSite(), small).addr, serveH2(t, blameSite(), small).addr}, ejecting)
	for range 3 {
		req := newRequest(t, "GET", "/upload", nil)
		req.Header.Set("Big", strings.Repeat("x", 100<<10))
		_, _, err := x.try(req, nil)
		wantReason(t, err, ReasonBadRequest, 431)
	}
	x.wantBlame(false, false)
	x.get("/upload")
}

// Tunnels and WebSockets that are quiet end, which is nobody's fault.
func TestQuietTunnelsEjectNobody(t *testing.T) {
	idle := timeouts(func(p *resealv1.BackendTimeouts) { p.Idle = dur(100 * time.Millisecond) })
	silent := func(c *serverConn) { io.Copy(io.Discard, c) }
	t.Run("tcp", func(t *testing.T) {
		x := newBench(t, []string{serveRaw(t, silent).addr, serveRaw(t, silent).addr}, ejecting, idle,
			protocol(resealv1.BackendPool_PROTOCOL_TCP))
		for range 3 {
			tunnel, err := x.Tunnel(t.Context(), newCall())
			if err != nil {
				t.Fatal(err)
			}
			_, err = tunnel.Read(make([]byte, 1))
			wantReason(t, err, ReasonTimeoutIdle, 504)
			tunnel.Close()
		}
		x.wantBlame(false, false)
	})
	t.Run("WebSocket", func(t *testing.T) {
		switching := func(c *serverConn) {
			if _, _, err := request(bufio.NewReader(c)); err == nil {
				io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			}
			silent(c)
		}
		x := newBench(t, []string{serveRaw(t, switching).addr, serveRaw(t, switching).addr}, ejecting, idle)
		for range 3 {
			req := newRequest(t, "GET", "/", nil)
			req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}
			_, _, err := x.try(req, nil)
			wantReason(t, err, ReasonTimeoutIdle, 504)
		}
		x.wantBlame(false, false)
	})
}
