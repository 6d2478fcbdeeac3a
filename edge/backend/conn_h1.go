package backend

import (
	"bufio"
	"bytes"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/exchange"
)

// h1Conn is an HTTP/1.1 connection.
//
// One goroutine (watch) keeps a Read pending whenever no response is being
// read. So a connection that dies idle is gone before a request could use it,
// and TLS 1.3 tickets, which arrive only on Read, are collected. When a
// response begins, watch reads its header into reader and hands over to the
// request's goroutine by ready; with resume it gets the connection back.
type h1Conn struct {
	*pooled
	state  atomic.Int32 // h1Idle, h1Active, h1Dead
	ready  chan struct{}
	resume chan struct{}

	// Owned by watch, or by the request between ready and resume.
	reader *bufio.Reader
	first  [1]byte
	unread bool // first holds a byte that reader has not got yet
	err    error
	// head is the length of the head that reader holds, or 0, and headErr says
	// why there is none.
	head    int
	headErr error
	limit   int64 // bytes that a header may still have; <0 is no limit

	exchange atomic.Pointer[h1Exchange] // under way, to be told of an abort
	timer    *time.Timer                // for the response header; used by the request

	// Guarded by endpoint.mu.
	since  time.Time // idle since
	rested bool      // it has been idle
	served int
	owner  owner
	holder *share // of the client whose request it serves
}

const (
	h1Idle int32 = iota
	h1Active
	h1Dead
)

// maxResponseHeader bounds a response's header, in bytes.
const maxResponseHeader = 1 << 20

// noLimit is h1Conn.limit outside of headers.
const noLimit = -1

// h1Readers are in use only while a response is read.
var h1Readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readerSize) }}

const readerSize = 16 << 10

// newH1Conn starts to watch c. It is active until it is offered.
func newH1Conn(c *pooled) *h1Conn {
	h := &h1Conn{
		pooled: c, ready: make(chan struct{}, 1), resume: make(chan struct{}, 1),
		limit: noLimit, timer: time.NewTimer(time.Hour),
	}
	h.timer.Stop()
	h.state.Store(h1Active)
	c.Hook(conn.Hooks{Leave: h.leave, Broken: func() {
		if x := h.exchange.Load(); x != nil {
			x.abort(fail(ReasonReset, errClosed))
		}
	}})
	b := c.e.pool.b
	b.spawn("a connection", func() {
		if b.guarded("a connection", h.watch) != nil {
			h.unwatched()
		}
	})
	return h
}

// leave takes a connection that is ending from its client.
func (c *h1Conn) leave() {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.e.unhold(c)
}

// unwatched ends the connection when watch failed.
func (c *h1Conn) unwatched() {
	c.err = errWatchEnded
	select {
	case c.ready <- struct{}{}:
	default:
	}
	c.e.dropIdle(c)
	c.Close()
}

// watch waits for responses until the connection ends.
func (c *h1Conn) watch() {
	for {
		err := c.await()
		if !c.Closing() && err != nil && (err == errUnsolicited || c.state.CompareAndSwap(h1Idle, h1Dead)) {
			// It ended, or sent what nobody asked for, while idle.
			c.e.dropIdle(c)
			c.Close()
			return
		}
		c.err = err
		c.ready <- struct{}{}
		if err != nil {
			return
		}
		select {
		case <-c.resume:
		case <-c.Ended():
			return
		}
	}
}

