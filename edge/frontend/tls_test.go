package frontend

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	notOffered     = resealv1.MissReason_MISS_REASON_NOT_OFFERED
	keyUnknown     = resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
	expired        = resealv1.MissReason_MISS_REASON_EXPIRED
	refused        = resealv1.MissReason_MISS_REASON_REFUSED
	disabled       = resealv1.MissReason_MISS_REASON_DISABLED
	policyMismatch = resealv1.MissReason_MISS_REASON_POLICY_MISMATCH
)

// oneCache gives the same session for every name.
type oneCache struct{ session *tls.ClientSessionState }

func (c *oneCache) Get(string) (*tls.ClientSessionState, bool)    { return c.session, c.session != nil }
func (c *oneCache) Put(_ string, session *tls.ClientSessionState) { c.session = session }
func withCache(c tls.ClientSessionCache) func(*tls.Config) {
	return func(t *tls.Config) { t.ClientSessionCache = c }
}
func withVersion(version uint16) func(*tls.Config) {
	return func(t *tls.Config) { t.MaxVersion = version }
}

// visit makes a request on a connection of its own, which also reads the
// tickets that come after the handshake.
func (e *edge) visit(change ...func(*tls.Config)) tls.ConnectionState {
	e.t.Helper()
	conn := e.dial(change...)
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		e.t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, response.Body)
	return conn.ConnectionState()
}

func TestFailedHandshakes(t *testing.T) {
	e := newEdge(t, answering("x"), func(l *exchange.Listener) { l.Spec.Timeouts.Handshake = durationpb.New(100 * time.Millisecond) })
	c := e.count("main")
	failed := func(want int) {
		t.Helper()
		eventually(t, "the connection ends", func() bool { return read(c, func(c *counts) bool { return c.opened == c.gone }) })
		if got := read(c, func(c *counts) int { return c.failed }); got != want {
			t.Errorf("%d failed, want %d", got, want)
		}
	}
	dial := func() net.Conn {
		t.Helper()
		return must[net.Conn](t)(net.Dial("tcp", e.address("main")))
	}
	conn := dial()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
	answer, _ := io.ReadAll(conn)
	if !strings.HasPrefix(string(answer), "HTTP/1.0 400 ") || !strings.Contains(string(answer), "plain_http") {
		t.Errorf("plain HTTP gets %q", answer)
	}
	conn.Close()
	failed(1)
	dial().Close() // as a health check does: not a handshake
	eventually(t, "two connections", func() bool { return read(c, func(c *counts) bool { return c.opened == 2 }) })
	failed(1)
	if _, err := tls.Dial("tcp", e.address("main"), &tls.Config{ServerName: "app.test"}); err == nil {
		t.Error("an unknown root is trusted")
	}
	failed(2)
	if _, err := tls.Dial("tcp", e.address("main"), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h3"}}); err == nil {
		t.Error("h3 was agreed")
	}
	failed(3)
	conn = dial()
	_, _ = io.ReadAll(conn) // says nothing until the time-out
	conn.Close()
	failed(4)
}

