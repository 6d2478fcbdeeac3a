package frontend

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// short are time limits under which a client that stalls is ended soon, and one
// that is only slow, on a busy machine, is not.
func short(l *exchange.Listener) {
	bound := durationpb.New(time.Second)
	l.Spec.Timeouts = &resealv1.ListenerTimeouts{Handshake: bound, Header: bound, Idle: bound, Drain: durationpb.New(patience)}
}

// obliging is an upstream that does as the path says.
func obliging(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
	switch r.URL.Path {
	case "/endless":
		return &http.Response{StatusCode: 200, Header: http.Header{}, Body: endless{}, ContentLength: -1}, nil
	case "/early":
		return textResponse(200, "I don't read"), nil
	case "/page": // short enough to be written when the handler has ended
		return textResponse(200, strings.Repeat("x", 3000)), nil
	case "/big":
		return textResponse(200, strings.Repeat("x", 256<<10)), nil
	}
	if r.Body != nil {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return nil, err
		}
	}
	return textResponse(200, "ok"), nil
}

// raw is a connection to the listener "main" without TLS.
func (e *edge) raw() net.Conn {
	e.t.Helper()
	conn, err := net.Dial("tcp", e.address("main"))
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { conn.Close() })
	return conn
}

// hello is a ClientHello.
func hello(t testing.TB) []byte {
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() { _ = tls.Client(theirs, &tls.Config{ServerName: "app.test"}).Handshake(); theirs.Close() }()
	buffer := make([]byte, 4096)
	n, err := ours.Read(buffer)
	if err != nil {
		t.Fatal(err)
	}
	return buffer[:n]
}

// fill sends until the other side takes no more.
func fill(conn net.Conn, text string) {
	_ = conn.SetWriteDeadline(time.Now().Add(patience))
	for {
		if _, err := io.WriteString(conn, text); err != nil {
			return
		}
	}
}

// stalls are the states in which a client can stop reading or writing. Each
// leaves its connection there.
var stalls = map[string]func(e *edge){
	"nothing":       func(e *edge) { e.raw() },
	"half a hello":  func(e *edge) { _, _ = e.raw().Write(hello(e.t)[:100]) },
	"no Finished":   func(e *edge) { _, _ = e.raw().Write(hello(e.t)) },
	"no request":    func(e *edge) { e.dial() },
	"half a header": func(e *edge) { fmt.Fprint(e.dial(), "GET / HTTP/1.1\r\nHost: app.te") },
	"no second request": func(e *edge) {
		conn := e.dial()
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
		bodyOf(e.t, must[*http.Response](e.t)(http.ReadResponse(bufio.NewReader(conn), nil)))
	},
	"half a second header": func(e *edge) {
		conn := e.dial()
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
		bodyOf(e.t, must[*http.Response](e.t)(http.ReadResponse(bufio.NewReader(conn), nil)))
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.te")
	},
	"takes no answers": func(e *edge) {
		conn := e.dial()
		_ = conn.NetConn().(*net.TCPConn).SetReadBuffer(4096) // the sooner it is full
		go fill(conn, strings.Repeat("GET /page HTTP/1.1\r\nHost: app.test\r\n\r\n", 20))
	},
	"takes no body": func(e *edge) { fmt.Fprint(e.dial(), "GET /endless HTTP/1.1\r\nHost: app.test\r\n\r\n") },
	"h2 no preface": func(e *edge) { e.dial(func(c *tls.Config) { c.NextProtos = []string{"h2"} }) },
	"h2 half a preface": func(e *edge) {
		fmt.Fprint(e.dial(func(c *tls.Config) { c.NextProtos = []string{"h2"} }), http2.ClientPreface[:10])
	},
	"h2 no SETTINGS": func(e *edge) {
		fmt.Fprint(e.dial(func(c *tls.Config) { c.NextProtos = []string{"h2"} }), http2.ClientPreface)
	},
	"h2 no request": func(e *edge) { e.h2Dial() },
	"h2 half a header": func(e *edge) {
		h := e.h2Dial()
		_ = h.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.fields("GET")})
	},
	"h2 half a frame": func(e *edge) { _, _ = e.h2Dial().conn.Write([]byte{0, 1, 0, 1, 4, 0, 0, 0, 1, 0x82}) },
	"h2 no body":      func(e *edge) { _ = e.h2Dial().request(1, "POST", false) },
	"h2 half a body": func(e *edge) {
		h := e.h2Dial()
		_ = h.request(1, "POST", false, "content-length", "10")
		_ = h.WriteData(1, false, []byte("half"))
	},
	"h2 takes no frames": func(e *edge) {
		h := e.h2Dial()
		h.path = "/endless"
		_ = h.request(1, "GET", true)
		_ = h.WriteWindowUpdate(0, 1<<30)
		_ = h.WriteWindowUpdate(1, 1<<30)
	},
	"h2 closed windows": func(e *edge) {
		h := e.h2DialWith([]http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}})
		h.path = "/big"
		for i := range uint32(200) {
			_ = h.request(2*i+1, "GET", true)
		}
		go h.read(nil) // it takes all frames that come
	},
}

