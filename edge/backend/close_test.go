package backend

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	notifyBoth  = resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH
	notifySent  = resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_SENT
	finOnly     = resealv1.CloseKind_CLOSE_KIND_FIN_WITHOUT_NOTIFY
	resetByPeer = resealv1.CloseKind_CLOSE_KIND_RESET_BY_PEER
	resetByUs   = resealv1.CloseKind_CLOSE_KIND_RESET_BY_US
	closeLate   = resealv1.CloseKind_CLOSE_KIND_TIMEOUT
)

// onGoroutines has connections read and written by goroutines, as those are whose
// servers may renegotiate.
func onGoroutines(p *resealv1.BackendPool) {
	p.Tls.Renegotiation = resealv1.BackendTLS_RENEGOTIATION_ONCE
}

// bothWays runs a test with connections on loops and on goroutines.
func bothWays(t *testing.T, test func(t *testing.T, way option)) {
	t.Run("on loops", func(t *testing.T) { test(t, func(*resealv1.BackendPool) {}) })
	t.Run("on goroutines", func(t *testing.T) { test(t, onGoroutines) })
}

// A strict server: whatever happens to requests, each connection that we end
// must end with close_notify, never with a bare FIN or a reset.
func TestEveryCloseIsClean(t *testing.T) { bothWays(t, everyCloseIsClean) }

func everyCloseIsClean(t *testing.T, way option) {
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, site())
			s.tls.MaxVersion = version
			x := newBench(t, []string{s.addr}, way, connections(func(c *resealv1.Connections) {
				c.IdleTimeout, c.MaxRequests = dur(20*time.Millisecond), 3
				c.CloseTimeout = dur(2 * time.Second)
			}))
			for range 5 {
				x.get("/bytes/100") // ended by maxRequests
			}
			eventually(t, "idle connections are closed", func() bool {
				return x.tally.get(func(c *tally) int { return c.opened - c.closed }) == 0
			})
			for i := range 20 { // aborted in the middle of the body
				ctx, cancel := context.WithCancel(t.Context())
				resp, err := x.RoundTrip(newRequest(t, "GET", "/bytes/262144", nil).WithContext(ctx), newCall())
				if err != nil {
					t.Fatal(err)
				}
				io.ReadFull(resp.Body, make([]byte, 1000))
				if i%2 == 0 {
					cancel()
				}
				resp.Body.Close()
				cancel()
			}
			x.set(func(p *resealv1.BackendPool) {
				p.Connections.MaxRequests = 0
				p.Connections.IdleTimeout = dur(time.Minute)
			})
			x.get("/bytes/100")
			x.apply("another identity") // the pool starts anew
			x.get("/bytes/100")
			x.stop()
			eventually(t, "all ended: "+s.describe(), func() bool { return s.open.Load() == 0 })
			s.mu.Lock()
			defer s.mu.Unlock()
			if len(s.ends) != 1 || s.ends["close_notify"] != int(s.opened.Load()) {
				t.Errorf("%d connections ended %v", s.opened.Load(), s.ends)
			}
			if n := x.tally.kinds[notifyBoth]; n != int(s.opened.Load()) {
				t.Errorf("counted %v", x.tally.kinds)
			}
			if x.h.uncleanCount() != 0 {
				t.Errorf("%d unclean", x.h.uncleanCount())
			}
		})
	}
}

