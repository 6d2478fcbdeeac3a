package loop

import (
	"crypto/tls"
	"errors"
	"net"
	"time"
)

const (
	// maxPlaintext is what a TLS record carries at most (RFC 8446 section 5.1).
	maxPlaintext = 16 << 10
	// readSize is how much is read of a connection in a round at most, by one system
	// call, so that it does not keep others waiting.
	readSize = 128 << 10
	// writeSize is how much one system call writes at most, and the size of a chunk:
	// what was read in a round leaves by one, with all that TLS adds.
	writeSize = 256 << 10
	// roundSize is how much a loop reads in a round at most, some single reads more or
	// less: what takes it a few milliseconds.
	roundSize = 4 << 20
	// crowded is the mark for a connection's output while its loop has too much.
	crowded = 16 << 10
	// alertTime is how long a connection that TLS gave up waits for the peer to take
	// the alert.
	alertTime = time.Second
)

// Handler is told what becomes of a connection. Its methods are called on the
// connection's loop, one at a time, and must not block. It may use all connections
// of the loop. A panic ends the connection.
type Handler interface {
	// Open is called first, when the connection has come to the loop.
	Open(c *Conn)
	// Data brings bytes of the peer, decrypted. p is good until Data returns.
	Data(c *Conn, p []byte)
	// PeerEnded says that the peer will send nothing more: by TLS's close_notify if
	// notified, else by FIN alone, which for TLS can be an attacker's (RFC 8446
	// section 6.1). It takes more all the same: it is the handler that ends the
	// connection.
	PeerEnded(c *Conn, notified bool)
	// Writable says, after Write reported false, that there is room again.
	Writable(c *Conn)
	// Closed is called once and last, also for a connection that never came as far
	// as Open. What is written from now on goes nowhere.
	Closed(c *Conn, end Ending)
}

// Ending is how a connection ended.
type Ending struct {
	// Notified is whether our close_notify was handed to the kernel.
	Notified bool
	// PeerNotified, FIN and Reset are what came from the peer: close_notify, FIN, RST.
	PeerNotified, FIN, Reset bool
	// ByPeer is whether the peer ended the connection before we did.
	ByPeer bool
	// Unread is whether the peer may have sent more than was read, which makes the
	// kernel answer with RST.
	Unread bool
	// TimedOut is whether the peer did not end the connection within Close's time.
	TimedOut bool
	// Err is why it ended; nil if Close ended it and the peer did not break that off.
	Err error
}

// TLSConn is an established TLS connection over a Wire: a *tls.Conn, or what
// behaves like one. Beside what net.Conn says it must go on after an error of the
// Wire whose Timeout and Temporary are true, keep no buffer that is handed to its
// Read or Write, and return io.EOF for close_notify and for FIN between records.
//
// A client that lets the server renegotiate (tls.Config.Renegotiation) is not
// such: crypto/tls can't go on with a handshake after a temporary error. It can
// join a loop in place of a socket, NewWire(tc), with no TLSConn above.
type TLSConn = interface {
	net.Conn
	// CloseWrite sends close_notify.
	CloseWrite() error
	ConnectionState() tls.ConnectionState
	// NetConn returns the connection beneath.
	NetConn() net.Conn
}

// Stats are a connection's counts.
type Stats struct {
	// In and Out are bytes that were read from and handed to the kernel.
	In, Out int64
	// Records are TLS records that were made since the connection joined its first
	// loop.
	Records int64
}

type phase uint8

const (
	coming phase = iota // Open was not called
	open
	closing // nothing is read but to be thrown away
	finished
)

// Conn is a connection on a loop. Its methods are called on that loop alone.
type Conn struct {
	loop    *Loop
	index   int     // in loop.conns
	handler Handler // nil once it was told of the end
	wire    *Wire
	tls     TLSConn // nil: bytes go as they are
	source  source
	phase   phase

	queued, dirty bool // is in loop.ready, loop.dirty

	readable bool   // the source may have something
	more     bool   // the Wire or TLS may hold something
	over     bool   // nothing more will be decrypted
	streams  bool   // the peer has sent something while the connection was closing
	paused   bool   // by the handler
	watched  bool   // FIN after close_notify is told
	stash    []byte // what wire.input stands in, when that outlives a round

	gather   []byte   // written, not encrypted yet
	out      []byte   // encrypted, the first chunk of it
	sent     int      // of out
	backlog  [][]byte // further chunks
	pending  int      // bytes of out and backlog that were not sent
	counted  int      // bytes that loop.output knows of
	blocked  bool     // the source takes nothing for now
	full     bool     // the handler was told to stop
	refill   bool     // the handler is to be told that there is room
	notified bool     // close_notify is in out, or before
	mute     bool     // what TLS still says is not sent
	fin      bool     // FIN is due after out
	writeErr error

	moving *Loop   // where it goes
	heir   Handler // its handler there

	told   bool // the handler was told of the end, or is about to be
	timers []*Timer
	linger *Timer // bounds the end
	ending Ending
	stats  Stats
}

