package conn

import (
	"io"
	"net"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// This file is the one place where connections to backends end. Every end goes
// through Conn.Close (after a completed handshake) or lingerClose (before).
//
// A server may forget the TLS session of a connection that ended without
// close_notify, and an RST can destroy a close_notify that is still on its way.
// So what was written goes out first, then close_notify; we read on to the peer's
// close_notify and to its FIN, and only then close the socket. All this happens
// within closeTimeout. Since the peer's FIN comes first, TIME_WAIT stays with it.

// Close begins the end of the connection. Only the first call has an effect. What was
// written is sent. Of the Handler only Closed is called afterwards.
func (c *Conn) Close() {
	if c.closing.Swap(true) {
		return
	}
	c.Count(gone)
	if c.on == nil {
		return // it never came to a loop
	}
	var err error
	defer func() {
		if err != nil {
			c.on.Abort()
		}
	}()
	defer c.dialer.Guard.Caught("a close", &err)
	// A TLS that runs on goroutines says close_notify where others say FIN.
	c.on.Close(loop.Farewell{Within: c.owner.CloseTimeout(), FIN: c.whole != nil})
}

// Kill closes the socket, when the time for all else is over. Any goroutine may call
// it.
func (c *Conn) Kill() {
	c.Do(func() {
		if c.on != nil {
			c.on.Abort()
		}
	})
}

// ended counts how a connection ended and gives back what it held.
func (c *Conn) ended(end loop.Ending) {
	if c.whole != nil {
		c.whole.ended <- end // it counts when TLS has ended, too
		return
	}
	_ = c.tls.NetConn().Close() // not the wire beneath: whoever waits for a session learns of it
	c.count(kindOf(end), end.ByPeer)
}

// count tells everybody how the connection ended.
func (c *Conn) count(kind resealv1.CloseKind, byPeer bool) {
	defer c.owner.Gone()
	var err error
	defer c.dialer.Guard.Caught("a close", &err)
	c.dialer.Counters.Add(exchange.Closed.At(int(kind), exchange.By(byPeer)), 1)
	sessions := c.dialer.Handshaker
	if unclean(kind) {
		sessions.Unclean(c.identity)
	}
	if kind == resealv1.CloseKind_CLOSE_KIND_RESET_BY_PEER {
		sessions.Doubt(c.identity)
	}
}

// kindOf classifies an end.
func kindOf(end loop.Ending) resealv1.CloseKind {
	switch {
	case end.PeerNotified && end.Notified:
		return resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH
	case end.ByPeer && end.FIN && !end.PeerNotified:
		return resealv1.CloseKind_CLOSE_KIND_FIN_WITHOUT_NOTIFY
	case end.Reset:
		return resealv1.CloseKind_CLOSE_KIND_RESET_BY_PEER
	case end.Notified && end.FIN:
		return resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_SENT
	case end.Unread:
		return resealv1.CloseKind_CLOSE_KIND_RESET_BY_US
	case end.FIN && !end.PeerNotified:
		return resealv1.CloseKind_CLOSE_KIND_FIN_WITHOUT_NOTIFY
	default:
		return resealv1.CloseKind_CLOSE_KIND_TIMEOUT
	}
}

// unclean are the ends after which a strict server forgets the session.
func unclean(kind resealv1.CloseKind) bool {
	return kind != resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH &&
		kind != resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_SENT
}

// drainBuffers hold what is read only to be thrown away.
var drainBuffers = sync.Pool{New: func() any { return new([16 << 10]byte) }}

// drain reads until an error.
func drain(r io.Reader) {
	buffer := drainBuffers.Get().(*[16 << 10]byte)
	defer drainBuffers.Put(buffer)
	for {
		if _, err := r.Read(buffer[:]); err != nil {
			return
		}
	}
}

// lingerClose ends a connection whose handshake did not complete: FIN, then
// what the peer still sends is read so that no RST overtakes an alert of ours.
func lingerClose(socket net.Conn, guard Guard, timeout time.Duration) {
	guard.Spawn("a close", func() {
		defer socket.Close()
		if half, ok := socket.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
		_ = socket.SetReadDeadline(time.Now().Add(timeout))
		drain(socket)
	})
}
