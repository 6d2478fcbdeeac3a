// Package h2 speaks HTTP/2 to backends: what edge/http2 decides, on a connection
// of a loop. It carries exchanges between their Fronts and streams, keeps each
// stream within its windows, finds out that a backend has died or takes nothing, and
// ends connections by GOAWAY. Which exchange gets a stream of which connection is
// its owner's to say.
package h2

import (
	"errors"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http2"
	"github.com/reseal/reseal/edge/loop"
)

const (
	// MaxStreams bounds the streams of one connection, so that those whose clients
	// take nothing never use up its window for the others.
	MaxStreams = (1 << 30) / exchange.AnswerWindow
	// pingAfter is how long nothing may come before the backend is asked for a sign of
	// life, pingWait how long that may take.
	pingAfter = 20 * time.Second
	pingWait  = 5 * time.Second
	// stuckAfter is how long the backend may take nothing of what waits to be sent,
	// until the connection gets no more requests.
	stuckAfter = 100 * time.Millisecond
	// freeAfter is how long a stream that was reset waits for the backend to have seen
	// that.
	freeAfter = time.Second
	// refillEvery and refill are what a backend's credit for odd frames grows by.
	refillEvery = 100 * time.Millisecond
	refill      = 10
	// turn is how much of one stream goes out before the next gets its turn.
	turn = 32 << 10
)

// ErrStuck: the backend has taken nothing of what it was sent for Config.TakeTime.
var ErrStuck = errors.New("the backend takes nothing of what it is sent")

// Causes of ends.
var (
	errNoPong    = errors.New("the backend does not answer a PING")
	errPeerEnded = errors.New("the backend has ended the connection")
	errLeft      = errors.New("the connection ends")
)

// Transport is the connection beneath. Its methods are called on its loop.
type Transport interface {
	// Loop is the loop that the connection is on.
	Loop() *loop.Loop
	// Write, Buffered and Timer are those of loop.Conn.
	Write(p []byte) (welcome bool)
	Buffered() int
	Timer(f func()) *loop.Timer
	// Written is how many bytes the kernel has taken, those of TLS included.
	Written() int64
	// Close ends the connection in order. It may be called twice.
	Close()
}

// Owner is told of the connection as a whole, on its loop. It must not block.
type Owner interface {
	// Settled says how many streams may be open at once, at first and whenever the
	// backend changes its mind. 0 can last.
	Settled(streams int)
	// Unwanted says that the backend, or the connection's state, allows no more
	// requests.
	Unwanted()
	// Stuck says that the backend takes nothing of what it is sent, or takes it again.
	Stuck(bool)
	// Free says that of those that Begin began over exchanges have ended, and that free
	// streams are free again; answered: there was an answer.
	Free(over, free int, answered bool)
	// Response is told of the head of each answer, before the Front is.
	Response(client uint64, r *exchange.Response)
	// Failed makes the error that a Front gets.
	Failed(f Failure) error
	// Ended says that there is no connection any more: nothing follows but Free, and
	// Failed.
	Ended(err error)
}

// Failure is why an exchange failed.
type Failure struct {
	Err error
	// Kind is what has happened.
	Kind FailureKind
	// Written is whether a byte of the request may have gone out. Unread is whether
	// the backend has said that it did not process it.
	Written, Unread bool
	// Uploading is whether the request had not been sent to its end.
	Uploading bool
}

// FailureKind is what has happened to an exchange.
type FailureKind int8

// Kinds of failures.
const (
	// Lost: the stream was refused, or the connection has ended.
	Lost FailureKind = iota
	// Reset: the backend has reset the stream.
	Reset
	// Broken: the backend broke a rule on the stream, which we have reset.
	Broken
	// Invalid: the request can't be sent.
	Invalid
	// TooLarge: the backend has said that it takes no header as large as the request's.
	TooLarge
)

// Config is what a Conn needs.
type Config struct {
	// MaxHeaderBytes and MaxHeaderFields bound the header of a response: see
	// http2.Config.
	MaxHeaderBytes, MaxHeaderFields int
	// TakeTime is how long the backend may take nothing of what waits to be sent,
	// until the connection ends. 0: for ever. It is asked when needed.
	TakeTime func() time.Duration
	Owner    Owner
}

