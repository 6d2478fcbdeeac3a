package backend

import (
	"time"

	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/http1"
	"github.com/reseal/reseal/edge/loop"
)

// soloConn is a connection that carries one exchange at a time: of HTTP/1.1, or the
// bytes of a tunnel. It lives on the loop of the client that it serves, and goes to
// the loop of the next one, where it is the exchange's Flow (solo_exchange.go).
//
// It is read all the time. So a connection that dies idle is gone before a request
// could use it, and TLS 1.3 tickets, which come only when it is read, are collected.
type soloConn struct {
	*pooled
	http  *http1.Conn // nil: it carries the bytes of a tunnel
	ready func(error) // told once whether the connection can serve; then nil
	heir  *waiter     // who gets it, once it is on the loop of that one
	will  grant       // for heir

	solo // the exchange under way

	// Guarded by endpoint.mu.
	at     *loop.Loop // where it is idle; nil: it is not
	since  time.Time  // idle since
	rested bool       // it has been idle
	served int
	owner  owner
	holder *share // of the client whose request it serves
}

// Bounds of a response's head: 1 MiB, and more fields than anybody sends.
var responseLimits = http1.Limits{HeadBytes: 1 << 20, Fields: 10_000, TrailerBytes: 64 << 10}

// newSoloConn makes what speaks on c. ready is told on the connection's loop.
func newSoloConn(c *pooled, protocol string, ready func(error)) *soloConn {
	s := &soloConn{pooled: c, ready: ready}
	if protocol == protocolHTTP1 {
		s.http = http1.NewClient(responseLimits)
	}
	return s
}

// Open implements conn.Handler.
func (c *soloConn) Open() {
	c.timer, c.station = nil, c.e.pool.b.station(c.Loop())
	switch heir := c.heir; {
	case heir != nil:
		c.heir = nil
		heir.told(c.will)
	case c.ready != nil:
		ready := c.ready
		c.ready = nil
		ready(nil)
	}
}

// Closed implements conn.Handler.
func (c *soloConn) Closed(err error) {
	if err == nil {
		err = errClosed // by us, while something was still on its way to it
	}
	c.died = err
	c.leave()
	if ready := c.ready; ready != nil {
		c.ready = nil
		ready(err)
	}
	if heir := c.heir; heir != nil {
		c.heir = nil
		c.will.err = &lostError{err: err}
		heir.told(c.will)
	}
	if c.front != nil {
		c.lose(err)
	}
}

// leave takes the connection out of where it is offered and held.
func (c *soloConn) leave() {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.e.dropIdle(c)
	c.e.unhold(c)
}

// end closes the connection.
func (c *soloConn) end() {
	c.leave()
	c.Close()
}

// shut implements speaker.
func (c *soloConn) shut() { c.fail(fail(ReasonReset, errClosed)) }

// drop implements carrier.
func (c *soloConn) drop() { c.e.put(c, false) }

// rest makes the connection idle. It is called on its loop, with endpoint.mu held.
func (c *soloConn) rest(now time.Time) bool {
	if c.Closing() {
		return false
	}
	c.at, c.since, c.rested = c.Loop(), now, true
	c.Count(conn.Idle)
	return true
}

// granted counts the request that the connection is about to serve.
// endpoint.mu is held.
func (c *soloConn) granted(w *waiter) grant {
	c.served++
	c.owner = c.owner.next(w.call)
	c.e.ownFor(w, &c.owner)
	c.e.hold(c, w.call.Client)
	c.Count(conn.Active)
	g := grant{carrier: c, on: c.pooled, protocol: protocolHTTP1, reused: c.served > 1, stale: c.served > 1 || c.rested}
	if w.raw {
		g.protocol = protocolTCP
	}
	return g
}

// goTo brings the connection, which is free, to the loop of w, who is told there.
// Any goroutine may call it.
func (c *soloConn) goTo(w *waiter, g grant) {
	c.Do(func() {
		if c.Closing() {
			g.err = &lostError{err: errClosed}
			w.tell(g)
			return
		}
		if c.Loop() == w.loop {
			w.told(g)
			return
		}
		c.heir, c.will = w, g
		c.Move(w.loop)
	})
}

// expired reports whether the connection may serve no more requests. endpoint.mu is
// held.
func (c *soloConn) expired(s *settings, now time.Time, idle bool) bool {
	return s.maxRequests > 0 && c.served >= s.maxRequests ||
		s.maxLifetime > 0 && now.Sub(c.Created) >= s.maxLifetime ||
		idle && now.Sub(c.since) >= s.idleTimeout ||
		s.orphaned(c.served, c.owner)
}

// becomePrivate makes the connection the client's own.
func (c *soloConn) becomePrivate() {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.e.own(&c.owner)
}

var _ interface {
	carrier
	speaker
} = (*soloConn)(nil)
