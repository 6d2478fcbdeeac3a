package backend

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestColdH2EndpointGetsOneConnection(t *testing.T) {
	s := serveH2(t, gate(32))
	x := newBench(t, []string{s.addr})
	wantNone(t, x.parallel(32, "/"))
	if n := s.opened.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
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
	resp, err := x.RoundTrip(newRequest(t, "GET", "/bytes/3000000", nil), newCall())
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

// An endpoint that does not take an upload, whether it stops to read or keeps its
// windows shut, is the one that is late, and not the client; so with several uploads at
// once.
func TestH2EndpointTakesNoUpload(t *testing.T) {
	for name, handle := range map[string]func(*serverConn){
		"it reads nothing": h2Until(isHeaders),
		"it opens no window": func(c *serverConn) {
			if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
				return
			}
			f := http2.NewFramer(c, c)
			f.WriteSettings()
			for {
				if _, err := f.ReadFrame(); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			end := make(chan struct{})
			s := serveRaw(t, func(c *serverConn) {
				handle(c)
				<-end
			})
			t.Cleanup(func() { close(end) })
			s.tls.NextProtos = []string{"h2"}
			x := newBench(t, []string{s.addr}, timeouts(func(b *resealv1.BackendTimeouts) { b.Idle = dur(600 * time.Millisecond) }))
			var uploads sync.WaitGroup
			for range 5 {
				uploads.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
					defer cancel()
					req := newRequest(t, "POST", "/", io.NopCloser(unending{ctx})).WithContext(ctx)
					req.ContentLength = -1
					_, err := x.RoundTrip(req, newCall())
					var e *Error
					if !errors.As(err, &e) || e.Reason != ReasonTimeoutIdle || e.Code != 504 || !ofEndpoint(err) {
						t.Errorf("%v", err)
					}
				})
			}
			uploads.Wait()
		})
	}
}

// A connection that was to serve one request ends when that is given up, though the
// endpoint answers nothing any more, not even a PING.
func TestSpentH2ConnectionOfSilentEndpoint(t *testing.T) {
	s := serveRaw(t, h2Until(func(f *http2.Framer, frame http2.Frame) bool {
		answers("half", false)(f, frame)
		return false
	}))
	s.tls.NextProtos = []string{"h2"}
	x := newBench(t, []string{s.addr}, timeouts(func(b *resealv1.BackendTimeouts) { b.Idle = dur(200 * time.Millisecond) }),
		connections(func(c *resealv1.Connections) {
			c.MaxRequests, c.CloseTimeout = 1, dur(200*time.Millisecond)
		}))
	resp, err := x.RoundTrip(newRequest(t, "GET", "/", nil), newCall())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(resp.Body); reasonOf(err) != ReasonTimeoutIdle {
		t.Errorf("%v", err)
	}
	resp.Body.Close()
	begin := time.Now()
	eventually(t, "the connection is closed", func() bool { return x.tally.get(func(c *tally) int { return c.closed }) == 1 })
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("it took %v", took)
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
