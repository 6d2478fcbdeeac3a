package conn

import (
	"io"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// This file is the one place where connections to backends end. Every end goes
// through Conn.Close (after a completed handshake) or lingerClose (before).
//
// A server may forget the TLS session of a connection that ended without
// close_notify, and an RST can destroy a close_notify that is still on its way.
// So we wait for a Write under way (crypto/tls skips close_notify during one),
// send close_notify, read on to the peer's close_notify and to its FIN, and
// only then close the socket. All this happens off the request's path and
// within closeTimeout. Since the peer's FIN comes first, TIME_WAIT stays with
// it.

// Close begins the end of the connection and returns at once. Only the first
// call has an effect.
func (c *Conn) Close() {
	if !c.closing.CompareAndSwap(false, true) {
		return
	}
	close(c.ended)
	c.Count(gone)
	c.dialer.Guard.Spawn("a close", func() {
		defer c.leave()
		c.finish()
	})
}

// finish ends the connection and counts how it ended.
func (c *Conn) finish() {
	if h := c.hooks.Load(); h != nil && h.Leave != nil {
		h.Leave()
	}
	kind := resealv1.CloseKind_CLOSE_KIND_RESET_BY_US // as it is after a panic
	defer func() {
		c.dialer.Counters.Add(exchange.Closed.At(int(kind), exchange.By(c.peerEnded.Load())), 1)
	}()
	kind = c.end(time.Now().Add(c.owner.CloseTimeout()))
	sessions := c.dialer.Handshaker
	if unclean(kind) {
		sessions.Unclean(c.identity)
	}
	if kind == resealv1.CloseKind_CLOSE_KIND_RESET_BY_PEER {
		sessions.Doubt(c.identity)
	}
}

// leave gives back what the connection held.
func (c *Conn) leave() {
	_ = c.TLS.NetConn().Close()
	c.owner.Gone()
}

// end ends the connection by deadline and says how it ended.
func (c *Conn) end(deadline time.Time) resealv1.CloseKind {
	c.wire.capWrites(deadline)
	if h := c.hooks.Load(); h != nil && h.Goodbye != nil && !c.peerEnded.Load() {
		h.Goodbye(deadline)
	}
	c.wire.interrupt()
	c.readMu.Lock() // whoever read has let go
	defer c.readMu.Unlock()
	_ = c.wire.SetReadDeadline(deadline)

	peerEnded := c.peerEnded.Load()
	before := c.wire.came.Load()
	sent := c.notify()
	drain(c.TLS.Read, c.observeEnd)
	notified := <-sent == nil
	// What is left on the socket after close_notify, or after a damaged record.
	drain(c.wire.Read, nil)
	streaming := c.wire.pending() || c.wire.came.Load() > before && !c.wire.fin.Load() && !c.peerNotify.Load()
	_ = c.TLS.NetConn().Close() // not the wire beneath: whoever waits for a session learns of it
	return c.kind(peerEnded, notified, streaming)
}

// notify sends close_notify. While a Write is under way it must wait for it; a
// peer that writes as well may not read before we do, so the caller reads on
// meanwhile.
func (c *Conn) notify() <-chan error {
	sent := make(chan error, 1)
	if c.writes.Load() == 0 {
		sent <- c.TLS.CloseWrite()
		return sent
	}
	guard := c.dialer.Guard
	guard.Spawn("a close", func() {
		var err error
		defer func() { sent <- err }()
		defer guard.Caught("a close", &err)
		err = c.TLS.CloseWrite()
	})
	return sent
}

// observeEnd notes the peer's close_notify when it comes after ours.
func (c *Conn) observeEnd(err error) {
	if err == io.EOF && !c.wire.fin.Load() {
		c.peerNotify.Store(true)
	}
}

// kind classifies the end.
func (c *Conn) kind(peerEnded, notified, streaming bool) resealv1.CloseKind {
	fin, reset, theirs := c.wire.fin.Load(), c.wire.reset.Load(), c.peerNotify.Load()
	switch {
	case theirs && notified:
		return resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH
	case peerEnded && fin && !theirs:
		return resealv1.CloseKind_CLOSE_KIND_FIN_WITHOUT_NOTIFY
	case reset:
		return resealv1.CloseKind_CLOSE_KIND_RESET_BY_PEER
	case notified && fin:
		return resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_SENT
	case streaming:
		return resealv1.CloseKind_CLOSE_KIND_RESET_BY_US
	case fin && !theirs:
		return resealv1.CloseKind_CLOSE_KIND_FIN_WITHOUT_NOTIFY
	default:
		return resealv1.CloseKind_CLOSE_KIND_TIMEOUT
	}
}

// drainBuffers hold what is read only to be thrown away.
var drainBuffers = sync.Pool{New: func() any { return new([16 << 10]byte) }}

// drain reads until an error and passes it on.
func drain(read func([]byte) (int, error), ended func(error)) {
	buffer := drainBuffers.Get().(*[16 << 10]byte)
	defer drainBuffers.Put(buffer)
	for {
		if _, err := read(buffer[:]); err != nil {
			if ended != nil {
				ended(err)
			}
			return
		}
	}
}

// lingerClose ends a connection whose handshake did not complete: FIN, then
// what the peer still sends is read so that no RST overtakes an alert of ours.
func (w *wire) lingerClose(guard Guard, timeout time.Duration) {
	guard.Spawn("a close", func() {
		defer w.Close()
		if half, ok := w.Conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
		_ = w.SetReadDeadline(time.Now().Add(timeout))
		drain(w.Read, nil)
	})
}
