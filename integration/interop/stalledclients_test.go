package interop

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// stall is a state in which a client stops.
type stall struct {
	name string
	// play brings a connection into it.
	play func(c *rawConn, r target)
	// What the log says of its request, if it made one that got on.
	status int
	reason string
}

// target is what a stalled client asks for.
type target struct {
	host, path string
	stopped    <-chan struct{} // closed at the end of the test
}

// get is the head of a request of HTTP/1, but for its end.
func (r target) get(do string) string {
	return fmt.Sprintf("GET %s?do=%s HTTP/1.1\nHost: %s\n", r.path, do, r.host)
}

func (r target) post(do string) string { return "POST" + strings.TrimPrefix(r.get(do), "GET") }

// request is one of HTTP/2.
func (r target) request(c *rawConn, stream uint32, method, do string, end bool, more ...string) {
	fields := append([]string{":method", method, ":scheme", "https", ":authority", r.host, ":path", r.path + "?do=" + do}, more...)
	_ = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.block(fields...), EndHeaders: true, EndStream: end})
}

// pause waits, and says whether the test goes on.
func (r target) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-r.stopped:
		return false
	case <-timer.C:
		return true
	}
}

// h1 and h2 connect as a client.
func (c *rawConn) h1() *rawConn { return c.connect("http/1.1") }

func (c *rawConn) h2Client(settings ...http2.Setting) *rawConn {
	c.connect("h2").h2()
	_, _ = io.WriteString(c.Conn, http2.ClientPreface)
	_ = c.framer.WriteSettings(settings...)
	return c
}

func (c *rawConn) connect(alpn string) *rawConn {
	c.config.NextProtos = []string{alpn}
	c.Conn = tls.Client(c.tcp, c.config)
	_ = c.Conn.Handshake()
	c.reader = bufio.NewReader(c.Conn)
	return c
}

// drain reads frames until the connection ends.
func (c *rawConn) drain() { c.until(func(http2.Frame) bool { return false }) }

var wide = http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30}

