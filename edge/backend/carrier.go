package backend

import (
	"time"

	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// carrier is a place for one request on a connection: an HTTP/1 connection that is
// free, a stream of an HTTP/2 connection, or a connection for a tunnel. Whoever is
// granted one calls one of its methods, once, on its own loop.
type carrier interface {
	// carry begins an exchange; a request of length 0 has ended with it. The place is
	// given back, to be granted again, when both messages have ended, and when the
	// exchange fails or is aborted: before the Front is told, which may begin the next
	// request at once. How both ends speak to each other is what exchange.Flow says; l
	// is the loop of both. Nothing of the Flow may be called when the exchange is over,
	// Abort included.
	//
	// Failed gets a *lostError when the connection or the stream ended, before or
	// after the answer began, and an *Error for anything else.
	carry(l *loop.Loop, x *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow
	// drop gives the place back unused.
	drop()
}

// grant is what a waiter gets: a carrier, or why there is none.
type grant struct {
	carrier
	on       *pooled // that it is a place of
	protocol string  // protocolHTTP1, protocolHTTP2 or protocolTCP
	reused   bool    // on has served a request
	stale    bool    // on may have died since it was known to live
	err      error   // a *lostError if on died before it was granted
}

// lostError is a connection or a stream that ended before its exchange did.
type lostError struct {
	err     error
	written bool // a byte of the request may have gone out
	lives   bool // only the request was turned away: the connection may live on
	unread  bool // the peer said that it has not processed the request
}

func (e *lostError) Error() string { return e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// speaker is what runs on a pooled connection.
type speaker interface {
	conn.Handler
	// shut ends what runs, and the connection, because the edge stops. It is called on
	// the connection's loop.
	shut()
}

// connKey is what connections of an endpoint may be shared within. The pool's
// Identity is the same for all of an endpoint's connections.
type connKey struct {
	serverName string
	http1      bool // h2 was not offered, for a request with Upgrade
}

// pooled is a connection of an endpoint.
type pooled struct {
	*conn.Conn
	e         *endpoint
	key       connKey
	speaker   speaker
	slot      bool // counts in the endpoint's open connections
	reclaimed bool // taken from its client; guarded by endpoint.mu
	parting   bool // it is being closed, or will be after its exchanges; likewise
}

// CloseTimeout implements conn.Owner.
func (c *pooled) CloseTimeout() time.Duration { return c.e.settings().closeTimeout }

// Gone implements conn.Owner.
func (c *pooled) Gone() {
	if c.slot {
		c.e.slotFreed(c)
	}
	c.e.pool.b.untrack(c)
}

// run brings the connection to a loop, where s speaks on it.
func (c *pooled) run(l *loop.Loop, s speaker) {
	c.speaker = s
	c.e.pool.b.track(c)
	c.Join(l, s)
}

// fill tells a call about the connection that serves it.
func (g grant) fill(call *exchange.Exchange) {
	call.Endpoint, call.Protocol = g.on.e.Address, g.protocol
	call.Reused, call.Resumed, call.TLSVersion = g.reused, g.on.Resumed, g.on.Version
	call.Miss, call.Connect = g.on.Miss, 0
}
