package backend

import (
	"time"

	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/exchange"
)

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
	slot      bool // counts in the endpoint's open connections
	reclaimed bool // taken from its client; guarded by endpoint.mu
}

// CloseTimeout implements conn.Owner.
func (c *pooled) CloseTimeout() time.Duration { return c.e.settings().closeTimeout }

// Gone implements conn.Owner.
func (c *pooled) Gone() {
	c.e.pool.b.untrack(c)
	if c.slot {
		c.e.slotFreed(c)
	}
}

// fill tells a call about the connection that served it.
func (c *pooled) fill(call *exchange.Exchange, protocol string, reused bool) {
	call.Endpoint, call.Protocol = c.e.Address, protocol
	call.Reused, call.Resumed, call.TLSVersion = reused, c.Resumed, c.Version
	call.Connect = 0
}
