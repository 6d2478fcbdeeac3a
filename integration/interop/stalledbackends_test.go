package interop

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// hasty is a pool that soon gives up on what does not move, and tries once.
// A connection serves one request, and so comes into one state. No handshake waits
// for another.
const hasty = `  sessions: {mode: off}
  timeouts: {connect: 5s, handshake: %s, responseHeader: 2s, idle: 2s}
  connections: {closeTimeout: 300ms, maxRequests: 1}
  retries: {attempts: 0}
  protocol: %s
`

// stop is a state in which a backend stops.
type stop struct {
	name string
	h2   bool
	// play brings a connection into it.
	play func(*rawConn)
	// early is whether that is before the edge can send a request.
	early bool
	// upload is whether requests have a body, which does not end.
	upload bool
	// What requests end with, status and reason. Where the answer had begun, the
	// client sees it cut, and the status is the backend's.
	status int
	reason string
	cut    bool
}

var stops = []stop{
	{name: "no hello", early: true, play: func(*rawConn) {}, status: 502, reason: "handshake_failure"},
	{name: "half a hello", early: true, play: func(c *rawConn) {
		_, _ = c.tcp.Read(make([]byte, 1<<10))
		_, _ = c.tcp.Write([]byte{22, 3, 3, 0, 122, 2, 0, 0, 118, 3, 3, 1, 2, 3})
	}, status: 502, reason: "handshake_failure"},
	{name: "no answer", play: func(c *rawConn) { c.handshake().request() }, status: 504, reason: "timeout_header"},
	{name: "continue alone", play: func(c *rawConn) {
		if _, ok := c.handshake().request(); ok {
			c.say("HTTP/1.1 100 Continue\n\n")
		}
	}, status: 504, reason: "timeout_header"},
	{name: "half a head", play: func(c *rawConn) {
		if _, ok := c.handshake().request(); ok {
			c.say("HTTP/1.1 200 OK\nContent-Le")
		}
	}, status: 504, reason: "timeout_header"},
	{name: "half a body", play: func(c *rawConn) {
		if _, ok := c.handshake().request(); ok {
			c.say("HTTP/1.1 200 OK\nContent-Length: 10\n\nhalf")
		}
	}, status: 200, reason: "timeout_idle", cut: true},
	{name: "no end of chunks", play: func(c *rawConn) {
		if _, ok := c.handshake().request(); ok {
			c.say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n4\nhalf\n")
		}
	}, status: 200, reason: "timeout_idle", cut: true},
	{name: "half a trailer", play: func(c *rawConn) {
		if _, ok := c.handshake().request(); ok {
			c.say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n4\nhalf\n0\nX-Ch")
		}
	}, status: 200, reason: "timeout_idle", cut: true},
	{name: "half closed in a body", play: func(c *rawConn) {
		if _, ok := c.handshake().request(); ok {
			c.say("HTTP/1.1 200 OK\nContent-Length: 10\n\nhalf")
			_ = c.CloseWrite()
		}
	}, status: 200, reason: "reset", cut: true},
	{name: "half closed without an answer", play: func(c *rawConn) {
		if _, ok := c.handshake().request(); ok {
			_ = c.CloseWrite()
		}
	}, status: 502, reason: "reset"},
	{name: "reads no body", upload: true, play: func(c *rawConn) { c.handshake().request() }, status: 504, reason: "timeout_idle"},
	{name: "reads no body, answers half", upload: true, play: func(c *rawConn) {
		if _, ok := c.handshake().request(); ok {
			c.say("HTTP/1.1 200 OK\nContent-Length: 10\n\nhalf")
		}
	}, status: 200, reason: "timeout_idle", cut: true},

	{name: "h2 no settings", h2: true, early: true, play: func(c *rawConn) { c.handshake() }, status: 502, reason: "protocol_error"},
	{name: "h2 no answer", h2: true, play: func(c *rawConn) { c.h2Server().until(headers) }, status: 504, reason: "timeout_header"},
	{name: "h2 half a head", h2: true, play: func(c *rawConn) {
		if c.h2Server().until(headers) {
			_ = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.block(":status", "200")})
		}
	}, status: 504, reason: "timeout_header"},
	{name: "h2 half a body", h2: true, play: func(c *rawConn) {
		if c.h2Server().until(headers) {
			c.head(1, ":status", "200", "content-length", "10")
			_ = c.framer.WriteData(1, false, []byte("half"))
		}
	}, status: 200, reason: "timeout_idle", cut: true},
	{name: "h2 half a frame", h2: true, play: func(c *rawConn) {
		if c.h2Server().until(headers) {
			c.head(1, ":status", "200", "content-length", "10")
			_, _ = c.Write([]byte{0, 0, 10, 0, 1, 0, 0, 0, 1, 'h', 'a', 'l', 'f'})
		}
	}, status: 200, reason: "timeout_idle", cut: true},
	{name: "h2 goaway", h2: true, play: func(c *rawConn) {
		if c.h2Server().until(headers) {
			_ = c.framer.WriteGoAway(1, http2.ErrCodeNo, nil)
		}
	}, status: 504, reason: "timeout_header"},
	{name: "h2 goaway in a body", h2: true, play: func(c *rawConn) {
		if c.h2Server().until(headers) {
			c.head(1, ":status", "200", "content-length", "10")
			_ = c.framer.WriteData(1, false, []byte("half"))
			_ = c.framer.WriteGoAway(1, http2.ErrCodeNo, nil)
		}
	}, status: 200, reason: "timeout_idle", cut: true},
	{name: "h2 closed window", h2: true, upload: true, play: func(c *rawConn) {
		c.h2Server(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}).until(func(http2.Frame) bool { return false })
	}, status: 504, reason: "timeout_idle"},
	{name: "h2 reads no body", h2: true, upload: true, play: func(c *rawConn) {
		c.h2Server(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
		_ = c.framer.WriteWindowUpdate(0, 1<<30)
		c.until(headers)
	}, status: 504, reason: "timeout_idle"},
}