var stalls = []stall{
	{name: "no hello", play: func(*rawConn, target) {}},
	{name: "half a hello", play: func(c *rawConn, _ target) { _, _ = c.tcp.Write(hello()[:100]) }},
	{name: "no Finished", play: func(c *rawConn, _ target) { _, _ = c.tcp.Write(hello()) }},
	{name: "no request", play: func(c *rawConn, _ target) { c.h1() }},
	{name: "half a head", play: func(c *rawConn, r target) { c.h1().say(strings.TrimSuffix(r.get("answer"), ".test\n")) }},
	{name: "half a second head", play: func(c *rawConn, r target) {
		c.h1().say(r.get("body") + "\n" + r.get("body"))
	}, status: 200},
	{name: "no body", play: func(c *rawConn, r target) {
		c.h1().say(r.post("body") + "Content-Length: 10\n\n")
	}, status: 408, reason: "timeout_body"},
	{name: "half a body", play: func(c *rawConn, r target) {
		c.h1().say(r.post("body") + "Content-Length: 10\n\nhalf")
	}, status: 408, reason: "timeout_body"},
	{name: "half a chunk", play: func(c *rawConn, r target) {
		c.h1().say(r.post("body") + "Transfer-Encoding: chunked\n\n10\nhalf")
	}, status: 408, reason: "timeout_body"},
	{name: "no last chunk", play: func(c *rawConn, r target) {
		c.h1().say(r.post("body") + "Transfer-Encoding: chunked\n\n4\nhalf\n0\nX-Tra")
	}, status: 408, reason: "timeout_body"},
	{name: "trickles a body", play: func(c *rawConn, r target) {
		c.h1().say(r.post("body") + "Content-Length: 1000\n\n")
		for r.pause(300 * time.Millisecond) {
			if _, err := c.Write([]byte{'x'}); err != nil {
				return
			}
		}
	}, status: 408, reason: "timeout_body"},
	{name: "takes no answer", play: func(c *rawConn, r target) {
		c.h1().say(r.get("answer") + "\n")
	}, status: 499, reason: "client_stalled"},
	{name: "takes no answers", play: func(c *rawConn, r target) {
		c.h1().say(strings.Repeat(r.get("answer")+"\n", 10))
	}, status: 499, reason: "client_stalled"},
	{name: "half closed in a body", play: func(c *rawConn, r target) {
		c.h1().say(r.post("body") + "Content-Length: 10\n\nhalf")
		_ = c.CloseWrite()
	}, status: 499, reason: "client_abort"},
	{name: "half closed, takes no answer", play: func(c *rawConn, r target) {
		c.h1().say(r.get("answer") + "\n")
		_ = c.CloseWrite()
	}, status: 499, reason: "client_stalled"},
	{name: "leaves", play: func(c *rawConn, r target) {
		c.h1().say(r.get("wait") + "\n")
		r.pause(500 * time.Millisecond) // so that it has got to the backend
		c.tcp.Close()
	}, status: 499, reason: "client_abort"},

	{name: "h2 no preface", play: func(c *rawConn, _ target) { c.connect("h2") }},
	{name: "h2 half a preface", play: func(c *rawConn, _ target) { _, _ = io.WriteString(c.connect("h2"), http2.ClientPreface[:10]) }},
	{name: "h2 no settings", play: func(c *rawConn, _ target) { _, _ = io.WriteString(c.connect("h2"), http2.ClientPreface) }},
	{name: "h2 no request", play: func(c *rawConn, _ target) { c.h2Client() }},
	{name: "h2 half a head", play: func(c *rawConn, r target) {
		_ = c.h2Client().framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.block(":method", "GET")})
	}},
	{name: "h2 half a frame", play: func(c *rawConn, _ target) { _, _ = c.h2Client().Write([]byte{0, 1, 0, 1, 4, 0, 0, 0, 1, 0x82}) }},
	{name: "h2 no body", play: func(c *rawConn, r target) {
		r.request(c.h2Client(), 1, "POST", "body", false)
		c.drain()
	}, status: 408, reason: "timeout_body"},
	{name: "h2 half a body", play: func(c *rawConn, r target) {
		r.request(c.h2Client(), 1, "POST", "body", false, "content-length", "10")
		_ = c.framer.WriteData(1, false, []byte("half"))
		c.drain()
	}, status: 408, reason: "timeout_body"},
	{name: "h2 closed window", play: func(c *rawConn, r target) {
		r.request(c.h2Client(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}), 1, "GET", "answer", true)
		c.drain()
	}, status: 499, reason: "client_stalled"},
	{name: "h2 closed window of the connection", play: func(c *rawConn, r target) {
		r.request(c.h2Client(wide), 1, "GET", "answer", true)
		c.drain()
	}, status: 499, reason: "client_stalled"},
	{name: "h2 closed window, pings", play: func(c *rawConn, r target) {
		r.request(c.h2Client(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}), 1, "GET", "answer", true)
		reading := make(chan struct{})
		go func() {
			defer close(reading)
			_, _ = io.Copy(io.Discard, c.Conn)
		}()
		for r.pause(300*time.Millisecond) && c.framer.WritePing(false, [8]byte{}) == nil {
		}
		c.tcp.Close()
		<-reading
	}, status: 499, reason: "client_stalled"},
	{name: "h2 takes no frames", play: func(c *rawConn, r target) {
		r.request(c.h2Client(wide), 1, "GET", "answer", true)
		_ = c.framer.WriteWindowUpdate(0, 1<<30)
	}, status: 499, reason: "client_stalled"},
	{name: "h2 resets", play: func(c *rawConn, r target) {
		r.request(c.h2Client(), 1, "GET", "wait", true)
		r.pause(500 * time.Millisecond)
		_ = c.framer.WriteRSTStream(1, http2.ErrCodeCancel)
		c.drain()
	}, status: 499, reason: "client_abort"},
}