func TestProxyProtocol(t *testing.T) {
	forwarded := make(chan string, 1)
	upstream := upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		forwarded <- fmt.Sprint(r.Header.Get("X-Forwarded-For"), " ", r.Header.Get("X-Forwarded-Port"), " ", x.Source)
		return textResponse(200, ""), nil
	}}
	connect := func(e *edge, header []byte) (net.Conn, error) {
		conn := must[net.Conn](t)(net.Dial("tcp", e.address("main")))
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = conn.Write(header)
		secured := tls.Client(conn, &tls.Config{RootCAs: e.roots, ServerName: "app.test"})
		if err := secured.Handshake(); err != nil {
			return nil, err
		}
		fmt.Fprint(secured, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n")
		_, err := http.ReadResponse(bufio.NewReader(secured), nil)
		return conn, err
	}
	v1 := []byte("PROXY TCP4 192.0.2.7 192.0.2.1 1234 443\r\n")
	v2 := append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c"), 192, 0, 2, 7, 192, 0, 2, 1, 1234>>8, 1234&0xff, 443>>8, 443&0xff)
	local := []byte("\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00")

	trusting := newEdge(t, upstream, func(l *exchange.Listener) {
		l.Spec.ProxyProtocol = &resealv1.ProxyProtocol{TrustedCidrs: []string{"127.0.0.0/8"}}
	})
	for name, header := range map[string][]byte{"v1": v1, "v2": v2} {
		if _, err := connect(trusting, header); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if got := <-forwarded; got != "192.0.2.7 443 192.0.2.7:1234" {
			t.Errorf("%s: the backend is told %q", name, got)
		}
	}
	if conn, err := connect(trusting, local); err != nil {
		t.Error(err)
	} else if got, want := <-forwarded, "127.0.0.1 "+portOf(conn.RemoteAddr())+" "+conn.LocalAddr().String(); got != want {
		t.Errorf("LOCAL: the backend is told %q, want %q", got, want)
	}
	if _, err := connect(trusting, nil); err == nil {
		t.Error("a proxy without header is served")
	}
	if n := read(trusting.count("main"), func(c *counts) int { return c.errors["proxy_protocol"] }); n != 1 {
		t.Errorf("%d errors counted", n)
	}

	wary := newEdge(t, upstream, func(l *exchange.Listener) {
		l.Spec.ProxyProtocol = &resealv1.ProxyProtocol{TrustedCidrs: []string{"192.0.2.0/24"}}
	})
	if _, err := connect(wary, v1); err == nil {
		t.Error("a client chose its own address")
	}
	if conn, err := connect(wary, nil); err != nil {
		t.Error(err)
	} else if got := <-forwarded; !strings.HasSuffix(got, conn.LocalAddr().String()) {
		t.Errorf("the backend is told %q", got)
	}
}

func portOf(address net.Addr) string {
	_, port, _ := net.SplitHostPort(address.String())
	return port
}

