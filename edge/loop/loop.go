// Package loop runs many connections on few goroutines. A loop owns its
// connections (socket, TLS, buffers, timers) and calls their handlers one after
// the other, so handlers that share a loop share what they like without locks. It
// knows nothing of what is spoken on the connections.
//
// A loop works in rounds. It waits until something is ready, runs what was
// posted, fires timers, reads each ready connection and hands what it decrypted to
// the handler, and at last flushes each connection that was written to, once: what
// handlers wrote in a round leaves as few records and by few system calls.
// Buffers are lent for the round; a connection that is idle holds none.
//
// TLS is crypto/tls, unmodified. Its handshake runs on an ordinary goroutine over
// a blocking Wire; then the connection joins a loop, and from there on the Wire is
// memory: a Read that finds nothing returns a temporary error, after which
// crypto/tls can be asked again, and a Write appends. What that relies on is
// pinned by tls_test.go for each release of Go.
//
// Loops wait in one of two ways: by epoll, on Linux, or on a channel, with
// goroutines that read and write a net.Conn; these also serve connections without
// a descriptor.
package loop

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Config configures a Group. It is read once, by New.
type Config struct {
	// Loops is how many there are. Default: one for each processor.
	Loops int
	// Goroutines has the loops read and write through goroutines and net.Conn, on
	// every system. Default: epoll where there is epoll.
	Goroutines bool
	// HighWater is at how many bytes of output that the peer has not taken Write
	// tells the handler to stop; at a quarter of them Writable is called. At twice
	// as many nothing is read from the connection either, since peers can cause
	// output too. A connection whose handler goes on to write ends at eight times
	// as many. Default: 256 KiB.
	HighWater int
	// LoopOutput is at how many bytes of output of all its connections together a
	// loop lowers HighWater to 16 KiB for each. Default: 64 MiB.
	LoopOutput int
	// Panicked is told of a panic in a handler, a timer or a posted function, with
	// the stack. It is called on the loop. Default: the panic is not reported.
	Panicked func(bug any, stack []byte)
}

// Group is a fixed number of loops.
type Group struct {
	cfg   Config
	loops []*Loop
	turn  atomic.Uint32
	ran   atomic.Bool
	work  sync.WaitGroup // goroutines of pumps
}

// ErrStopped is returned for what comes to a loop that has ended.
var ErrStopped = errors.New("the loop has ended")

// New makes loops, which do nothing before Run but take what is posted.
func New(cfg Config) *Group {
	if cfg.Loops <= 0 {
		cfg.Loops = processors()
	}
	if cfg.HighWater <= 0 {
		cfg.HighWater = 256 << 10
	}
	if cfg.LoopOutput <= 0 {
		cfg.LoopOutput = 64 << 20
	}
	if cfg.Panicked == nil {
		cfg.Panicked = func(any, []byte) {}
	}
	g := &Group{cfg: cfg}
	for range cfg.Loops {
		g.loops = append(g.loops, &Loop{group: g, plain: make([]byte, maxPlaintext), in: make([]byte, readSize)})
	}
	return g
}

// Run runs the loops until ctx ends. Then it closes the connections that are left,
// tells their handlers, and returns nil. Until then it returns only when there is
// nothing to wait with, at the start, or when the group has been run before: it can't
// run again.
func (g *Group) Run(ctx context.Context) error {
	if g.ran.Swap(true) {
		return ErrStopped
	}
	for i, l := range g.loops {
		w, err := newWaiter(g.cfg)
		if err != nil {
			for _, before := range g.loops[:i] {
				before.waiter.close()
			}
			return fmt.Errorf("start an event loop: %w", err)
		}
		l.waiter, l.start = w, time.Now()
	}
	var running sync.WaitGroup
	for _, l := range g.loops {
		running.Go(l.run)
	}
	<-ctx.Done()
	for _, l := range g.loops {
		l.stopping.Store(true)
		l.wake()
	}
	running.Wait()
	g.work.Wait()
	return nil
}

// Loops are all loops.
func (g *Group) Loops() []*Loop { return g.loops }

// Next is the loop with the fewest connections, and with equal numbers each in
// turn.
func (g *Group) Next() *Loop {
	n := uint32(len(g.loops))
	first := g.turn.Add(1) % n
	best := g.loops[first]
	for i := uint32(1); i < n; i++ {
		if l := g.loops[(first+i)%n]; l.population.Load() < best.population.Load() {
			best = l
		}
	}
	return best
}

// Loop owns connections. But for Post and Join its methods are called on the loop
// alone: by handlers, timers and posted functions.
type Loop struct {
	group      *Group
	waiter     waiter
	start      time.Time
	now        time.Duration // since start, at the begin of the round
	wheel      wheel
	buffers    buffers
	plain, in  []byte // what is decrypted, what was read
	population atomic.Int64

	conns  []*Conn
	ready  []*Conn // something is to be done for them
	spare  []*Conn // ready of the round before
	dirty  []*Conn // have output
	over   []*Conn // have ended, and their handlers are not told yet
	moving []*Conn // leave for another loop
	share  int     // bytes that were read in this round
	output int     // bytes buffered by all connections

	stopping atomic.Bool
	asleep   atomic.Bool

	mu     sync.Mutex
	posted []func()
	came   []*pump // whose goroutines have news
	ended  bool
}