// stoppedRequests is how many requests get into each state, half of them of
// HTTP/2 clients.
const stoppedRequests = 4

// TestStoppedBackends: wherever a backend stops, requests to others are not
// delayed, not even on the same client connection; those that wait for it end in
// time, for the right reason; and nothing stays behind.
func TestStoppedBackends(t *testing.T) {
	s := newSite(t, "")
	good := s.Launch(t, peers.Go, peers.Options{})
	s.pool("good", []*peers.Backend{good}, "")
	var manifests strings.Builder
	for i, stop := range stops {
		name, alpn, protocol, handshake := fmt.Sprint("stop-", i), "http/1.1", "http1", "30s"
		if stop.h2 {
			alpn, protocol = "h2", "http2"
		}
		if stop.early {
			handshake = "1s"
		}
		server := s.rawServe(t, alpn, stop.play)
		manifests.WriteString(s.Pool(name, []*peers.Backend{server}, fmt.Sprintf(hasty, handshake, protocol)) + harness.Route(name, "web", host(name), name, ""))
	}
	s.WaitAcked(s.Apply(manifests.String()), s.edge)
	clients := [2]*http.Client{s.Client(t, s.address, false), s.Client(t, s.address, true)}
	others := s.watchOthers(t, clients, "good")
	before := s.held(t, clients)

	others.during(t, func() {
		var all sync.WaitGroup
		defer all.Wait()
		for i, stop := range stops {
			for n := range stoppedRequests {
				all.Go(func() {
					if err := stop.meet(t.Context(), clients[n%2], "https://"+host(fmt.Sprint("stop-", i))+stopPath(i, n)); err != nil {
						t.Errorf("%s, HTTP/%d: %v", stop.name, n%2+1, err)
					}
				})
			}
		}
	})
	s.check(t)
	harness.Settle(t, func() error {
		metrics := s.edge.Metrics()
		for i, stop := range stops {
			if open := metrics.Sum("reseal_backend_connections", "pool", fmt.Sprint("stop-", i)); open != 0 {
				return fmt.Errorf("%s: %v connections are left", stop.name, open)
			}
		}
		return nil
	})
	s.lets(t, clients, before)
}

