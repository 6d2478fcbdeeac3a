package backend

import (
	"context"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// h2Conn is an HTTP/2 connection. x/net/http2 speaks the protocol; reading,
// writing and closing of the connection stay with conn.
type h2Conn struct {
	*conn
	cc *http2.ClientConn

	started atomic.Bool   // cc is set
	known   atomic.Bool   // settled is closed
	settled chan struct{} // closed when the peer's SETTINGS have been processed

	// Guarded by endpoint.mu.
	listed    bool // in its connSet
	streams   int  // requests granted and not over
	served    int
	answered  bool // a request
	owner     owner
	idleSince time.Time
	retired   bool
}

// h2Net is the net.Conn that x/net/http2 sees.
type h2Net struct {
	TLSConn // addresses, deadlines, ConnectionState
	h       *h2Conn
}

// Read is called when x/net/http2 has processed what it read before.
func (n h2Net) Read(p []byte) (int, error) {
	n.h.checkSettings()
	return n.h.conn.Read(p)
}

func (n h2Net) Write(p []byte) (int, error) { return n.h.conn.Write(p) }

// Close is called by x/net/http2 when the connection is broken, or idle after
// GOAWAY.
func (n h2Net) Close() error {
	n.h.conn.close()
	return nil
}

// newH2Conn starts HTTP/2 on c.
func newH2Conn(c *conn, transport *http2.Transport) (*h2Conn, error) {
	h := &h2Conn{conn: c, idleSince: time.Now(), settled: make(chan struct{})}
	cc, err := transport.NewClientConn(h2Net{c.tc, h})
	if err != nil {
		return nil, fail(ReasonProtocolError, err)
	}
	h.cc = cc
	h.started.Store(true)
	h.checkSettings()
	c.hooks.Store(&hooks{leave: h.forget, goodbye: h.goodbye, broken: func() { cc.Close() }})
	c.count(gaugeIdle)
	return h, nil
}

// checkSettings notes when the peer's SETTINGS, which come first (RFC 9113
// section 3.4), have been processed.
func (h *h2Conn) checkSettings() {
	if h.known.Load() || !h.started.Load() || h.cc.State().MaxConcurrentStreams == 0 {
		return
	}
	if h.known.CompareAndSwap(false, true) {
		close(h.settled)
	}
}

// awaitSettings waits until it is known how many streams the peer allows.
// Before, x/net/http2 would give out more than that, and the peer refuse them.
func (h *h2Conn) awaitSettings(limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-h.settled:
		return nil
	case <-h.ended:
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
	return !(w.fresh && h.served > 0) && s.mayShare(w.call, h)
}

// reserve takes a stream, if the connection has one free. endpoint.mu is held.
func (h *h2Conn) reserve(s *settings) bool {
	if h.closing.Load() || h.retired || h.old(s, time.Now()) || !h.cc.ReserveNewRequest() {
		return false
	}
	h.streams++
	h.served++
	h.count(gaugeActive)
	return true
}

// granted returns the reserved stream as a grant. endpoint.mu is held.
func (h *h2Conn) granted(w *waiter) grant {
	h.owner = ownerOf(w.call)
	return grant{h2: h, reused: h.served > 1, stale: h.served > 1}
}

// unreserve gives back a reserved stream that was not used.
func (h *h2Conn) unreserve() {
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	// x/net/http2 takes a reservation back only by a request.
	if req, err := http.NewRequestWithContext(canceled, http.MethodGet, "https://unused.invalid/", nil); err == nil {
		_, _ = h.cc.RoundTrip(req)
	}
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
	h.streams--
	h.answered = h.answered || answered
	settings := h.e.settings()
	if h.streams == 0 {
		h.idleSince = time.Now()
		h.count(gaugeIdle)
	}
	if h.retired || h.old(settings, time.Now()) || h.e.retired {
		h.retireLocked()
	}
	if set := h.e.sets[h.key]; set != nil && len(set.waiters) > 0 {
		h.e.serve(set, settings)
		h.e.dialMore(set, settings)
		if len(set.waiters) > 0 {
			// x/net/http2 frees a stream a moment after its body has ended.
			time.AfterFunc(2*time.Millisecond, func() { h.e.serveAgain(set) })
		}
	}
}

// serveAgain gives waiters what has become free since.
func (e *endpoint) serveAgain(set *connSet) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.serve(set, e.settings())
}

// old reports whether the connection may not take more requests.
func (h *h2Conn) old(s *settings, now time.Time) bool {
	return s.maxRequests > 0 && h.served >= s.maxRequests ||
		s.maxLifetime > 0 && now.Sub(h.created) >= s.maxLifetime
}

func (h *h2Conn) idleNow() bool { return h.streams == 0 }

// retireLocked ends the connection, now or after its last stream. endpoint.mu
// is held.
func (h *h2Conn) retireLocked() {
	h.retired = true
	h.unlist()
	if h.streams == 0 {
		h.close()
	}
}

// sweep closes the connection when it is idle for too long, too old, or the
// peer wants no more requests on it. endpoint.mu is held.
func (h *h2Conn) sweep(s *settings, now time.Time) {
	state := h.cc.State()
	switch {
	case state.Closed || state.Closing || h.old(s, now):
		h.retireLocked()
	case h.streams == 0 && (now.Sub(h.idleSince) >= s.idleTimeout || s.orphaned(h.served, h.owner)):
		h.retireLocked()
	}
}
