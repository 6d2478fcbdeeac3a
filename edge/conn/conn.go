// Package conn makes TLS connections to backends and ends them: dial, the turn of
// the handshake, the handshake, what is read and written, and the rules by which
// connections close (close.go). It knows no pools: whoever has a connection is told
// what becomes of it.
package conn

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

// Conn is one TLS connection, whatever is spoken on it. Its methods are safe for
// concurrent use, if nothing else is said.
type Conn struct {
	// TLS is the connection itself. Read and Write of Conn are used in the place of
	// its own.
	TLS exchange.TLSConn
	// Created is when its handshake began.
	Created time.Time
	// Took is what the wait for the handshake's turn, dial and handshake took.
	Took time.Duration
	// Resumed is whether its session was a resumed one, Version its TLS version.
	Resumed bool
	Version uint16

	dialer   Dialer
	owner    Owner
	identity exchange.Identity // of its TLS session
	wire     *wire
	finished []byte // of its handshake, where it may renegotiate once

	readMu     sync.Mutex   // held by whoever reads from TLS
	writes     atomic.Int32 // Writes under way
	writing    atomic.Int64 // when the last Write began, in Unix ns; 0: it is through
	closing    atomic.Bool
	ended      chan struct{} // closed when closing begins
	peerEnded  atomic.Bool   // the peer ended the connection before we did
	peerNotify atomic.Bool   // its close_notify has come

	gaugeMu sync.Mutex
	gauge   Gauge

	hooks atomic.Pointer[Hooks]
}

// Owner has a connection, and is told what becomes of it.
type Owner interface {
	// CloseTimeout bounds the connection's end. It is asked when that begins.
	CloseTimeout() time.Duration
	// Gone says that the socket is closed.
	Gone()
}

// Hooks are how a protocol takes part in the connection's end.
type Hooks struct {
	// Leave takes the connection out of where it is offered. May be nil.
	Leave func()
	// Goodbye says farewell before close_notify. May be nil.
	Goodbye func(deadline time.Time)
	// Broken ends what runs when the edge shuts down.
	Broken func()
}

// Hook sets the hooks, once something runs on the connection, which may be closing
// by then.
func (c *Conn) Hook(hooks Hooks) { c.hooks.Store(&hooks) }

// Gauge is where a connection is counted.
type Gauge int8

// Gauges. A connection begins in none of them.
const (
	_ Gauge = iota
	Idle
	Active
	gone // for good
)

// Count moves the connection in the gauges.
func (c *Conn) Count(to Gauge) {
	c.gaugeMu.Lock()
	from := c.gauge
	if from != gone {
		c.gauge = to
	}
	c.gaugeMu.Unlock()
	if from == to || from == gone {
		return
	}
	c.move(from, -1)
	c.move(to, 1)
}

func (c *Conn) move(g Gauge, delta int64) {
	switch g {
	case Idle:
		c.dialer.Counters.Add(exchange.Connections.At(exchange.Idle), delta)
	case Active:
		c.dialer.Counters.Add(exchange.Connections.At(exchange.Active), delta)
	}
}

// Read reads decrypted bytes, until the connection is being closed.
func (c *Conn) Read(p []byte) (n int, err error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	defer c.dialer.Guard.Caught("a read", &err)
	if c.closing.Load() {
		return 0, net.ErrClosed
	}
	n, err = c.TLS.Read(p)
	if err != nil {
		if c.closing.Load() {
			return n, net.ErrClosed
		}
		c.observe(err)
		err = renegotiationError(err, c.finished != nil)
	}
	return n, err
}

// observe notes that the peer ended the connection. crypto/tls returns io.EOF
// for close_notify and for FIN alike; only the wire knows.
func (c *Conn) observe(err error) {
	if err == io.EOF && !c.wire.fin.Load() {
		c.peerNotify.Store(true)
		c.peerEnded.Store(true)
	}
	if c.wire.fin.Load() || c.wire.reset.Load() {
		c.peerEnded.Store(true)
	}
}

// Write writes bytes as TLS records.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.writes.Add(1)
	defer c.writes.Add(-1)
	defer c.dialer.Guard.Caught("a write", &err)
	if c.closing.Load() {
		return 0, net.ErrClosed
	}
	c.writing.Store(time.Now().UnixNano())
	defer c.writing.Store(0)
	return c.TLS.Write(p)
}

// Renegotiated reports whether the peer has renegotiated, so that it may not do so
// for another request. Only who reads from the connection may ask.
func (c *Conn) Renegotiated() bool {
	return c.finished != nil && !bytes.Equal(c.finished, c.TLS.ConnectionState().TLSUnique)
}

// Stuck reports whether a Write has taken longer than after: the peer does not
// read.
func (c *Conn) Stuck(now time.Time, after time.Duration) bool {
	begun := c.writing.Load()
	return begun != 0 && now.Sub(time.Unix(0, begun)) > after
}

// Written is how many bytes went out, those of TLS included.
func (c *Conn) Written() int64 { return c.wire.written.Load() }

// SetReadDeadline is that of net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.wire.SetReadDeadline(t) }

// Interrupt makes a Read under way, and later ones, fail with a time-out.
func (c *Conn) Interrupt() { c.wire.interrupt() }

// Closing reports whether the end has begun.
func (c *Conn) Closing() bool { return c.closing.Load() }

// Ended is closed when the end begins.
func (c *Conn) Ended() <-chan struct{} { return c.ended }

// Abort ends the connection and what runs on it.
func (c *Conn) Abort() {
	if h := c.hooks.Load(); h != nil {
		h.Broken()
	}
	c.Close()
}

// Kill closes the socket, when the time for all else is over.
func (c *Conn) Kill() { c.wire.Close() }

// unclean are the ends after which a strict server forgets the session.
func unclean(kind resealv1.CloseKind) bool {
	return kind != resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH &&
		kind != resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_SENT
}