func TestSlowHeader(t *testing.T) {
	e := newEdge(t, answering("x"), func(l *exchange.Listener) { l.Spec.Timeouts.Header = durationpb.New(100 * time.Millisecond) })
	conn := e.dial()
	go func() {
		for { // a byte at a time does not help
			if _, err := io.WriteString(conn, "G"); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if _, err := io.ReadAll(conn); errors.Is(err, context.DeadlineExceeded) {
		t.Error("the connection stays open")
	}
	conn.Close()
}

func TestMaxConnections(t *testing.T) {
	e := newEdge(t, answering("x"), func(l *exchange.Listener) { l.Spec.Limits = &resealv1.ListenerLimits{MaxConnections: 2} })
	c := e.count("main")
	first, second := e.dial(), e.dial()
	third := make(chan error, 1)
	go func() {
		conn, err := tls.Dial("tcp", e.address("main"), &tls.Config{RootCAs: e.roots, ServerName: "app.test"})
		if err == nil {
			conn.Close()
		}
		third <- err
	}()
	select {
	case err := <-third:
		t.Fatalf("a third connection was served: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if opened := read(c, func(c *counts) int { return c.opened }); opened != 2 {
		t.Errorf("%d opened", opened)
	}
	first.Close()
	if err := <-third; err != nil {
		t.Error(err)
	}
	second.Close()
	eventually(t, "all closed", func() bool { return read(c, func(c *counts) bool { return c.gone == 3 }) })
	e.apply(e.listener("main", func(l *exchange.Listener) { l.Spec.Limits = &resealv1.ListenerLimits{MaxConnections: 3} }))
	for range 3 {
		e.dial()
	}
}

// tcpPipe is a connection over loopback.
func tcpPipe(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	listener := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	defer listener.Close()
	dialed := must[net.Conn](t)(net.Dial("tcp", listener.Addr().String()))
	accepted := must[net.Conn](t)(listener.Accept())
	t.Cleanup(func() { dialed.Close(); accepted.Close() })
	return dialed.(*net.TCPConn), accepted.(*net.TCPConn)
}

// tcpEdge is an edge with protocol tls, whose tunnels end at the function.
func tcpEdge(t *testing.T, serve func(*net.TCPConn), change ...func(*exchange.Listener)) (*edge, *[]exchange.Exchange) {
	t.Helper()
	var seen []exchange.Exchange
	change = append([]func(*exchange.Listener){func(l *exchange.Listener) {
		l.Spec.Protocol = resealv1.Listener_PROTOCOL_TLS
		l.TLS.NextProtos = nil
	}}, change...)
	return newEdge(t, upstreamFuncs{tunnel: func(_ context.Context, x *exchange.Exchange) (exchange.Tunnel, error) {
		seen = append(seen, *x)
		if serve == nil {
			return nil, statusError{502, "connect_failure"}
		}
		ours, theirs := tcpPipe(t)
		go func() { defer theirs.Close(); serve(theirs) }()
		return ours, nil
	}}, change...), &seen
}

func TestTunnelHalfClose(t *testing.T) {
	e, seen := tcpEdge(t, func(backend *net.TCPConn) {
		data, err := io.ReadAll(backend) // to the client's end
		fmt.Fprintf(backend, "%d bytes, %v", len(data), err)
	})
	conn := e.dial(func(c *tls.Config) { c.NextProtos = nil })
	sent := bytes.Repeat([]byte("x"), 1<<20)
	if _, err := conn.Write(sent); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); string(got) != "1048576 bytes, <nil>" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	record := e.logged(1)
	if record["msg"] != "connection" || record["status"] != 0.0 || record["reason"] != "" || record["bytes_in"] != 1048576.0 || record["bytes_out"] != 20.0 {
		t.Errorf("logged %v", record)
	}
	if x := (*seen)[0]; x.Pool != "web" || x.ServerName != "app.test" || !x.First {
		t.Errorf("exchange %+v", x)
	}
	if n := read(e.count("main"), func(c *counts) int { return c.codes[0] }); n != 1 {
		t.Errorf("%d connections counted", n)
	}
}

func TestTunnelBackendEndsFirst(t *testing.T) {
	came := make(chan string, 1)
	e, _ := tcpEdge(t, func(backend *net.TCPConn) {
		fmt.Fprint(backend, "bye")
		_ = backend.CloseWrite()
		got, err := io.ReadAll(backend)
		came <- fmt.Sprintf("%s, %v", got, err)
	})
	conn := e.dial(func(c *tls.Config) { c.NextProtos = nil })
	if got, err := io.ReadAll(conn); string(got) != "bye" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	fmt.Fprint(conn, "still here")
	_ = conn.CloseWrite()
	if got := <-came; got != "still here, <nil>" {
		t.Errorf("the backend got %s", got)
	}
	if record := e.logged(1); record["reason"] != "" || record["bytes_in"] != 10.0 {
		t.Errorf("logged %v", record)
	}
}

func TestTunnelFailures(t *testing.T) {
	t.Run("reset", func(t *testing.T) {
		e, _ := tcpEdge(t, func(backend *net.TCPConn) {
			fmt.Fprint(backend, "part")
			_, _ = backend.Read(make([]byte, 2))
			_ = backend.SetLinger(0)
		})
		conn := e.dial(func(c *tls.Config) { c.NextProtos = nil })
		fmt.Fprint(conn, "go")
		if got, err := io.ReadAll(conn); err == nil {
			t.Errorf("the client takes %q for the whole", got)
		}
		if record := e.logged(1); record["reason"] != "reset" {
			t.Errorf("logged %v", record)
		}
	})
	t.Run("idle", func(t *testing.T) {
		e, _ := tcpEdge(t, func(backend *net.TCPConn) { _, _ = io.ReadAll(backend) },
			func(l *exchange.Listener) { l.Spec.Timeouts.Idle = durationpb.New(50 * time.Millisecond) })
		conn := e.dial(func(c *tls.Config) { c.NextProtos = nil })
		_, _ = io.ReadAll(conn)
		if record := e.logged(1); record["reason"] != "timeout_idle" {
			t.Errorf("logged %v", record)
		}
	})
	t.Run("client", func(t *testing.T) {
		e, _ := tcpEdge(t, func(backend *net.TCPConn) { _, _ = io.ReadAll(backend) })
		conn := e.dial(func(c *tls.Config) { c.NextProtos = nil })
		_ = conn.NetConn().(*net.TCPConn).SetLinger(0)
		conn.NetConn().Close()
		if record := e.logged(1); record["reason"] != "client_abort" {
			t.Errorf("logged %v", record)
		}
	})
	t.Run("no backend", func(t *testing.T) {
		e, seen := tcpEdge(t, nil)
		conn := e.dial(func(c *tls.Config) { c.NextProtos, c.ServerName, c.InsecureSkipVerify = nil, "other.test", true })
		_, _ = io.ReadAll(conn)
		if record := e.logged(1); record["reason"] != "connect_failure" || record["status"] != 502.0 {
			t.Errorf("logged %v", record)
		}
		if x := (*seen)[0]; x.ServerName != "" {
			t.Errorf("a client invented the name %q", x.ServerName)
		}
	})
	t.Run("no route", func(t *testing.T) {
		e, _ := tcpEdge(t, nil, func(l *exchange.Listener) {
			l.Route = func(string, string) (exchange.Match, bool) { return exchange.Match{}, false }
		})
		_, _ = io.ReadAll(e.dial(func(c *tls.Config) { c.NextProtos = nil }))
		if record := e.logged(1); record["reason"] != "no_route" {
			t.Errorf("logged %v", record)
		}
	})
}

// upgraded is a 101 response of an echo with a farewell.
func upgraded(protocol string, body io.ReadWriteCloser) *http.Response {
	return &http.Response{
		StatusCode: 101, Body: body, ContentLength: -1,
		Header: http.Header{"Upgrade": {protocol}, "Connection": {"Upgrade"}, "Sec-Websocket-Accept": {"x"}},
	}
}

func TestUpgrade(t *testing.T) {
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		if r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Connection") != "Upgrade" {
			return textResponse(200, "no upgrade"), nil
		}
		ours, theirs := tcpPipe(t)
		go func() {
			defer theirs.Close()
			_, _ = io.Copy(theirs, theirs)
			fmt.Fprint(theirs, "bye")
		}()
		protocol := "websocket"
		if r.URL.Path == "/other" {
			protocol = "other"
		}
		return upgraded(protocol, ours), nil
	}}, func(l *exchange.Listener) {
		l.Route = func(string, string) (exchange.Match, bool) {
			return exchange.Match{Pool: "web", RequestTimeout: 100 * time.Millisecond}, true
		}
	})
	conn := e.dial()
	// The first bytes of the tunnel come with the request.
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: keep-alive, upgrade\r\nUpgrade: websocket\r\n\r\nearly")
	reader := bufio.NewReader(conn)
	response := must[*http.Response](t)(http.ReadResponse(reader, nil))
	if response.StatusCode != 101 || response.Header.Get("Upgrade") != "websocket" || response.Header.Get("Sec-Websocket-Accept") != "x" {
		t.Fatalf("%d %v", response.StatusCode, response.Header)
	}
	early := make([]byte, 5)
	if _, err := io.ReadFull(reader, early); err != nil || string(early) != "early" {
		t.Fatalf("%q %v", early, err)
	}
	time.Sleep(150 * time.Millisecond) // the request's timeout does not end a tunnel
	fmt.Fprint(conn, "late")
	_ = conn.CloseWrite()
	if rest, err := io.ReadAll(reader); string(rest) != "latebye" || err != nil {
		t.Errorf("%q %v", rest, err)
	}
	if record := e.logged(1); record["status"] != 101.0 || record["reason"] != "" || record["bytes_in"] != 9.0 || record["bytes_out"] != 12.0 {
		t.Errorf("logged %v", record)
	}
	for _, request := range []string{"Upgrade: h2c", "Upgrade: websocket, h2c", "Upgrade: HTTP/2.0", "Upgrade: websocket\r\nContent-Length: 1"} {
		conn := e.dial()
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: upgrade\r\n%s\r\n\r\nx", request)
		response := must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil))
		if body := bodyOf(t, response); body != "no upgrade" {
			t.Errorf("%s: %d %q", request, response.StatusCode, body)
		}
	}
	conn = e.dial()
	fmt.Fprint(conn, "GET /other HTTP/1.1\r\nHost: app.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
	response = must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil))
	if bodyOf(t, response); response.StatusCode != 502 || response.Header.Get(ReasonHeader) != "protocol_error" {
		t.Errorf("a switch to another protocol: %d", response.StatusCode)
	}
}

// TestUpgradeIdle: a tunnel on which nothing moves is ended, and that is no fault of
// the client.
func TestUpgradeIdle(t *testing.T) {
	e := newEdge(t, upstreamFuncs{roundTrip: func(*http.Request, *exchange.Exchange) (*http.Response, error) {
		ours, _ := tcpPipe(t)
		return upgraded("websocket", ours), nil
	}}, func(l *exchange.Listener) { l.Spec.Timeouts.Idle = durationpb.New(100 * time.Millisecond) })
	conn := e.dial()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
	if got, err := io.ReadAll(conn); err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if record := e.logged(1); record["status"] != 101.0 || record["reason"] != "timeout_idle" {
		t.Errorf("logged %v", record)
	}
}