// TestStoppedStream: streams of an HTTP/2 backend that stop don't hold back the
// others of their connection, as many as it takes.
func TestStoppedStream(t *testing.T) {
	s := newSite(t, "")
	server := s.rawServe(t, "h2", func(c *rawConn) {
		c.h2Server().until(func(f http2.Frame) bool {
			h, ok := f.(*http2.HeadersFrame)
			if !ok {
				return false
			}
			if path := c.path(h); path == peers.Small {
				c.answer(h.StreamID, peers.Body(peers.Small))
			} else if path == "/half" {
				c.head(h.StreamID, ":status", "200")
				_ = c.framer.WriteData(h.StreamID, false, []byte("half"))
			}
			return false
		})
	})
	s.pool("one", []*peers.Backend{server}, "  protocol: http2\n  connections: {maxPerEndpoint: 1}\n  timeouts: {idle: 3s, responseHeader: 3s}\n  retries: {attempts: 0}\n")
	clients := [2]*http.Client{s.Client(t, s.address, false), s.Client(t, s.address, true)}
	others := s.watchOthers(t, clients, "one")
	others.during(t, func() {
		half := stop{status: 200, reason: "timeout_idle", cut: true}
		silent := stop{status: 504, reason: "timeout_header"}
		upload := stop{status: 504, reason: "timeout_idle", upload: true}
		var all sync.WaitGroup
		defer all.Wait()
		for i, stop := range []stop{half, silent, upload} {
			for n := range 20 {
				all.Go(func() {
					path := []string{"/half", "/silent", "/upload"}[i]
					if err := stop.meet(t.Context(), clients[n%2], "https://"+host("one")+path); err != nil {
						t.Errorf("%s, HTTP/%d: %v", path, n%2+1, err)
					}
				})
			}
		}
	})
	harness.Settle(t, func() error {
		if n := s.PoolStats("one").Connections; n.Opened != 1 || n.Active != 0 || n.Idle != 1 {
			return fmt.Errorf("connections: %+v, want one that goes on", n)
		}
		return nil
	})
}

// stopPath is the path of a request into a state, by which the log is searched.
func stopPath(state, n int) string { return fmt.Sprintf("/%d/%d", state, n) }

// meet sends a request into a state.
func (stop stop) meet(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if stop.upload {
		request.Method, request.Body = http.MethodPost, io.NopCloser(zeros{})
	}
	started := time.Now()
	response, err := client.Do(request)
	var body []byte
	if err == nil {
		defer response.Body.Close()
		body, err = io.ReadAll(response.Body)
	}
	switch took := time.Since(started); {
	case took > 20*time.Second:
		return fmt.Errorf("it took %v", took)
	case stop.cut && err == nil:
		return fmt.Errorf("the answer came to its end: %s, %q", response.Status, body)
	case stop.cut && response != nil && string(body) != "half":
		return fmt.Errorf("%q came before the cut", body)
	case !stop.cut && (err != nil || response.StatusCode != stop.status || response.Header.Get("Reseal-Reason") != stop.reason):
		return fmt.Errorf("%v, %w", response, err)
	}
	return nil
}

// check looks for each request in the access log.
func (s *site) check(t *testing.T) {
	t.Helper()
	harness.Settle(t, func() error {
		logged := make(map[string]record)
		for _, r := range s.records(func(record) bool { return true }) {
			logged[r.Path] = r
		}
		for i, stop := range stops {
			for n := range stoppedRequests {
				if r := logged[stopPath(i, n)]; r.Status != stop.status || r.Reason != stop.reason {
					return fmt.Errorf("%s: logged as %+v", stop.name, r)
				}
			}
		}
		return nil
	})
}

// zeros is an endless body.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
