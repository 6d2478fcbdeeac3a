package frontend

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// clientConn is a client's connection, beneath TLS.
type clientConn struct {
	net.Conn
	tcp        *net.TCPConn // beneath Conn
	id         uint64
	gone       chan struct{} // closed by Close
	slot       *slot
	refused    bool // its requests are, since memory is at its bound
	generation atomic.Pointer[generation]
	requests   atomic.Uint64
	received   atomic.Bool  // any byte after a PROXY header
	peerClosed atomic.Bool  // TCP, not only TLS
	taken      atomic.Int64 // Unix ns: when the client last took bytes of an answer
	aborted    atomic.Bool  // closed by us to end a drain
	stalled    atomic.Bool  // closed by us because the client took nothing

	leaving   atomic.Bool // must leave, since its certificate is refused now
	policyKey string      // of the policy under which it said hello

	// Set before the first request.
	source netip.AddrPort // the client, as a PROXY header says
	port   uint16         // that the client connected to
	tls    tls.ConnectionState
	sni    string // as exchange.HostName returns it, or ""

	certificate *clientCertificate // nil: none

	guard   *guard           // nil for HTTP/2 and protocol tls
	h2      *h2Conn          // nil for all but HTTP/2
	tickets *ticketHandshake // nil before the client said hello

	mu     sync.Mutex
	active bool
	closed bool
	ending func()    // called by Close
	conn   *tls.Conn // above, after the handshake

	writes  sync.Mutex
	writeBy time.Time // that users of the connection set
}

func newClientConn(s *slot, conn *net.TCPConn) *clientConn {
	c := &clientConn{Conn: conn, tcp: conn, id: s.frontend.clients.Add(1), gone: make(chan struct{}), slot: s, active: true}
	c.addressed(conn.RemoteAddr(), conn.LocalAddr())
	c.taken.Store(time.Now().UnixNano())
	s.counters.Add(exchange.Opened.At(), 1)
	s.counters.Add(exchange.Connections.At(exchange.Active), 1)
	return c
}

// addressed takes over the addresses of client and edge.
func (c *clientConn) addressed(remote, local net.Addr) {
	if tcp, ok := remote.(*net.TCPAddr); ok {
		address := tcp.AddrPort()
		c.source = netip.AddrPortFrom(address.Addr().Unmap(), address.Port())
	}
	if tcp, ok := local.(*net.TCPAddr); ok {
		c.port = tcp.AddrPort().Port()
	}
}

// Read notices data and who ends the connection.
func (c *clientConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && !c.received.Load() {
		c.received.Store(true)
	}
	if err != nil && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
		c.peerClosed.Store(true)
	}
	return n, err
}

// Write fails when the client does not take p for somewhat more than the
// listener's idle time, whatever p is: answers, alerts, acknowledgements of
// HTTP/2. Those who know what is written give up before, and say why.
func (c *clientConn) Write(p []byte) (int, error) {
	by := time.Now().Add(writeBound(c.slot.state.Load().Spec.GetTimeouts().GetIdle().AsDuration()))
	c.writes.Lock()
	if !c.writeBy.IsZero() && c.writeBy.Before(by) {
		by = c.writeBy
	}
	_ = c.tcp.SetWriteDeadline(by) // fails only on a closed connection
	c.writes.Unlock()
	return c.tcp.Write(p)
}

func writeBound(idle time.Duration) time.Duration { return idle + idle/4 }

// SetWriteDeadline implements net.Conn.
func (c *clientConn) SetWriteDeadline(t time.Time) error {
	c.writes.Lock()
	defer c.writes.Unlock()
	c.writeBy = t
	return c.tcp.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (c *clientConn) SetDeadline(t time.Time) error {
	return errors.Join(c.tcp.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *clientConn) SetReadDeadline(t time.Time) error { return c.tcp.SetReadDeadline(t) }

// setActive moves the connection between the gauges.
func (c *clientConn) setActive(active bool) {
	c.mu.Lock()
	if c.closed || c.active == active {
		c.mu.Unlock()
		return
	}
	c.gauge(-1)
	c.active = active
	c.gauge(1)
	c.mu.Unlock()
	if !active && c.leaving.Load() {
		c.seeOut()
	}
}

// gauge moves the gauge of the present state.
func (c *clientConn) gauge(delta int64) {
	if c.active {
		c.slot.counters.Add(exchange.Connections.At(exchange.Active), delta)
	} else {
		c.slot.counters.Add(exchange.Connections.At(exchange.Idle), delta)
	}
}

// Close closes the connection and gives back what it held. Further calls do
// nothing.
func (c *clientConn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	close(c.gone)
	c.gauge(-1)
	ending := c.ending
	c.mu.Unlock()
	if ending != nil {
		ending()
	}
	err := c.tcp.Close() // a handshake may just be putting a PROXY header's Conn in front
	// A close_notify alone does not count as the client's end.
	c.slot.counters.Add(exchange.Closed.At(int(resealv1.CloseKind_CLOSE_KIND_UNSPECIFIED), exchange.By(c.peerClosed.Load())), 1)
	c.slot.gate.leave()
	c.slot.frontend.memory.give(connectionBytes)
	if g := c.generation.Load(); g != nil {
		g.remove(c)
	}
	return err
}

// reset closes the connection in a way that no client takes for an orderly end.
func (c *clientConn) reset() {
	_ = c.tcp.SetLinger(0) // fails only on a closed connection
	_ = c.Close()          // likewise
}

// onClose has Close call f, until the returned function is called.
func (c *clientConn) onClose(f func()) (stop func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		f()
	}
	c.ending = f
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ending = nil
	}
}
