// Package conn makes TLS connections to backends and ends them: dial, the turn of
// the handshake, the handshake, what a connection is on its loop, and the rules by
// which connections close (close.go). It knows no pools: whoever has a connection is
// told what becomes of it.
package conn

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Conn is one TLS connection, whatever is spoken on it. Dialer.Connect makes it;
// from Join on it belongs to a loop, and its methods are called on that loop, if
// nothing else is said.
type Conn struct {
	// Created is when its handshake began.
	Created time.Time
	// Took is what the wait for the handshake's turn, dial and handshake took.
	Took time.Duration
	// Resumed is whether its session was a resumed one, Version its TLS version.
	Resumed bool
	Version uint16
	// Miss is why its session was not a resumed one.
	Miss resealv1.MissReason
	// Protocol is what was agreed on by ALPN, if anything.
	Protocol string

	dialer   Dialer
	owner    Owner
	identity exchange.Identity // of its TLS session
	tls      exchange.TLSConn
	wire     *loop.Wire
	socket   *socket      // beneath TLS, where that is none of the loop's own; or nil
	whole    *whole       // TLS itself, where it can't run on a loop; or nil
	kept     atomic.Int64 // bytes that the loop takes for sent, and that did not go out

	speaker Handler
	on      *loop.Conn // nil before it has come to a loop
	closing atomic.Bool
	gauge   atomic.Int32

	mu   sync.Mutex
	home *loop.Loop // nil while it is on its way
	todo []func()   // for when it arrives
}

// Handler speaks on a connection. Its methods are called on the connection's loop,
// one at a time, and must not block.
type Handler interface {
	// Open says that the connection has come to a loop, first of all and again after
	// each Move.
	Open()
	// Data brings bytes of the peer, decrypted. p is good until Data returns.
	Data(p []byte)
	// PeerEnded says that the peer will send nothing more, and whether it said so by
	// close_notify. The connection is still open for writing.
	PeerEnded(notified bool)
	// Writable says, after Write reported false, that there is room again.
	Writable()
	// Closed is called once and last, when the connection has ended, whoever ended it.
	// err says why; nil after Close.
	Closed(err error)
}

// Owner has a connection, and is told what becomes of it.
type Owner interface {
	// CloseTimeout bounds the connection's end. It is asked when that begins.
	CloseTimeout() time.Duration
	// Gone says that the socket is closed.
	Gone()
}

// Join brings a connection to a loop, where h speaks on it. Any goroutine may call
// it, once. It does not fail: a connection that can't come to the loop is Closed,
// maybe before Join returns.
func (c *Conn) Join(l *loop.Loop, h Handler) {
	c.speaker = h
	var tc loop.TLSConn = c.tls
	if c.whole != nil {
		tc = nil
	}
	if err := l.Join(c.wire, tc, (*member)(c)); err != nil {
		(*member)(c).Closed(nil, loop.Ending{Err: err})
	}
}

// member is the connection as its loop sees it.
type member Conn

// Open implements loop.Handler.
func (m *member) Open(on *loop.Conn) {
	c := (*Conn)(m)
	c.on = on
	c.speaker.Open()
	c.arrive(on.Loop())
}

// Data implements loop.Handler.
func (m *member) Data(_ *loop.Conn, p []byte) { m.speaker.Data(p) }

// PeerEnded implements loop.Handler.
func (m *member) PeerEnded(_ *loop.Conn, notified bool) {
	if m.whole != nil {
		notified = m.whole.notified.Load()
	}
	m.speaker.PeerEnded(notified)
}

// Writable implements loop.Handler.
func (m *member) Writable(*loop.Conn) { m.speaker.Writable() }

// Closed implements loop.Handler.
func (m *member) Closed(on *loop.Conn, end loop.Ending) {
	c := (*Conn)(m)
	ours := c.closing.Swap(true)
	var err error
	switch {
	case c.whole != nil && c.whole.failure() != nil:
		err = c.whole.failure()
	case end.Err != nil:
		err = renegotiationError(end.Err, false)
	case !ours:
		err = errEnded
	}
	c.Count(gone)
	defer c.ended(end)
	defer func() {
		if on != nil {
			c.arrive(on.Loop())
		}
	}()
	c.speaker.Closed(err)
}

var errEnded = errors.New("the connection has ended")

// Do has f called on the connection's loop, soon, wherever that is by then. Any
// goroutine may call it. It is never called from within Do, and not at all if the
// loop has ended.
func (c *Conn) Do(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	home := c.home
	if home == nil {
		c.todo = append(c.todo, f)
		return
	}
	home.Post(func() {
		c.mu.Lock()
		here := c.home == home
		c.mu.Unlock()
		if here {
			f()
		} else {
			c.Do(f)
		}
	})
}

// arrive does what was left for when the connection has come to a loop.
func (c *Conn) arrive(l *loop.Loop) {
	c.mu.Lock()
	todo := c.todo
	c.home, c.todo = l, nil
	c.mu.Unlock()
	for _, f := range todo {
		f()
	}
}

// Move takes the connection to another loop, at the end of the round. Its timers are
// stopped for good.
func (c *Conn) Move(to *loop.Loop) {
	if !c.on.Open() {
		return // Closed follows
	}
	c.mu.Lock()
	c.home = nil
	c.mu.Unlock()
	c.on.Move(to, (*member)(c))
}

// Loop is the loop that the connection is on.
func (c *Conn) Loop() *loop.Loop { return c.on.Loop() }

// Timer makes a timer on the connection's loop. It is stopped when the connection
// ends or moves.
func (c *Conn) Timer(f func()) *loop.Timer { return c.on.Timer(f) }

// Write sends bytes, as loop.Conn does, and reports whether more is welcome.
func (c *Conn) Write(p []byte) (welcome bool) { return c.on.Write(p) }

// Buffered is how many bytes the peer has not taken.
func (c *Conn) Buffered() int { return c.on.Buffered() }

// Written is how many bytes went out. Those that Buffered counts still may, also after
// Close.
func (c *Conn) Written() int64 {
	if c.on == nil {
		return 0
	}
	return c.on.Stats().Out - c.kept.Load()
}

// Pause and Resume stop Data and have it come again.
func (c *Conn) Pause() { c.on.Pause() }

// Resume ends Pause.
func (c *Conn) Resume() { c.on.Resume() }

// CloseWrite sends close_notify. What the peer sends still comes.
func (c *Conn) CloseWrite() { c.on.CloseWrite() }

// Renegotiated reports whether the peer has renegotiated, so that it may not do so
// for another request.
func (c *Conn) Renegotiated() bool { return c.whole != nil && c.whole.renegotiated.Load() }

// Closing reports whether the end has begun. Any goroutine may ask.
func (c *Conn) Closing() bool { return c.closing.Load() }

// Gauge is where a connection is counted.
type Gauge int32

// Gauges. A connection begins in none of them.
const (
	_ Gauge = iota
	Idle
	Active
	gone // for good
)

// Count moves the connection in the gauges. Any goroutine may call it.
func (c *Conn) Count(to Gauge) {
	for {
		from := Gauge(c.gauge.Load())
		if from == to || from == gone {
			return
		}
		if c.gauge.CompareAndSwap(int32(from), int32(to)) {
			c.move(from, -1)
			c.move(to, 1)
			return
		}
	}
}

func (c *Conn) move(g Gauge, delta int64) {
	switch g {
	case Idle:
		c.dialer.Counters.Add(exchange.Connections.At(exchange.Idle), delta)
	case Active:
		c.dialer.Counters.Add(exchange.Connections.At(exchange.Active), delta)
	}
}
