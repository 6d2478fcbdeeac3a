package backend

import (
	"context"
	"net/http"
	"slices"
	"time"

	"golang.org/x/net/http2"

	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/exchange"
)

// h2Conn is an HTTP/2 connection. x/net/http2 speaks the protocol; reading,
// writing and closing of the connection stay with conn. How many streams are
// free is counted here: x/net/http2 is never asked under a lock, since its
// answer may wait for a Write that a stalled peer holds up.
type h2Conn struct {
	*pooled
	cc      *http2.ClientConn
	frames  *frames       // owned by Read
	settled chan struct{} // closed when the peer's first SETTINGS have been processed

	// Guarded by endpoint.mu.
	listed    bool // in its connSet
	limit     int  // how many streams the peer allows; 0 is not known yet
	streams   int  // requests granted and not over
	served    int
	answered  bool // a request
	owner     owner
	mixed     bool // streams of several clients are open
	idleSince time.Time
	retired   bool
	refused   int       // grants that x/net/http2 refused in a row
	hold      time.Time // no grant before
}

const (
	// maxStreams bounds the streams of one connection, so that those whose clients
	// take nothing never use up its window for the others.
	maxStreams = (1 << 30) / streamWindow
	// streamWindow is how much of an answer is buffered while its client takes
	// nothing.
	streamWindow = 256 << 10
	// maxRefused is after how many refused grants in a row a connection is given
	// up.
	maxRefused = 8
	// stuckAfter is how long a Write may take before the connection gets no more
	// requests until it is through.
	stuckAfter = 100 * time.Millisecond
)

// newTransport is what all HTTP/2 connections share.
func newTransport() *http2.Transport {
	t, err := http2.ConfigureTransports(&http.Transport{
		DisableCompression: true,
		HTTP2:              &http.HTTP2Config{MaxReceiveBufferPerStream: streamWindow},
	})
	if err != nil {
		panic(err) // only when it was configured before
	}
	t.MaxHeaderListSize = maxResponseHeader
	t.ReadIdleTimeout = 20 * time.Second
	t.PingTimeout = 5 * time.Second
	t.WriteByteTimeout = time.Minute // see h2Net.SetWriteDeadline
	return t
}

// h2Net is the net.Conn that x/net/http2 sees.
type h2Net struct {
	exchange.TLSConn // addresses, read deadlines, ConnectionState
	h                *h2Conn
}

// Read is called when x/net/http2 has processed what it read before.
func (n h2Net) Read(p []byte) (int, error) {
	n.h.heed()
	count, err := n.h.pooled.Read(p)
	f := n.h.frames
	wanted := !f.unwanted
	f.see(p[:count])
	if wanted && f.unwanted {
		n.h.retire()
	}
	return count, err
}

func (n h2Net) Write(p []byte) (int, error) {
	begin := time.Now()
	count, err := n.h.pooled.Write(p)
	if err == nil && time.Since(begin) > stuckAfter {
		n.h.e.serveAgain(n.h.key) // some may have waited for this one
	}
	return count, err
}

// SetWriteDeadline is called before each Write, with the time-out of the
// transport, and after it.
func (n h2Net) SetWriteDeadline(t time.Time) error {
	if !t.IsZero() {
		t = time.Time{}
		if limit := n.h.e.settings().bodyTimeout; limit > 0 {
			t = time.Now().Add(limit)
		}
	}
	return n.TLSConn.SetWriteDeadline(t)
}

// Close is called by x/net/http2 when the connection is broken, or idle after
// GOAWAY.
func (n h2Net) Close() error {
	n.h.pooled.Close()
	return nil
}

// newH2Conn starts HTTP/2 on c.
func newH2Conn(c *pooled) (*h2Conn, error) {
	h := &h2Conn{pooled: c, idleSince: time.Now(), frames: newFrames(), settled: make(chan struct{})}
	cc, err := c.e.pool.b.h2.NewClientConn(h2Net{c.TLS, h})
	if err != nil {
		return nil, fail(ReasonProtocolError, err)
	}
	h.cc = cc
	c.Hook(conn.Hooks{Leave: h.forget, Goodbye: h.goodbye, Broken: func() { cc.Close() }})
	c.Count(conn.Idle)
	return h, nil
}

// heed takes over what the peer's SETTINGS say, which x/net/http2 has processed
// by now. The first ones come first of all (RFC 9113 section 3.4).
func (h *h2Conn) heed() {
	if !h.frames.settings {
		return
	}
	h.frames.settings = false
	h.e.mu.Lock()
	first := h.limit == 0
	h.limit = int(min(h.frames.streams, maxStreams))
	known := h.limit > 0
	h.e.mu.Unlock()
	switch {
	case first && known:
		close(h.settled)
	case known:
		h.e.serveAgain(h.key)
	}
}