// The rest of a small body is read, so that its connection lives.
func TestAbortOfSmallBodyKeepsConnection(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	for range 10 {
		resp, err := x.RoundTrip(newRequest(t, "GET", "/bytes/60000", nil), newCall())
		if err != nil {
			t.Fatal(err)
		}
		io.ReadFull(resp.Body, make([]byte, 10))
		resp.Body.Close()
		eventually(t, "the connection is idle", func() bool { return x.tally.get(func(c *tally) int { return c.idle }) == 1 })
	}
	if n := s.opened.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// However an answer's end and its abandonment meet, the connection serves one
// request at a time. With two owners one of 100,000 requests got the wrong
// answer: RESEAL_LONG=1 makes as many as it takes.
func TestConnectionHasOneOwner(t *testing.T) {
	workers, requests := 4, 500
	if os.Getenv("RESEAL_LONG") != "" {
		workers, requests = 16, 15_000
	}
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.URL.Path) }))
	x := newBench(t, []string{s.addr})
	var all sync.WaitGroup
	for worker := range workers {
		all.Go(func() {
			for i := range requests {
				path := fmt.Sprintf("/%d/%d", worker, i)
				resp, err := x.RoundTrip(newRequest(t, "GET", path, nil), newCall())
				if err != nil {
					t.Errorf("%s: %v", path, err)
					return
				}
				// The end is there already, so both happen at once.
				var start atomic.Bool
				var closing sync.WaitGroup
				closing.Go(func() {
					for !start.Load() {
						runtime.Gosched()
					}
					resp.Body.Close()
				})
				start.Store(true)
				body, err := io.ReadAll(resp.Body)
				if err == nil && string(body) != path || !strings.HasPrefix(path, string(body)) {
					t.Errorf("%s was answered %q", path, body)
				}
				closing.Wait()
			}
		})
	}
	all.Wait()
}

// How ends that the peer begins are classified, while the connection is idle.
func TestPeerEndsIdleConnection(t *testing.T) { bothWays(t, peerEndsIdleConnection) }