// TestStalledClients: wherever a client stalls, nobody else notices, and it is
// ended in time, with all that it held.
func TestStalledClients(t *testing.T) {
	for name, stall := range stalls {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEdge(t, upstreamFuncs{roundTrip: obliging}, short)
			e.apply(e.listener("main", short), e.listener("other"))
			c, other := e.count("main"), e.address("other")
			legit := e.client(true, func(t *http.Transport) {
				t.DisableKeepAlives = true
				t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
					return (&net.Dialer{}).DialContext(ctx, "tcp", other)
				}
			})
			const stalled = 1
			began := time.Now()
			for range stalled {
				stall(e)
			}
			var slowest time.Duration
			for i := range 5 {
				start := time.Now() // others have a listener with the usual time limits
				bodyOf(t, must[*http.Response](t)(legit.Get("https://app.test/")))
				e.apply(e.listener("main", short, func(l *exchange.Listener) { l.PolicyKey = fmt.Sprint(i) }), e.listener("other"))
				slowest = max(slowest, time.Since(start))
			}
			// Some must fill the kernel's buffers first, which takes its time.
			within(t, 12*patience, "all are ended", func() bool {
				return read(c, func(c *counts) bool { return c.opened == stalled && c.gone == stalled })
			})
			t.Logf("ended after %s; another request with an apply took at most %s", time.Since(began).Round(10*time.Millisecond), slowest)
		})
	}
}

// TestStalledTunnels is the same for protocol tls.
func TestStalledTunnels(t *testing.T) {
	for name, stall := range map[string]func(e *edge){
		"sends and takes nothing": func(e *edge) { e.dial(func(c *tls.Config) { c.NextProtos = nil }) },
		"takes nothing": func(e *edge) {
			conn := e.dial(func(c *tls.Config) { c.NextProtos = nil })
			_, _ = conn.Write([]byte{'>'})
		},
		// While something moves in the other direction.
		"takes nothing, sends on": func(e *edge) {
			conn := e.dial(func(c *tls.Config) { c.NextProtos = nil })
			_, _ = conn.Write([]byte{'>'})
			go func() {
				for {
					if _, err := conn.Write([]byte{'x'}); err != nil {
						return
					}
					time.Sleep(20 * time.Millisecond)
				}
			}()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, _ := tcpEdge(t, func(backend *net.TCPConn) {
				first := make([]byte, 1)
				if _, err := backend.Read(first); err != nil {
					return
				}
				go fill(backend, strings.Repeat("x", 64<<10))
				_, _ = io.Copy(io.Discard, backend)
			}, short)
			stall(e)
			c := e.count("main")
			eventually(t, "it is ended", func() bool { return read(c, func(c *counts) bool { return c.gone == 1 }) })
			if reason := e.logged(1)["reason"]; reason != "timeout_idle" && reason != "client_stalled" {
				t.Errorf("reason %v", reason)
			}
		})
	}
}

// noWhere has requests to /nowhere go nowhere.
func noWhere(l *exchange.Listener) {
	l.Route = func(_, path string) (exchange.Match, bool) { return exchange.Match{Pool: "web"}, path != "/nowhere" }
}

