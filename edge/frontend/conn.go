package frontend

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// clientConn is a client's connection, from accept to its end. A goroutine has it
// until the handshake is complete, then a loop, whose loop.Handler it is.
type clientConn struct {
	slot    *slot
	tcp     *net.TCPConn // nil once the loop has it
	id      uint64
	gone    chan struct{}  // closed at the end
	refused bool           // its requests are, since memory is at its bound
	source  netip.AddrPort // the client, as a PROXY header says
	port    uint16         // that the client connected to

	// Set by the handshake.
	tickets     *ticketHandshake // nil before the hello, and after the handshake
	policyKey   string           // of the policy under which it said hello
	serverName  string           // the SNI as it came
	sni         string           // the same as exchange.HostName returns it, or ""
	protocol    string           // by ALPN
	version     uint16           // of TLS
	resumed     bool
	miss        resealv1.MissReason // why it is not resumed
	certificate *clientCertificate  // nil: none

	leaving   atomic.Bool // is asked to leave
	dismissed atomic.Bool // likewise, and serves no further request: its certificate is refused now
	out       atomic.Bool // leaves as soon as it has no request
	aborted   atomic.Bool // ended by us at the end of a drain

	mu     sync.Mutex
	loop   *loop.Loop // nil: a goroutine has it
	closed bool       // over was called
	tls    *tls.Conn  // for what the client has shown; nil before the end of the handshake

	// The loop's.
	forwarded *forwarded // nil before the first request
	lane      *lane
	conn      *loop.Conn // nil before Open
	driver    driver
	clock     *loop.Timer
	wakes     time.Duration // when clock fires
	requests  uint64        // so many have come
	active    bool
	moved     time.Duration // when the client last took something, or had nothing to take
	sent      int64         // bytes that the kernel had taken then
	stalled   bool          // it is ended because it takes nothing
	bug       error         // a panic
}