func peerEndsIdleConnection(t *testing.T, way option) {
	for name, c := range map[string]struct {
		end     func(*serverConn)
		kind    resealv1.CloseKind
		unclean int
	}{
		"close_notify then FIN": {func(c *serverConn) { c.Conn.CloseWrite(); drainConn(c) }, notifyBoth, 0},
		"bare FIN":              {func(c *serverConn) { c.raw.Conn.(*net.TCPConn).CloseWrite(); drainConn(c) }, finOnly, 1},
		"RST":                   {func(c *serverConn) { c.raw.Conn.(*net.TCPConn).SetLinger(0); c.raw.Conn.Close() }, resetByPeer, 1},
		"unasked bytes": {func(c *serverConn) {
			io.WriteString(c, "HTTP/1.1 408 Request Timeout\r\n\r\n")
			drainConn(c)
		}, notifyBoth, 0},
	} {
		t.Run(name, func(t *testing.T) {
			end := make(chan struct{})
			s := serveRaw(t, func(sc *serverConn) {
				br := bufio.NewReader(sc)
				if _, _, err := request(br); err != nil {
					return
				}
				io.WriteString(sc, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				<-end
				c.end(sc)
			})
			x := newBench(t, []string{s.addr}, way)
			x.get("/")
			close(end)
			eventually(t, "the close is counted", func() bool { return x.tally.get(func(c *tally) int { return c.closed }) == 1 })
			x.tally.with(func() {
				if x.tally.kinds[c.kind] != 1 {
					t.Errorf("counted %v, want %v", x.tally.kinds, c.kind)
				}
				if wantPeer := name != "unasked bytes"; (x.tally.byPeer == 1) != wantPeer {
					t.Errorf("by peer: %d", x.tally.byPeer)
				}
			})
			if n := x.h.uncleanCount(); n != c.unclean {
				t.Errorf("%d unclean, want %d", n, c.unclean)
			}
		})
	}
}

// drainConn reads to the client's end and answers with close_notify.
func drainConn(c *serverConn) {
	io.Copy(io.Discard, c)
	c.Conn.CloseWrite()
}

// How our own close is classified by what the peer does.
func TestWeEndConnection(t *testing.T) { bothWays(t, weEndConnection) }

func weEndConnection(t *testing.T, way option) {
	for name, c := range map[string]struct {
		answer  func(*serverConn)
		kind    resealv1.CloseKind
		unclean int
	}{
		"answered":     {drainConn, notifyBoth, 0},
		"FIN only":     {func(c *serverConn) { io.Copy(io.Discard, c); c.raw.Conn.Close() }, notifySent, 0},
		"not answered": {func(c *serverConn) { time.Sleep(400 * time.Millisecond) }, closeLate, 1},
		"keeps sending": {func(c *serverConn) {
			for {
				if _, err := c.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}, resetByUs, 1},
		"answers then resets": {func(c *serverConn) {
			io.Copy(io.Discard, c)
			c.Conn.CloseWrite()
			c.raw.Conn.(*net.TCPConn).SetLinger(0)
		}, notifyBoth, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveRaw(t, func(sc *serverConn) {
				br := bufio.NewReader(sc)
				if _, _, err := request(br); err != nil {
					return
				}
				io.WriteString(sc, "HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\nok")
				c.answer(sc)
			})
			x := newBench(t, []string{s.addr}, way)
			resp, err := x.RoundTrip(newRequest(t, "GET", "/", nil), newCall())
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			eventually(t, "the close is counted", func() bool { return x.tally.get(func(c *tally) int { return c.closed }) == 1 })
			x.tally.with(func() {
				if x.tally.kinds[c.kind] != 1 || x.tally.byPeer != 0 {
					t.Errorf("counted %v, by peer %d, want %v", x.tally.kinds, x.tally.byPeer, c.kind)
				}
			})
			if n := x.h.uncleanCount(); n != c.unclean {
				t.Errorf("%d unclean, want %d", n, c.unclean)
			}
		})
	}
}

// A close waits for a Write under way, while the peer writes as well.
func TestCloseDuringWrite(t *testing.T) {
	got := make(chan error, 1)
	s := serveRaw(t, func(c *serverConn) {
		br := bufio.NewReader(c)
		if _, err := http.ReadRequest(br); err != nil {
			got <- err
			return
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
		c.Write(pattern(3_000_000)) // blocks until the client reads
		io.Copy(io.Discard, br)
		_, err := c.Read(make([]byte, 1))
		got <- err
		c.Conn.CloseWrite()
	})
	x := newBench(t, []string{s.addr}, connections(func(c *resealv1.Connections) { c.CloseTimeout = dur(5 * time.Second) }))
	body := io.NopCloser(endless{})
	resp, err := x.RoundTrip(newRequest(t, "POST", "/", body), newCall())
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond) // our Write blocks: the server does not read
	resp.Body.Close()
	if err := <-got; err != io.EOF {
		t.Errorf("the server saw %v, want close_notify", err)
	}
	eventually(t, "the close is counted", func() bool { return x.tally.get(func(c *tally) int { return c.kinds[notifyBoth] }) == 1 })
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// A server that closes after each response: the counts at both sides are equal,
// and every connection after the first is resumed.
func TestCountsEqualServers(t *testing.T) {
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, site())
			s.tls.MaxVersion = version
			x := newBench(t, []string{s.addr}, connections(func(c *resealv1.Connections) { c.CloseTimeout = dur(5 * time.Second) }))
			const workers, each = 8, 125
			x.get("/close")
			eventually(t, "the first connection is over", func() bool { return x.tally.get(func(c *tally) int { return c.closed }) == 1 })
			var wg sync.WaitGroup
			for range workers {
				wg.Go(func() {
					for range each {
						if _, body, err := x.try(newRequest(t, "GET", "/close", nil), nil); err != nil || string(body) != "bye" {
							t.Errorf("%q %v", body, err)
							return
						}
					}
				})
			}
			wg.Wait()
			x.stop()
			full, resumed := int(s.full.Load()), int(s.resumed.Load())
			if x.tally.full != full || x.tally.resumed != resumed || full+resumed < workers*each {
				t.Errorf("we counted %d full, %d resumed; the server %d, %d", x.tally.full, x.tally.resumed, full, resumed)
			}
			if full != 1 && version == tls.VersionTLS12 {
				t.Errorf("%d full handshakes, want 1", full)
			}
			misses := 0
			for _, n := range x.tally.misses {
				misses += n
			}
			if misses != x.tally.full {
				t.Errorf("misses %v for %d full handshakes", x.tally.misses, x.tally.full)
			}
			if n := x.tally.kinds[notifyBoth]; n != x.tally.closed {
				t.Errorf("%d connections ended %v", x.tally.closed, x.tally.kinds)
			}
		})
	}
}