// TestBodyThatStops: a request whose body stops is answered 408, however little
// is missing, whoever waits for it.
func TestBodyThatStops(t *testing.T) {
	for _, path := range []string{"/", "/nowhere", "/early"} {
		for name, head := range map[string]string{
			"no byte":        "Content-Length: 10\r\n\r\n",
			"half":           "Content-Length: 10\r\n\r\nhalf",
			"big, no byte":   "Content-Length: 1000000\r\n\r\n",
			"chunks, none":   "Transfer-Encoding: chunked\r\n\r\n",
			"chunks, half":   "Transfer-Encoding: chunked\r\n\r\n5\r\nha",
			"no trailer end": "Transfer-Encoding: chunked\r\n\r\n2\r\nha\r\n0\r\n",
		} {
			t.Run("http/1.1 "+path+" "+name, func(t *testing.T) {
				t.Parallel()
				e := newEdge(t, upstreamFuncs{roundTrip: obliging}, short, noWhere)
				conn := e.dial()
				fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: app.test\r\n%s", path, head)
				reader := bufio.NewReader(conn)
				response := must[*http.Response](t)(http.ReadResponse(reader, nil))
				bodyOf(t, response)
				want := map[string]int{"/": 408, "/nowhere": 404, "/early": 200}[path]
				if response.StatusCode != want {
					t.Errorf("status %d, want %d", response.StatusCode, want)
				}
				if _, err := reader.ReadByte(); err == nil {
					t.Error("the connection goes on")
				}
				if record := e.logged(1); path == "/" && (record["reason"] != "timeout_body" || record["status"] != 408.0) {
					t.Errorf("logged %v", record)
				}
				c := e.count("main")
				eventually(t, "the connection is ended", func() bool { return read(c, func(c *counts) bool { return c.gone == 1 }) })
			})
		}
	}
	for name, length := range map[string][]string{"no length": nil, "length": {"content-length", "10"}} {
		t.Run("h2 "+name, func(t *testing.T) {
			t.Parallel()
			e := newEdge(t, upstreamFuncs{roundTrip: obliging}, short)
			h := e.h2Dial()
			for i, data := range []string{"", "half"} {
				stream := uint32(2*i + 1)
				_ = h.request(stream, "POST", false, length...)
				if data != "" {
					_ = h.WriteData(stream, false, []byte(data))
				}
				if end := h.read(func(end *h2End) bool { return end.answers[stream] != "" }); end.answers[stream] != "408" {
					t.Errorf("answered %+v", end)
				}
			}
			if err := h.ping(); err != nil { // its other requests are not to blame
				t.Error(err)
			}
		})
	}
}

// TestTrickledBody: a body of known length must come at a minimum rate, one of
// unknown length may be a stream.
func TestTrickledBody(t *testing.T) {
	trickle := func(send func() error, n int) {
		for range n {
			if send() != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	t.Run("http/1.1 length", func(t *testing.T) {
		t.Parallel()
		e := newEdge(t, upstreamFuncs{roundTrip: obliging}, short)
		conn := e.dial()
		fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 16384\r\n\r\n")
		go trickle(func() error { _, err := conn.Write([]byte("x")); return err }, 16384)
		if got := must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil)).StatusCode; got != 408 {
			t.Errorf("status %d", got)
		}
	})
	t.Run("h2 length", func(t *testing.T) {
		t.Parallel()
		e := newEdge(t, upstreamFuncs{roundTrip: obliging}, short)
		h := e.h2Dial()
		_ = h.request(1, "POST", false, "content-length", "16384")
		go trickle(func() error { return h.WriteData(1, false, []byte("x")) }, 16384)
		if end := h.read(func(end *h2End) bool { return end.answers[1] != "" }); end.answers[1] != "408" {
			t.Errorf("answered %+v", end)
		}
	})
	t.Run("http/1.1 stream", func(t *testing.T) {
		t.Parallel()
		e := newEdge(t, upstreamFuncs{roundTrip: obliging}, short)
		conn := e.dial()
		fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n\r\n")
		trickle(func() error { _, err := conn.Write([]byte("1\r\nx\r\n")); return err }, 250)
		fmt.Fprint(conn, "0\r\n\r\n")
		if got := must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil)).StatusCode; got != 200 {
			t.Errorf("status %d", got)
		}
	})
}

// TestDrainDuringProxyHeader ends connections while a PROXY header is being put
// in front of them (for the race detector).
func TestDrainDuringProxyHeader(t *testing.T) {
	e := newEdge(t, answering("ok"))
	proxied := func(l *exchange.Listener) {
		l.Spec.ProxyProtocol = &resealv1.ProxyProtocol{TrustedCidrs: []string{"127.0.0.0/8"}}
		l.Spec.Timeouts.Drain = durationpb.New(time.Millisecond)
	}
	for range 30 {
		e.apply(e.listener("main", proxied))
		var conns []net.Conn
		for range 10 {
			conns = append(conns, e.raw())
		}
		go func() {
			for _, conn := range conns {
				_, _ = io.WriteString(conn, "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
			}
		}()
		e.apply() // drains all, and aborts them after a millisecond
	}
}