func newClientConn(s *slot, conn *net.TCPConn) *clientConn {
	c := &clientConn{slot: s, tcp: conn, id: s.frontend.clients.Add(1), gone: make(chan struct{}), active: true}
	c.leaving.Store(s.frontend.draining.Load())
	c.addressed(conn.RemoteAddr(), conn.LocalAddr())
	s.frontend.open.Add(1)
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

// join gives the connection to a loop, which from now on alone uses it.
func (c *clientConn) join(wire *loop.Wire, tc loop.TLSConn) {
	lane := c.slot.frontend.nextLane()
	c.mu.Lock()
	if c.aborted.Load() {
		c.mu.Unlock()
		_ = c.tcp.Close()
		c.over(false)
		return
	}
	c.lane, c.tcp = lane, nil
	err := lane.loop.Join(wire, tc, c)
	if err == nil {
		c.loop = lane.loop
	}
	c.mu.Unlock()
	if err != nil {
		if !errors.Is(err, loop.ErrStopped) {
			c.slot.frontend.cfg.Logger.Warn("a client's connection can't be served", "listener", c.slot.name, "error", err)
		}
		c.over(false)
	}
}

// tell has the connection's loop call f. Before the loop has it nothing is called:
// Open looks at the flags.
func (c *clientConn) tell(f func()) {
	c.mu.Lock()
	l := c.loop
	c.mu.Unlock()
	if l != nil {
		l.Post(func() {
			if c.driver != nil {
				f()
			}
		})
	}
}

// leave asks the client to leave: answers say so. With out it leaves as soon as no
// request is under way.
func (c *clientConn) leave(out bool) {
	c.leaving.Store(true)
	if out {
		c.out.Store(true)
		c.tell(func() { c.driver.leave() })
	}
}

// abort ends the connection at once, at the end of a drain: without close_notify,
// since a client that does not read would hold it up.
func (c *clientConn) abort() {
	c.mu.Lock()
	c.aborted.Store(true)
	if c.loop == nil && !c.closed && c.tcp != nil {
		_ = c.tcp.Close() // ends the handshake
	}
	c.mu.Unlock()
	c.tell(func() { c.conn.Abort() })
}

// over gives back what the connection held. It is the end.
func (c *clientConn) over(byPeer bool) {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.gauge(-1)
	// A close_notify alone does not count as the client's end.
	c.slot.counters.Add(exchange.Closed.At(int(resealv1.CloseKind_CLOSE_KIND_UNSPECIFIED), exchange.By(byPeer)), 1)
	c.slot.gate.leave()
	c.slot.frontend.open.Add(-1)
	c.slot.frontend.memory.give(connectionBytes)
	c.slot.forget(c)
	close(c.gone)
}

// Open implements loop.Handler.
func (c *clientConn) Open(conn *loop.Conn) {
	defer c.caught()
	c.conn = conn
	if c.aborted.Load() {
		conn.Abort()
		return
	}
	c.clock = conn.Timer(c.look)
	c.moved = c.now()
	switch {
	case !c.settings().http():
		c.driver = &tunnel{serial{client: c}}
	case c.protocol == "h2":
		c.driver = newHTTP2(c)
	default:
		c.driver = newHTTP1(c)
	}
	c.setActive(false)
	c.driver.open()
	if c.out.Load() {
		c.driver.leave()
	}
}

// Data implements loop.Handler.
func (c *clientConn) Data(_ *loop.Conn, p []byte) {
	defer c.caught()
	c.driver.read(p)
}

// PeerEnded implements loop.Handler.
func (c *clientConn) PeerEnded(_ *loop.Conn, notified bool) {
	defer c.caught()
	c.driver.peerEnded(notified)
}

// Writable implements loop.Handler.
func (c *clientConn) Writable(*loop.Conn) {
	defer c.caught()
	c.driver.writable()
}

// Closed implements loop.Handler.
func (c *clientConn) Closed(_ *loop.Conn, end loop.Ending) {
	defer c.over(end.ByPeer && (end.FIN || end.Reset))
	if c.driver != nil {
		err := end.Err
		if err == nil {
			err = net.ErrClosed
		}
		c.driver.closed(err)
	}
}

// caught ends the connection after a panic.
func (c *clientConn) caught() {
	if bug := recover(); bug != nil {
		c.slot.panicked("a connection", bug)
		c.bug = fmt.Errorf("panic: %v", bug)
		c.conn.Abort()
	}
}

func (c *clientConn) now() time.Duration { return c.lane.loop.Now() }

// settings are the listener's, as of now.
func (c *clientConn) settings() *settings { return &c.slot.state.Load().settings }

// remind has the connection looked at after d at the latest.
func (c *clientConn) remind(d time.Duration) {
	if at := c.now() + d; !c.clock.Pending() || at < c.wakes {
		c.wakes = at
		c.clock.Set(d)
	}
}

// look ends what takes too long. A client that takes nothing of anything that is
// written to it (answers, alerts, acknowledgements) for the idle time is ended.
func (c *clientConn) look() {
	now, idle := c.now(), c.settings().idle
	if sent := c.conn.Stats().Out; c.conn.Buffered() == 0 || sent != c.sent {
		c.moved, c.sent = now, sent
	}
	if now-c.moved >= idle {
		c.stalled = true
		c.conn.Abort() // without close_notify, which it would not take either
		return
	}
	next := min(c.driver.look(now), idle)
	if c.conn.Buffered() > 0 {
		next = min(next, idle/4)
	}
	if c.conn.Open() {
		c.remind(next)
	}
}

// leaves reports whether the client is asked to leave, and answers have to say so.
func (c *clientConn) leaves() bool { return c.leaving.Load() || c.refused }

// setActive moves the connection between the gauges.
func (c *clientConn) setActive(active bool) {
	if c.active != active {
		c.gauge(-1)
		c.active = active
		c.gauge(1)
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

// farewell bounds how long the end of a connection may take. A client that is
// still sending reads the answer and our end before it learns that nobody listens.
const farewell = time.Second

// close ends the connection in order.
func (c *clientConn) close() { c.conn.Close(loop.Farewell{Within: farewell, FIN: true}) }

// flooded counts a connection that is ended for a flood.
func (c *clientConn) flooded() {
	c.slot.counters.Error("http2_flood")
	c.slot.frontend.cfg.Logger.Debug("a client floods its HTTP/2 connection with frames that are not requests; it is closed",
		"listener", c.slot.name, "peer", c.source.String())
}