// Conn is an HTTP/2 connection to a backend. Its methods are called on its loop.
type Conn struct {
	cfg     Config
	wire    Transport
	loop    *loop.Loop
	machine *http2.Conn
	streams map[uint32]*Stream
	full    bool  // the wire wants nothing more for now
	ended   error // why nothing goes on

	starting []*Stream // they begin when the wire is not full
	blocked  []*Stream // they have something to send and may not, in their turns
	news     []*Stream // their Fronts have to be told something; but for failures, not while the backend is stuck
	telling  bool      // tell is posted
	tellLate func()    // tell

	heard    time.Duration // when something came last, in the loop's time
	refilled time.Duration
	quiet    *loop.Timer // sees to pings

	output   *loop.Timer // sees to what the backend doesn't take
	watching bool
	stuck    bool
	taken    int64         // bytes that the kernel had taken when output was set
	since    time.Duration // since when no more were

	// A stream that was reset is free only when the backend has seen that: when it
	// answers a PING, or has taken too long. Otherwise a client that gives up one request after the other
	// would have more of them under way than the backend allows.
	reset   int           // streams that were reset since the last PING
	awaited int           // streams that were reset before it
	pinging bool          // it is not answered yet
	mayPing bool          // the backend has answered something since: some count PINGs
	asked   time.Duration // when a sign of life was asked for last
	waited  *loop.Timer   // frees them anyway
}

// New begins HTTP/2 on a connection.
func New(wire Transport, cfg Config) *Conn {
	c := &Conn{
		cfg: cfg, wire: wire, loop: wire.Loop(), streams: map[uint32]*Stream{},
		machine: http2.NewClient(http2.Config{
			MaxStreams: MaxStreams, MaxHeaderBytes: cfg.MaxHeaderBytes, MaxHeaderFields: cfg.MaxHeaderFields, StreamWindow: exchange.AnswerWindow,
		}),
	}
	c.tellLate = c.tell
	c.heard, c.refilled = c.loop.Now(), c.loop.Now()
	c.quiet, c.output, c.waited = wire.Timer(c.look), wire.Timer(c.watch), wire.Timer(c.freeReset)
	c.quiet.Set(pingAfter)
	c.flush()
	return c
}

// buffers hold what is written at once.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 40<<10); return &b }}

// events are what Next tells. They keep what it needs to decode heads.
var events = sync.Pool{New: func() any { return new(http2.Event) }}

// Data takes bytes of the backend.
func (c *Conn) Data(p []byte) {
	c.heard = c.loop.Now()
	if waited := c.heard - c.refilled; waited >= refillEvery {
		c.machine.Refill(refill * int(min(waited, time.Minute)/refillEvery))
		c.refilled = c.heard
	}
	ev := events.Get().(*http2.Event)
	defer events.Put(ev)
	for c.ended == nil {
		n, err := c.machine.Next(p, ev)
		if err != nil {
			c.flush() // GOAWAY
			c.end(err)
			return
		}
		p = p[n:]
		if ev.Kind == http2.None {
			break
		}
		c.handle(ev)
	}
	c.flush()
}

func (c *Conn) handle(ev *http2.Event) {
	switch ev.Kind {
	case http2.Settings:
		c.settled()
	case http2.GoAway:
		c.cfg.Owner.Unwanted()
	case http2.Pong:
		c.pong()
	case http2.Window:
		if s := c.streams[ev.Stream]; s != nil {
			c.pump(s)
		} else if ev.Stream == 0 {
			c.pumpAll()
		}
	default:
		if s := c.streams[ev.Stream]; s != nil {
			s.take(ev)
		}
	}
}

// settled takes what the backend's SETTINGS say.
func (c *Conn) settled() {
	c.cfg.Owner.Settled(c.machine.Limit())
	c.pumpAll() // windows may be wider
}

// write sends what was appended to b, and puts b back.
func (c *Conn) write(b *[]byte, out []byte) {
	if len(out) > 0 && c.ended == nil {
		c.full = !c.wire.Write(out)
		if !c.watching {
			c.watching = true
			c.taken, c.since = c.wire.Written(), c.loop.Now()
			c.output.Set(stuckAfter)
		}
	}
	if cap(out) <= 128<<10 {
		*b = out[:0]
		buffers.Put(b)
	}
}