// Post has the loop call f, soon: between two rounds, which are kept short. It
// reports false when the loop has ended and f will not be called. Any goroutine may
// call it; functions that one goroutine posts are called in their order.
func (l *Loop) Post(f func()) bool {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return false
	}
	l.posted = append(l.posted, f)
	l.mu.Unlock()
	l.wake()
	return true
}

// news notes that a goroutine of a source has something for its connection.
func (l *Loop) news(p *pump) {
	l.mu.Lock()
	l.came = append(l.came, p)
	l.mu.Unlock()
	l.wake()
}

func (l *Loop) wake() {
	if l.asleep.CompareAndSwap(true, false) {
		l.waiter.wake()
	}
}

func (l *Loop) run() {
	defer l.waiter.close()
	for !l.stopping.Load() {
		l.round()
	}
	l.end()
}

func (l *Loop) round() {
	l.asleep.Store(true)
	l.waiter.wait(l, l.idle())
	l.asleep.Store(false)
	l.now = time.Since(l.start)
	l.runPosted()
	l.wheel.advance(int64(l.now/tick), l.fire)
	l.serveReady()
	l.tellOver()
	l.flushDirty()
	l.move()
}

// idle is until when there is nothing to do, as wait takes it.
func (l *Loop) idle() time.Duration {
	if len(l.ready)+len(l.dirty)+len(l.over)+len(l.moving) > 0 || l.stopping.Load() {
		return 0
	}
	l.mu.Lock()
	waiting := len(l.posted)+len(l.came) > 0
	l.mu.Unlock()
	if waiting {
		return 0
	}
	next, ok := l.wheel.next()
	if !ok {
		return -1
	}
	return time.Duration(next) * tick
}

// runPosted runs what other goroutines have left.
func (l *Loop) runPosted() {
	l.mu.Lock()
	posted, came := l.posted, l.came
	l.posted, l.came = nil, nil
	l.mu.Unlock()
	for _, p := range came {
		p.deliver(l)
	}
	for _, f := range posted {
		l.protect(nil, f)
	}
}

func (l *Loop) fire(t *Timer) {
	l.protect(t.conn, t.call)
}

// serveReady serves each connection that something is to be done for. Those for
// which there is still something afterwards, and those that are left when the round
// has read enough, have their turn in the next one.
func (l *Loop) serveReady() {
	ready := l.ready
	l.ready, l.spare = l.spare[:0], ready
	l.share = 0
	for i, c := range ready {
		if l.share >= roundSize {
			l.ready = append(slices.Clone(ready[i:]), l.ready...)
			clear(ready[i:])
			return
		}
		ready[i] = nil
		c.queued = false
		if c.loop == l {
			l.protect(c, c.serve)
		}
	}
}

// flushDirty writes what handlers have left, once for each connection.
func (l *Loop) flushDirty() {
	for i := 0; i < len(l.dirty); i++ {
		c := l.dirty[i]
		l.dirty[i] = nil
		c.dirty = false
		if c.loop == l {
			l.protect(c, c.flush)
		}
	}
	l.dirty = l.dirty[:0]
}

// tellOver tells handlers that their connections have ended.
func (l *Loop) tellOver() {
	for i := 0; i < len(l.over); i++ {
		c := l.over[i]
		l.over[i] = nil
		if h := c.handler; h != nil {
			c.handler = nil
			l.protect(nil, func() { h.Closed(c, c.ending) })
		}
	}
	l.over = l.over[:0]
}

// protect calls f. A panic ends c, which may be nil.
func (l *Loop) protect(c *Conn, f func()) {
	defer func() {
		if bug := recover(); bug != nil {
			l.group.cfg.Panicked(bug, debug.Stack())
			if c != nil && c.loop == l {
				c.finish(fmt.Errorf("panic: %v", bug), true)
			}
		}
	}()
	f()
}

// end closes what is left.
func (l *Loop) end() {
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.runPosted() // connections that were on their way
	for len(l.conns) > 0 {
		c := l.conns[len(l.conns)-1]
		c.finish(ErrStopped, false)
	}
	l.tellOver()
}

// Now is the time since the loop began, at the begin of the round.
func (l *Loop) Now() time.Duration { return l.now }

// Connections is how many connections the loop has. Any goroutine may ask.
func (l *Loop) Connections() int { return int(l.population.Load()) }

// Output is how many bytes of output its connections hold that peers have not
// taken.
func (l *Loop) Output() int { return l.output }

// enlist notes that something is to be done for a connection.
func (l *Loop) enlist(c *Conn) {
	if !c.queued {
		c.queued = true
		l.ready = append(l.ready, c)
	}
}

func (l *Loop) adopt(c *Conn) {
	c.loop, c.index = l, len(l.conns)
	l.conns = append(l.conns, c)
}

func (l *Loop) disown(c *Conn) {
	last := len(l.conns) - 1
	l.conns[c.index] = l.conns[last]
	l.conns[c.index].index = c.index
	l.conns[last] = nil
	l.conns = l.conns[:last]
	l.population.Add(-1)
}
