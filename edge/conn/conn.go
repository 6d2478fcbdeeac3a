package backend

import (
	"bytes"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// connKey is what connections of an endpoint may be shared within. The pool's
// Identity is the same for all of an endpoint's connections.
type connKey struct {
	serverName string
	http1      bool // h2 was not offered, for a request with Upgrade
}

// conn is one TLS connection, whatever is spoken on it.
type conn struct {
	e        *endpoint
	key      connKey
	identity exchange.Identity // of its TLS session
	tc       exchange.TLSConn
	wire     *wire
	created  time.Time
	connect  time.Duration // what dial and handshake took
	resumed  bool
	version  uint16
	slot     bool   // counts in the endpoint's open connections
	finished []byte // of its handshake, where it may renegotiate once

	reclaimed bool // taken from its client; guarded by endpoint.mu

	readMu     sync.Mutex   // held by whoever reads from tc
	writes     atomic.Int32 // Writes under way
	writing    atomic.Int64 // when the last Write began, in Unix ns; 0: it is through
	closing    atomic.Bool
	ended      chan struct{} // closed when closing begins
	peerEnded  atomic.Bool   // the peer ended the connection before we did
	peerNotify atomic.Bool   // its close_notify has come

	gaugeMu sync.Mutex
	gauge   gauge

	// hooks are set once something runs on the connection, which may be closing by
	// then.
	hooks atomic.Pointer[hooks]
}

// hooks are how a protocol takes part in the connection's end.
type hooks struct {
	// leave takes the connection out of its set. May be nil.
	leave func()
	// goodbye says farewell before close_notify. May be nil.
	goodbye func(deadline time.Time)
	// broken ends what runs when the edge shuts down.
	broken func()
}

type gauge int8

const (
	gaugeNone gauge = iota
	gaugeIdle
	gaugeActive
	gaugeEnded // for good
)

// count moves the connection in the gauges.
func (c *conn) count(to gauge) {
	c.gaugeMu.Lock()
	from := c.gauge
	if from != gaugeEnded {
		c.gauge = to
	}
	c.gaugeMu.Unlock()
	if from == to || from == gaugeEnded {
		return
	}
	c.move(from, -1)
	c.move(to, 1)
}

func (c *conn) move(g gauge, delta int64) {
	switch g {
	case gaugeIdle:
		c.e.pool.counters.Add(exchange.Connections.At(exchange.Idle), delta)
	case gaugeActive:
		c.e.pool.counters.Add(exchange.Connections.At(exchange.Active), delta)
	}
}

// Read reads decrypted bytes, until the connection is being closed.
func (c *conn) Read(p []byte) (n int, err error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	defer c.e.pool.b.caught("a read", &err)
	if c.closing.Load() {
		return 0, net.ErrClosed
	}
	n, err = c.tc.Read(p)
	if err != nil {
		if c.closing.Load() {
			return n, net.ErrClosed
		}
		c.observe(err)
		err = renegotiationError(err, c.e.settings().renegotiates)
	}
	return n, err
}

// observe notes that the peer ended the connection. crypto/tls returns io.EOF
// for close_notify and for FIN alike; only the wire knows.
func (c *conn) observe(err error) {
	if err == io.EOF && !c.wire.fin.Load() {
		c.peerNotify.Store(true)
		c.peerEnded.Store(true)
	}
	if c.wire.fin.Load() || c.wire.reset.Load() {
		c.peerEnded.Store(true)
	}
}

// Write writes bytes as TLS records.
func (c *conn) Write(p []byte) (n int, err error) {
	c.writes.Add(1)
	defer c.writes.Add(-1)
	defer c.e.pool.b.caught("a write", &err)
	if c.closing.Load() {
		return 0, net.ErrClosed
	}
	c.writing.Store(time.Now().UnixNano())
	defer c.writing.Store(0)
	return c.tc.Write(p)
}

// renegotiated reports whether the peer has renegotiated, so that it may not do so
// for another request. Only whoever reads from the connection may ask.
func (c *conn) renegotiated() bool {
	return c.finished != nil && !bytes.Equal(c.finished, c.tc.ConnectionState().TLSUnique)
}

// stuck reports whether a Write has been held up: the peer does not read.
func (c *conn) stuck(now time.Time) bool {
	begun := c.writing.Load()
	return begun != 0 && now.Sub(time.Unix(0, begun)) > stuckAfter
}

// abort ends the connection and what runs on it.
func (c *conn) abort() {
	if h := c.hooks.Load(); h != nil {
		h.broken()
	}
	c.close()
}

// fill tells a call about the connection that served it.
func (c *conn) fill(call *exchange.Exchange, protocol string, reused bool) {
	call.Endpoint, call.Protocol = c.e.Address, protocol
	call.Reused, call.Resumed, call.TLSVersion = reused, c.resumed, c.version
	call.Connect = 0
}

// closeTimeout bounds the connection's end.
func (c *conn) closeTimeout() time.Duration { return c.e.settings().closeTimeout }

// unclean are the ends after which a strict server forgets the session.
func unclean(kind resealv1.CloseKind) bool {
	return kind != resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH &&
		kind != resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_SENT
}
