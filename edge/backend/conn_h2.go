package backend

import (
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/backend/h2"
	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// h2Conn is an HTTP/2 connection: a carrier with a place for each stream. h2.Conn
// speaks the protocol, on the loop that the connection stays on; exchanges of other
// loops cross. How many streams are free is counted here.
type h2Conn struct {
	*pooled
	session *h2.Conn   // nil before it has come to its loop
	at      *loop.Loop // likewise
	ready   func(*h2Conn, error)
	late    *loop.Timer // for the peer's SETTINGS

	// Guarded by endpoint.mu.
	listed    bool // in its connSet
	limit     int  // how many streams the peer allows
	streams   int  // places that are taken
	live      int  // of them, by exchanges; the peer has to learn that others were reset
	served    int
	answered  bool // a request
	owner     owner
	mixed     bool // streams of several clients are open
	idleSince time.Time
	retired   bool
	stuck     bool // the peer takes nothing of what it is sent
}

// newH2Conn is what speaks on c once that runs. ready is told on its loop, once, when
// it is known how many streams the peer allows, or why that never will be. Before
// that the peer would refuse some.
func newH2Conn(c *pooled, ready func(*h2Conn, error)) *h2Conn {
	return &h2Conn{pooled: c, ready: ready, idleSince: time.Now()}
}

// Open implements conn.Handler.
func (h *h2Conn) Open() {
	h.at = h.Loop()
	h.session = h2.New(h, h2.Config{
		MaxHeaderBytes: responseLimits.HeadBytes, MaxHeaderFields: responseLimits.Fields, Owner: h,
		TakeTime: func() time.Duration { return h.e.settings().bodyTimeout },
	})
	h.Count(conn.Idle)
	h.late = h.Timer(func() { h.isReady(fail(ReasonProtocolError, errNoSettings)) })
	h.late.Set(h.e.settings().handshakeTimeout)
}

func (h *h2Conn) isReady(err error) {
	if ready := h.ready; ready != nil {
		h.ready = nil
		ready(h, err)
	}
}

// Data implements conn.Handler.
func (h *h2Conn) Data(p []byte) { h.session.Data(p) }

// Writable implements conn.Handler.
func (h *h2Conn) Writable() { h.session.Writable() }

// PeerEnded implements conn.Handler.
func (h *h2Conn) PeerEnded(bool) { h.session.PeerEnded() }

// Closed implements conn.Handler.
func (h *h2Conn) Closed(err error) {
	if h.session == nil {
		h.isReady(dialError(err)) // no loop could take it
		return
	}
	h.session.Closed(err)
}

// shut implements speaker.
func (h *h2Conn) shut() {
	if h.session != nil {
		h.session.Leave(fail(ReasonReset, errClosed))
	}
	h.Close()
}

// carry implements carrier.
func (h *h2Conn) carry(l *loop.Loop, x *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow {
	if l == h.at {
		return h.session.Begin(x.Client, r, front)
	}
	return h.e.pool.b.lanes.Begin(l, h.at, h, x.Client, r, front)
}

// Begin implements crossing.Place.
func (h *h2Conn) Begin(client uint64, r *exchange.Request, front exchange.Front) exchange.Flow {
	return h.session.Begin(client, r, front)
}

// Drop implements crossing.Place.
func (h *h2Conn) Drop() { h.drop() }

// drop implements carrier.
func (h *h2Conn) drop() {
	h.e.mu.Lock()
	h.served--
	h.e.mu.Unlock()
	h.Free(1, 1, false)
}

// Settled implements h2.Owner.
func (h *h2Conn) Settled(streams int) {
	h.e.mu.Lock()
	h.limit = streams
	h.e.mu.Unlock()
	switch {
	case streams == 0:
	case h.ready != nil:
		h.late.Stop()
		h.isReady(nil)
	default:
		h.e.serveAgain(h.key)
	}
}

// Unwanted implements h2.Owner.
func (h *h2Conn) Unwanted() {
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	h.retireLocked()
}

// Stuck implements h2.Owner.
func (h *h2Conn) Stuck(is bool) {
	h.e.mu.Lock()
	h.stuck = is
	h.e.mu.Unlock()
	if !is {
		h.e.serveAgain(h.key) // some may have waited for this one
	}
}

// Response implements h2.Owner.
func (h *h2Conn) Response(client uint64, r *exchange.Response) {
	if challengesConnection(r.Fields) {
		h.becomePrivate(client)
	}
}

// becomePrivate makes the connection the client's own, or, when streams of
// others are on it, nobody's.
func (h *h2Conn) becomePrivate(client uint64) {
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	shared := h.mixed || h.owner.client != client
	h.e.own(&h.owner)
	if shared {
		h.retireLocked()
	}
}

// Failed implements h2.Owner.
func (h *h2Conn) Failed(f h2.Failure) error {
	if e := (*Error)(nil); errors.As(f.Err, &e) {
		return e // of shut
	}
	if errors.Is(f.Err, h2.ErrStuck) {
		return idleError(false)
	}
	switch f.Kind {
	case h2.Lost:
		return &lostError{err: f.Err, written: f.Written, unread: f.Unread, lives: true}
	case h2.TooLarge:
		return refused(http.StatusRequestHeaderFieldsTooLarge, f.Err)
	case h2.Invalid:
		return fail(ReasonBadRequest, f.Err)
	case h2.Broken:
		return fail(ReasonProtocolError, f.Err)
	}
	return resetError(f.Err, f.Uploading)
}

// Ended implements h2.Owner.
func (h *h2Conn) Ended(error) {
	h.e.mu.Lock()
	h.retired = true
	h.unlist()
	h.e.mu.Unlock()
	h.isReady(fail(ReasonReset, errNoSettings))
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
	if h.Closing() || h.retired || h.stuck || h.streams >= h.limit || h.old(s) {
		return false
	}
	h.streams++
	h.live++
	h.served++
	h.Count(conn.Active)
	return true
}

// granted returns the reserved stream as a grant. endpoint.mu is held.
func (h *h2Conn) granted(w *waiter) grant {
	h.mixed = h.streams > 1 && (h.mixed || h.owner.client != w.call.Client)
	h.owner = h.owner.next(w.call)
	h.e.ownFor(w, &h.owner)
	return grant{carrier: h, on: h.pooled, protocol: protocolHTTP2, reused: h.served > 1, stale: h.served > 1}
}

// Free implements h2.Owner: it gives what is free to waiters.
func (h *h2Conn) Free(over, free int, answered bool) {
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	h.answered = h.answered || answered
	h.streams -= free
	if h.live -= over; h.live == 0 && over > 0 {
		h.idleSince = time.Now()
		h.Count(conn.Idle)
	}
	settings := h.e.settings()
	surplus := h.live == 0 && h.e.surplus(settings) > 0
	if h.retired || h.old(settings) || h.e.retired || surplus {
		h.retireLocked()
	}
	if set := h.e.sets[h.key]; set != nil && len(set.waiters) > 0 {
		h.e.serve(set, settings)
		h.e.dialMore(set, settings)
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
func (h *h2Conn) old(s *settings) bool {
	return s.maxRequests > 0 && h.served >= s.maxRequests ||
		s.maxLifetime > 0 && time.Since(h.Created) >= s.maxLifetime
}

func (h *h2Conn) idleNow() bool { return h.live == 0 }

// retireLocked ends the connection, now or after its last exchange. endpoint.mu is
// held.
func (h *h2Conn) retireLocked() {
	h.retired = true
	h.unlist()
	h.e.part(h.pooled)
	if h.live == 0 {
		h.Do(func() { h.session.Leave(nil) })
	}
}

// sweep closes the connection when it is idle for too long or too old.
// endpoint.mu is held.
func (h *h2Conn) sweep(s *settings, now time.Time) {
	idle := h.live == 0 && (now.Sub(h.idleSince) >= s.idleTimeout || s.orphaned(h.served, h.owner))
	if idle || h.old(s) {
		h.retireLocked()
	}
}