// await reads until a whole head is buffered.
func (c *h1Conn) await() error {
	if c.reader == nil {
		// Idle connections hold no buffer: one byte tells that more has come.
		if _, err := c.pooled.Read(c.first[:]); err != nil {
			return err
		}
		if c.state.CompareAndSwap(h1Idle, h1Dead) {
			return errUnsolicited
		}
		c.unread = true
		c.reader = h1Readers.Get().(*bufio.Reader)
		c.reader.Reset(c)
	}
	c.limit, c.head, c.headErr = maxResponseHeader, 0, nil
	if _, err := c.reader.Peek(1); err != nil {
		return err
	}
	seen := 0
	for {
		have := c.reader.Buffered()
		peeked, _ := c.reader.Peek(have)
		if !bytes.HasPrefix(peeked, []byte("HTTP/")[:min(have, 5)]) {
			c.headErr = errNotHTTP
			return nil
		}
		if c.head, c.headErr = exchange.EndOfHead(peeked, seen); c.head > 0 || c.headErr != nil {
			return nil
		}
		seen = have
		if have == c.reader.Size() {
			c.widen(peeked)
		}
		if _, c.headErr = c.reader.Peek(have + 1); c.headErr != nil {
			return nil // it broke off
		}
	}
}

// widen gives the reader a larger buffer. have is what the present one holds.
func (c *h1Conn) widen(have []byte) {
	wider := bufio.NewReaderSize(io.MultiReader(bytes.NewReader(bytes.Clone(have)), c), 4*len(have))
	c.freeReader()
	c.reader = wider
}

// Read is what reader reads from.
func (c *h1Conn) Read(p []byte) (int, error) {
	if c.unread && len(p) > 0 {
		c.unread = false
		p[0] = c.first[0]
		return 1, nil
	}
	if c.limit == 0 {
		return 0, errHeaderTooBig
	}
	if c.limit > 0 && int64(len(p)) > c.limit {
		p = p[:c.limit]
	}
	n, err := c.pooled.Read(p)
	if c.limit > 0 {
		c.limit -= int64(n)
	}
	if x := c.exchange.Load(); x != nil && n > 0 {
		x.touch()
	}
	return n, err
}

// freeReader gives the buffer back once nothing of a response is left in it.
func (c *h1Conn) freeReader() {
	if c.reader == nil {
		return
	}
	if c.reader.Size() == readerSize {
		c.reader.Reset(nil)
		h1Readers.Put(c.reader)
	}
	c.reader = nil
}

// take makes an idle connection active. It fails if the connection has just
// died. endpoint.mu is held.
func (c *h1Conn) take() bool { return c.state.CompareAndSwap(h1Idle, h1Active) }

// rest makes an active connection idle. endpoint.mu is held.
func (c *h1Conn) rest(now time.Time) bool {
	if c.Closing() || len(c.ready) > 0 {
		return false
	}
	c.since, c.rested = now, true
	c.Count(conn.Idle)
	c.state.Store(h1Idle)
	return true
}

// granted counts the request that the connection is about to serve.
// endpoint.mu is held.
func (c *h1Conn) granted(w *waiter) grant {
	c.served++
	c.owner = c.owner.next(w.call)
	c.e.ownFor(w, &c.owner)
	c.e.hold(c, w.call.Client)
	c.Count(conn.Active)
	return grant{h1: c, reused: c.served > 1, stale: c.served > 1 || c.rested}
}

// expired reports whether the connection may serve no more requests.
// endpoint.mu is held.
func (c *h1Conn) expired(s *settings, now time.Time) bool {
	return s.maxRequests > 0 && c.served >= s.maxRequests ||
		s.maxLifetime > 0 && now.Sub(c.Created) >= s.maxLifetime ||
		c.state.Load() == h1Idle && now.Sub(c.since) >= s.idleTimeout ||
		s.orphaned(c.served, c.owner)
}

// drop ends an idle connection that has been taken out of its set.
func (c *h1Conn) drop() {
	c.state.Store(h1Dead)
	c.Close()
}

// dropIdle takes a connection that died out of the idle ones.
func (e *endpoint) dropIdle(c *h1Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	set := e.sets[c.key]
	if set == nil {
		return
	}
	for i, idle := range set.idle {
		if idle == c {
			set.idle = append(set.idle[:i], set.idle[i+1:]...)
			return
		}
	}
}