// awaitSettings waits until it is known how many streams the peer allows.
// Before that, x/net/http2 would give out more than that, and the peer refuse them.
func (h *h2Conn) awaitSettings(limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-h.settled:
		return nil
	case <-h.Ended():
		return fail(ReasonReset, errNoSettings)
	case <-timer.C:
		return fail(ReasonProtocolError, errNoSettings)
	}
}

// goodbye sends GOAWAY.
func (h *h2Conn) goodbye(deadline time.Time) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	_ = h.cc.Shutdown(ctx)
}

// forget takes a connection that is ending out of its set.
func (h *h2Conn) forget() {
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	h.unlist()
}

// unlist takes the connection out of its set. endpoint.mu is held.
func (h *h2Conn) unlist() {
	if !h.listed {
		return
	}
	h.listed = false
	if set := h.e.sets[h.key]; set != nil {
		if i := slices.Index(set.h2, h); i >= 0 {
			set.h2 = slices.Delete(set.h2, i, i+1)
		}
	}
}

// fits reports whether the connection may serve a call. endpoint.mu is held.
func (h *h2Conn) fits(w *waiter, s *settings) bool {
	if w.private && h.streams > 0 && (h.mixed || h.owner.client != w.call.Client) {
		return false // it is about to become this client's own
	}
	return !(w.fresh && h.served > 0) && s.mayShare(w.call, h)
}

// reserve takes a stream, if the connection has one free. endpoint.mu is held.
func (h *h2Conn) reserve(s *settings) bool {
	now := time.Now()
	if h.Closing() || h.retired || h.streams >= h.limit || now.Before(h.hold) ||
		h.Stuck(now, stuckAfter) || h.old(s, now) {
		return false
	}
	h.streams++
	h.served++
	h.Count(conn.Active)
	return true
}

// granted returns the reserved stream as a grant. endpoint.mu is held.
func (h *h2Conn) granted(w *waiter) grant {
	h.mixed = h.streams > 1 && (h.mixed || h.owner.client != w.call.Client)
	h.owner = h.owner.next(w.call)
	h.e.ownFor(w, &h.owner)
	return grant{h2: h, reused: h.served > 1, stale: h.served > 1}
}

// confirm asks x/net/http2 for the stream that reserve took, under no lock. It
// refuses while the connection ends, and for a moment after a body's end: then
// the stream is given back.
func (h *h2Conn) confirm() bool {
	granted := h.cc.ReserveNewRequest()
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	if granted {
		h.refused = 0
		return true
	}
	wait := 2 * time.Millisecond << h.refused
	h.refused++
	h.hold = time.Now().Add(wait)
	h.served--
	h.over()
	if h.refused >= maxRefused {
		h.retireLocked()
	}
	time.AfterFunc(wait, func() { h.e.serveAgain(h.key) })
	return false
}

// drop gives back a reserved stream that x/net/http2 knows nothing of.
func (h *h2Conn) drop() {
	h.e.mu.Lock()
	h.served--
	h.e.mu.Unlock()
	h.release(false)
}

// release notes that a stream is over, whether there was an answer on it, and
// gives what is free to waiters.
func (h *h2Conn) release(answered bool) {
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	h.answered = h.answered || answered
	h.over()
	settings := h.e.settings()
	surplus := h.streams == 0 && h.e.open > settings.maxOpen
	if h.retired || h.old(settings, time.Now()) || h.e.retired || surplus {
		h.retireLocked()
	}
	if set := h.e.sets[h.key]; set != nil && len(set.waiters) > 0 {
		h.e.serve(set, settings)
		h.e.dialMore(set, settings)
	}
}

// over counts the end of a stream. endpoint.mu is held.
func (h *h2Conn) over() {
	if h.streams--; h.streams == 0 {
		h.idleSince = time.Now()
		h.Count(conn.Idle)
	}
}

// serveAgain gives waiters what has become free since.
func (e *endpoint) serveAgain(key connKey) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if set := e.sets[key]; set != nil {
		e.serve(set, e.settings())
	}
}

// old reports whether the connection may not take more requests.
func (h *h2Conn) old(s *settings, now time.Time) bool {
	return s.maxRequests > 0 && h.served >= s.maxRequests ||
		s.maxLifetime > 0 && now.Sub(h.Created) >= s.maxLifetime
}

func (h *h2Conn) idleNow() bool { return h.streams == 0 }

// retire ends the connection, now or after its last stream.
func (h *h2Conn) retire() {
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	h.retireLocked()
}

// retireLocked is retire with endpoint.mu held.
func (h *h2Conn) retireLocked() {
	h.retired = true
	h.unlist()
	if h.streams == 0 {
		h.Close()
	}
}

// sweep closes the connection when it is idle for too long or too old.
// endpoint.mu is held.
func (h *h2Conn) sweep(s *settings, now time.Time) {
	idle := h.streams == 0 && (now.Sub(h.idleSince) >= s.idleTimeout || s.orphaned(h.served, h.owner))
	if idle || h.old(s, now) {
		h.retireLocked()
	}
}