// Tickets of TLS 1.3 are collected from connections that are only idle.
func TestTicketsArriveOnIdleConnections(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr}, connections(func(c *resealv1.Connections) { c.MaxRequests = 1 }))
	for range 5 {
		x.get("/bytes/1")
	}
	if f, r := s.full.Load(), s.resumed.Load(); f != 1 || r != 4 {
		t.Errorf("%d full, %d resumed", f, r)
	}
}

// A session that breaks handshakes costs a second connection, not an error.
func TestHandshakeIsRedoneInFull(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	first := true
	x.h.breakIt = func() bool { defer func() { first = false }(); return first }
	x.get("/bytes/1")
	x.tally.with(func() {
		if x.tally.failed != 1 || x.tally.full != 1 || x.tally.opened != 1 {
			t.Errorf("%d failed, %d full, %d opened", x.tally.failed, x.tally.full, x.tally.opened)
		}
	})
}

// The socket of a handshake that failed is not reset under the alert.
func TestFailedHandshakeIsEndedGently(t *testing.T) {
	s := serve(t, site(), "other.test")
	x := newBench(t, []string{s.addr})
	_, _, err := x.try(newRequest(t, "GET", "/", nil), nil)
	wantReason(t, err, ReasonVerifyFailure, 502)
	eventually(t, "the server knows", func() bool { return s.open.Load() == 0 })
	if s.count("reset") != 0 {
		t.Errorf("ends %s", s.describe())
	}
	if x.tally.get(func(c *tally) int { return c.failed }) != 2 { // with its retry
		t.Errorf("%d failed handshakes", x.tally.failed)
	}
}

func TestShutdownEndsRequestsUnderWay(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		resp, err := x.RoundTrip(newRequest(t, "GET", "/bytes/10000000", nil), newCall())
		if err != nil {
			t.Fatal(err)
		}
		x.end()
		if _, err := io.Copy(io.Discard, resp.Body); err == nil {
			t.Error("the body came whole after the end")
		}
		resp.Body.Close()
		_, _, err = x.try(newRequest(t, "GET", "/", nil), nil)
		wantReason(t, err, ReasonOverloaded, 503)
		if n := s.count("reset") + s.count("fin without notify"); n != 0 {
			t.Errorf("ends %s", s.describe())
		}
	})
}

// TestShutdownWhileDialling: a connection may be closed before anything runs on
// it. The race detector sees most of what could be wrong with that.
func TestShutdownWhileDialling(t *testing.T) {
	for proto, s := range map[string]*server{"h1": serve(t, site()), "h2": serveH2(t, site())} {
		t.Run(proto, func(t *testing.T) {
			for range 30 {
				x := newBench(t, []string{s.addr})
				ctx, cancel := context.WithCancel(t.Context())
				gone := make(chan struct{})
				go func() {
					defer close(gone)
					_, _, _ = x.try(newRequest(t, "GET", "/", nil).WithContext(ctx), nil)
				}()
				eventually(t, "no connection", func() bool { return x.tally.get(func(c *tally) int { return c.opened }) > 0 })
				x.end()
				cancel()
				<-gone
				x.stop()
			}
		})
	}
}

func BenchmarkGet1K(b *testing.B) {
	for _, parallel := range []int{1, 16} {
		b.Run(fmt.Sprint(parallel), func(b *testing.B) {
			s := serve(b, site())
			x := newBench(b, []string{s.addr})
			b.SetParallelism(parallel)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				buf := bytes.NewBuffer(make([]byte, 0, 2048))
				for pb.Next() {
					resp, err := x.RoundTrip(newRequest(b, "GET", "/bytes/1024", nil), newCall())
					if err != nil {
						b.Fatal(err)
					}
					buf.Reset()
					buf.ReadFrom(resp.Body)
					resp.Body.Close()
				}
			})
		})
	}
}