// hello is a ClientHello.
func hello() []byte {
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() {
		defer theirs.Close()
		_ = tls.Client(theirs, &tls.Config{ServerName: harness.SiteName}).Handshake()
	}()
	buffer := make([]byte, 4096)
	n, _ := ours.Read(buffer)
	return buffer[:n]
}

// stalledAnswer is larger than what anybody keeps on the way, and a client's
// window of a whole connection.
const stalledAnswer = 64 << 20

// willing does what a request asks for, and counts what it has under way.
type willing struct{ underWay atomic.Int64 }

func (h *willing) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == peers.Small {
		peers.Handler(false).ServeHTTP(w, r)
		return
	}
	h.underWay.Add(1)
	defer h.underWay.Add(-1)
	switch r.URL.Query().Get("do") {
	case "answer":
		w.Header().Set("Content-Length", fmt.Sprint(stalledAnswer))
		_, _ = io.CopyN(w, zeros{}, stalledAnswer)
	case "body":
		_, _ = io.Copy(io.Discard, r.Body)
	case "wait":
		<-r.Context().Done()
	}
}

// TestStoppedClients: wherever a client stops, others are not delayed, even where
// all share one connection to the backend; it is ended in time, for the right
// reason; and nothing stays behind, at the edge and at the backend.
func TestStoppedClients(t *testing.T) {
	s := newSite(t, "  timeouts: {handshake: 2s, header: 2s, idle: 2s}\n")
	handler := &willing{}
	backends := []*peers.Backend{s.Launch(t, goWith(handler), peers.Options{HTTP2: true})}
	pools := []string{"h1", "h2"}
	s.pool("h1", backends, "  protocol: http1\n")
	s.pool("h2", backends, "  protocol: http2\n  connections: {maxPerEndpoint: 1}\n")
	clients := [2]*http.Client{s.Client(t, s.address, false), s.Client(t, s.address, true)}
	others := s.watchOthers(t, clients, pools...)
	before := s.held(t, clients)

	others.during(t, func() {
		stopped := make(chan struct{})
		var playing sync.WaitGroup
		defer playing.Wait()
		defer close(stopped)
		var conns []net.Conn
		defer func() {
			for _, conn := range conns {
				conn.Close()
			}
		}()
		for i, stall := range stalls {
			for n, pool := range pools {
				conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", s.address)
				if err != nil {
					t.Fatal(err)
				}
				conns = append(conns, conn)
				_ = conn.(*net.TCPConn).SetReadBuffer(64 << 10) // the sooner it is full
				config := s.ClientTLS()
				config.ServerName = host(pool)
				playing.Go(func() {
					stall.play(&rawConn{tcp: conn.(*net.TCPConn), config: config}, target{host(pool), stopPath(i, n), stopped})
				})
			}
		}
		s.stalled(t, pools)
		harness.Settle(t, func() error {
			// Those of the others are kept, one per client and name.
			if open := s.edge.Metrics().Sum("reseal_frontend_connections"); open > 4 {
				return fmt.Errorf("%v connections of clients are open", open)
			}
			return nil
		})
	})
	harness.Settle(t, func() error {
		if n := handler.underWay.Load(); n != 0 {
			return fmt.Errorf("the backend still serves %d requests", n)
		}
		return nil
	})
	s.lets(t, clients, before)
}

// stalled waits for all requests in the access log.
func (s *site) stalled(t *testing.T, pools []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		var wrong []string
		logged := make(map[string]record)
		for _, r := range s.records(func(record) bool { return true }) {
			logged[r.Path] = r
		}
		for i, stall := range stalls {
			for n, pool := range pools {
				if r := logged[stopPath(i, n)]; r.Status != stall.status || r.Reason != stall.reason {
					wrong = append(wrong, fmt.Sprintf("%s, pool %s: want %d %s, logged as %+v", stall.name, pool, stall.status, stall.reason, r))
				}
			}
		}
		if len(wrong) == 0 {
			return
		}
		if ctx.Err() != nil {
			t.Error(strings.Join(wrong, "\n"))
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