var (
	errAborted = errors.New("aborted")
	errFlooded = errors.New("its handler wrote on though the peer takes nothing")
)

// Join brings a connection to the loop. Its handshake, if any, is complete, and
// nothing uses wire, tc or what is beneath any more: they are the loop's from now
// on, also when Join fails, which it does with ErrStopped or when the system gives
// no descriptor. tc is nil for a connection without TLS. What the handshake has read
// beyond its end is not lost.
//
// For epoll what wire wraps must be a *net.TCPConn or *net.UnixConn; everything
// else is served by goroutines.
func (l *Loop) Join(wire *Wire, tc TLSConn, h Handler) error {
	src, err := newSource(l.group, wire.Conn)
	if err != nil {
		_ = wire.Conn.Close()
		return err
	}
	c := &Conn{handler: h, wire: wire, tls: tc, source: src}
	wire.conn, wire.Conn = c, nil
	l.population.Add(1)
	if l.Post(func() { l.receive(c) }) {
		return nil
	}
	l.population.Add(-1)
	src.close(false)
	return ErrStopped
}

// receive takes over a connection from a goroutine or another loop.
func (l *Loop) receive(c *Conn) {
	l.adopt(c)
	c.phase, c.more = coming, true
	if err := c.source.attach(c); err != nil {
		c.finish(err, false)
		return
	}
	if c.buffered() > 0 {
		c.touch()
	}
	if c.writeErr != nil {
		c.awaitAnswer()
	}
	l.account(c)
	l.enlist(c)
}

// Loop is the loop that the connection is on.
func (c *Conn) Loop() *Loop { return c.loop }

// TLS is the TLS connection, for what it says of the handshake, or nil. Only the
// loop reads and writes it.
func (c *Conn) TLS() TLSConn { return c.tls }

// LocalAddr is the address of this end.
func (c *Conn) LocalAddr() net.Addr { return c.wire.local }

// RemoteAddr is the address of the peer.
func (c *Conn) RemoteAddr() net.Addr { return c.wire.remote }

// Stats are the connection's counts.
func (c *Conn) Stats() Stats { return c.stats }

// Open reports whether the connection is in use: neither ended nor ending.
func (c *Conn) Open() bool { return c.phase <= open && c.moving == nil }

// serve does what is to be done for the connection, flushing excepted.
func (c *Conn) serve() {
	if c.phase == coming && c.moving == nil {
		c.phase = open
		c.handler.Open(c)
	}
	if c.refill && c.phase == open && c.moving == nil {
		c.refill, c.full = false, false
		c.handler.Writable(c)
		c.touch() // for what was held back, should it not be followed by more
	}
	c.read()
}

// finish ends the connection at once. Its handler is told later in the round,
// never from within a method that it has called.
func (c *Conn) finish(err error, reset bool) {
	if c.phase == finished {
		return
	}
	l := c.loop
	c.phase = finished
	if c.ending.Err == nil {
		c.ending.Err = err
	}
	c.ending.Unread = (c.readable || c.streams && !c.ending.PeerNotified) && !c.ending.FIN && !c.ending.Reset
	c.source.close(reset)
	if c.linger != nil {
		c.linger.Stop()
	}
	c.drop()
	l.buffers.take(c.stash)
	c.stash = nil
	c.wire.input = nil
	l.account(c)
	l.disown(c)
	c.ended()
}

// ended has the handler told.
func (c *Conn) ended() {
	if c.told {
		return
	}
	c.told = true
	c.stopTimers()
	if c.moving == nil {
		c.loop.over = append(c.loop.over, c)
		return
	}
	// It ended on its way. Whoever was to have it is told where it was to go.
	to, heir, end := c.moving, c.heir, c.ending
	c.handler = nil
	if !to.Post(func() { heir.Closed(c, end) }) {
		c.loop.protect(nil, func() { heir.Closed(c, end) })
	}
}

func (c *Conn) stopTimers() {
	for _, t := range c.timers {
		t.Stop()
	}
	c.timers = nil
}