// flush sends the frames that the machine owes.
func (c *Conn) flush() {
	if c.machine.Pending() {
		b := buffers.Get().(*[]byte)
		c.write(b, c.machine.AppendPending(*b))
	}
}

// Writable says that the backend has taken what it was sent.
func (c *Conn) Writable() {
	c.full = false
	starting := c.starting
	c.starting = nil
	for _, s := range starting {
		c.open(s)
	}
	c.pumpAll()
}

// PeerEnded says that the backend sends nothing more.
func (c *Conn) PeerEnded() { c.end(errPeerEnded) }

// Closed says that the connection has ended. err may be nil.
func (c *Conn) Closed(err error) {
	if err == nil {
		err = errLeft
	}
	c.end(err)
}

// Leave ends the connection in order. Exchanges that are under way fail for err, nil
// if there are none.
func (c *Conn) Leave(err error) {
	if c.ended != nil {
		return
	}
	c.machine.GoAway(http2.NoError)
	c.flush()
	c.Closed(err)
}

// end fails what is on the connection, and ends it.
func (c *Conn) end(err error) {
	if c.ended != nil {
		return
	}
	c.ended = err
	c.quiet.Stop()
	c.output.Stop()
	c.waited.Stop()
	c.cfg.Owner.Ended(err)
	for id, s := range c.streams {
		delete(c.streams, id)
		s.fail(Failure{Kind: Lost, Err: err, Written: c.wire.Written() > s.before || c.wire.Buffered() > 0})
	}
	starting := c.starting
	c.starting, c.blocked = nil, nil
	for _, s := range starting {
		s.fail(Failure{Kind: Lost, Err: err})
	}
	c.freeReset()
	c.wire.Close()
}

// look asks for a sign of life.
func (c *Conn) look() {
	now := c.loop.Now()
	switch silent := now - c.heard; {
	case silent < pingAfter:
		c.quiet.Set(pingAfter - silent)
	case c.pinging && c.asked >= c.heard && now-c.asked >= pingWait:
		c.end(errNoPong)
	default:
		if !c.pinging || c.asked < c.heard {
			c.asked = now
			c.ping()
		}
		c.quiet.Set(pingWait)
	}
}

// ping asks the backend to answer, unless it has been asked.
func (c *Conn) ping() {
	if c.pinging {
		return
	}
	c.pinging, c.mayPing = true, false
	c.awaited, c.reset = c.reset, 0
	c.machine.Ping()
	c.flush()
}

// pong frees the streams of which the backend knows that they are reset.
func (c *Conn) pong() {
	c.pinging = false
	n := c.awaited
	c.awaited = 0
	c.cfg.Owner.Free(0, n, false)
	if c.reset > 0 && c.ended == nil {
		c.ping()
	}
}

// cool sees to it that the stream becomes free that was just reset. A backend that
// has answered nothing since the last PING may take another for a flood, as gRPC's
// does.
func (c *Conn) cool(answered bool) {
	if c.ended != nil || !c.mayPing && !c.pinging {
		c.cfg.Owner.Free(1, 1, answered)
		return
	}
	c.cfg.Owner.Free(1, 0, answered)
	if c.reset++; !c.waited.Pending() {
		c.waited.Set(freeAfter)
	}
	c.ping()
}

// freeReset frees the streams that were reset.
func (c *Conn) freeReset() {
	n := c.reset + c.awaited
	c.reset, c.awaited = 0, 0
	if n > 0 {
		c.cfg.Owner.Free(0, n, false)
	}
}

// watch finds out whether the backend takes what it is sent.
func (c *Conn) watch() {
	out, now := c.wire.Written(), c.loop.Now()
	if moved := out != c.taken; moved || c.wire.Buffered() == 0 {
		c.taken, c.since = out, now
	}
	waits := now - c.since
	if stuck := waits >= stuckAfter; stuck != c.stuck {
		c.stuck = stuck
		c.cfg.Owner.Stuck(stuck)
		c.tell()
	}
	switch limit := c.cfg.TakeTime(); {
	case c.ended != nil:
	case limit > 0 && waits >= limit:
		c.end(ErrStuck)
	case c.wire.Buffered() > 0:
		c.output.Set(stuckAfter)
	default:
		c.watching = false
	}
}
