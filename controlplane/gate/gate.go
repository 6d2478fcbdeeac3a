// Package gate bounds what callers without a certificate hold of the gRPC port:
// connections, in all and per address, their time and their bytes, so that nobody
// unknown can take the descriptors, the memory or the room of those who are
// known. And it admits new connections at the rate at which their handshakes can be
// done.
package gate

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
)

const (
	// IdleTimeout ends an anonymous connection on which nothing arrives, and Lifetime
	// any. Enrolling takes a second.
	IdleTimeout = 15 * time.Second
	Lifetime    = 2 * time.Minute
	// MaxBytes bounds what an anonymous connection may send: an enrolment and health
	// checks are some kilobytes.
	MaxBytes = 1 << 20

	// Descriptors that are kept back for the store, files, the page and what else a
	// process needs.
	reserved = 128
	// maxAnonymous bounds anonymous connections, whatever the limit of descriptors.
	maxAnonymous  = 1024
	sweepInterval = time.Second
)

// Limits bound connections. Zero fields are derived from the process' limit of
// open files.
type Limits struct {
	// All bounds all connections.
	All int
	// Anonymous bounds those without a client certificate, those whose handshake is
	// under way included. At the bound the oldest of the address that has the most
	// is ended for the newest.
	Anonymous int
	// PerSource bounds those of one IPv4 address or IPv6 /64.
	PerSource int
}

func (l Limits) withDefaults() Limits {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		files.Cur = 1024
	}
	if l.All <= 0 {
		l.All = max(int(min(files.Cur, 1<<20))-reserved, 16)
	}
	if l.Anonymous <= 0 {
		l.Anonymous = max(min(l.All/4, maxAnonymous), 8)
	}
	if l.PerSource <= 0 {
		l.PerSource = max(l.Anonymous/2, 4)
	}
	return l
}

// Gate wraps a listener, and the credentials of the server on it.
type Gate struct {
	limits Limits
	log    *slog.Logger
	turned rate.Sometimes // away, of being logged
	turns  turns

	mu        sync.Mutex
	all       int
	anonymous map[netip.Prefix][]*conn // oldest first
	count     int                      // of anonymous
}

// New makes a gate.
func New(limits Limits, logger *slog.Logger) *Gate {
	return &Gate{
		limits: limits.withDefaults(), log: logger,
		turned:    rate.Sometimes{First: 1, Interval: time.Minute},
		turns:     newTurns(),
		anonymous: map[netip.Prefix][]*conn{},
	}
}

// Run ends anonymous connections whose time is over, until ctx ends. It returns nil.
func (g *Gate) Run(ctx context.Context) error {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			for _, c := range g.overdue(now) {
				_ = c.Close()
			}
		}
	}
}

func (g *Gate) overdue(now time.Time) []*conn {
	g.mu.Lock()
	defer g.mu.Unlock()
	var ended []*conn
	for _, conns := range g.anonymous {
		for _, c := range conns {
			if now.Sub(c.since) > Lifetime || now.UnixNano()-c.heard.Load() > int64(IdleTimeout) {
				ended = append(ended, c)
			}
		}
	}
	return ended
}

// Listener wraps the port's.
func (g *Gate) Listener(inner net.Listener) net.Listener { return &listener{inner, g} }

type listener struct {
	net.Listener
	gate *Gate
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		l.gate.turns.await()
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err // the server waits and tries again when files are short
		}
		if c := l.gate.enter(raw); c != nil {
			return c, nil
		}
		_ = raw.Close()
	}
}

// enter admits a connection as an anonymous one, nil when there is no room.
func (g *Gate) enter(raw net.Conn) *conn {
	now := time.Now()
	c := &conn{Conn: raw, gate: g, since: now, source: sourceOf(raw.RemoteAddr()), anonymous: true}
	c.heard.Store(now.UnixNano())
	g.mu.Lock()
	ended, ok := g.makeRoomLocked(c.source)
	if ok {
		g.all++
		g.count++
		g.anonymous[c.source] = append(g.anonymous[c.source], c)
	}
	g.mu.Unlock()
	if ended != nil {
		_ = ended.Close()
	}
	if ended != nil || !ok {
		g.turned.Do(func() {
			g.log.Warn("connections without a certificate are turned away", "source", c.source.String(),
				"limit", g.limits.Anonymous, "per_source", g.limits.PerSource, "all", g.limits.All)
		})
	}
	if !ok {
		return nil
	}
	return c
}

// makeRoomLocked says which anonymous connection ends for one more of a source, nil
// for none, and whether there is room then.
func (g *Gate) makeRoomLocked(source netip.Prefix) (*conn, bool) {
	var from []*conn
	switch own := g.anonymous[source]; {
	case len(own) >= g.limits.PerSource:
		from = own
	case g.count >= g.limits.Anonymous || g.all >= g.limits.All:
		for _, conns := range g.anonymous {
			if len(conns) > len(from) {
				from = conns
			}
		}
		if len(from) == 0 {
			return nil, false // all have certificates
		}
	default:
		return nil, true
	}
	// Those in the middle of the handshake may turn out to be known: they come last.
	ended := from[0]
	for _, c := range from {
		if c.shaken {
			ended = c
			break
		}
	}
	g.removeLocked(ended)
	g.all--
	ended.left = true
	return ended, true
}

// removeLocked takes c out of the anonymous ones, if it is one.
func (g *Gate) removeLocked(c *conn) {
	if !c.anonymous {
		return
	}
	c.anonymous = false
	g.count--
	conns := g.anonymous[c.source]
	for i := range conns {
		if conns[i] == c {
			conns = append(conns[:i:i], conns[i+1:]...)
			break
		}
	}
	if len(conns) == 0 {
		delete(g.anonymous, c.source)
		return
	}
	g.anonymous[c.source] = conns
}

// conn is a connection of the port.
type conn struct {
	net.Conn
	gate   *Gate
	since  time.Time
	source netip.Prefix
	heard  atomic.Int64 // when something arrived, as UnixNano
	read   atomic.Int64 // bytes, while it is anonymous
	known  atomic.Bool  // it has a certificate

	shaking bool // a handshake is under way; of the goroutine that does it

	// Guarded by Gate.mu.

	anonymous bool
	shaken    bool // the handshake is done, without certificate
	left      bool
}

var errTooMuch = errors.New("a connection without a certificate may not send that much")

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	if c.shaking {
		c.gate.turns.give()
		defer c.gate.turns.take()
	}
	n, err := c.Conn.Read(p)
	if c.known.Load() {
		return n, err
	}
	c.heard.Store(time.Now().UnixNano())
	if c.read.Add(int64(n)) > MaxBytes {
		_ = c.Close()
		return 0, errTooMuch
	}
	return n, err
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.gate.mu.Lock()
	c.gate.removeLocked(c)
	if !c.left {
		c.left = true
		c.gate.all--
	}
	c.gate.mu.Unlock()
	return c.Conn.Close()
}

// shook notes how the handshake ended.
func (c *conn) shook(known bool) {
	c.known.Store(known)
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	c.shaken = true
	if known {
		c.gate.removeLocked(c)
	}
}

// Credentials wraps those of the server, so that the gate learns who has a
// certificate. inner must verify the certificates that it is given.
func (g *Gate) Credentials(inner credentials.TransportCredentials) credentials.TransportCredentials {
	return knowing{inner}
}

type knowing struct {
	credentials.TransportCredentials
}

func (k knowing) Clone() credentials.TransportCredentials {
	return knowing{k.TransportCredentials.Clone()}
}

func (k knowing) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return k.TransportCredentials.ServerHandshake(raw)
	}
	var secured net.Conn
	var auth credentials.AuthInfo
	var err error
	c.handshake(func() { secured, auth, err = k.TransportCredentials.ServerHandshake(raw) })
	if err == nil {
		info, isTLS := auth.(credentials.TLSInfo)
		c.shook(isTLS && len(info.State.VerifiedChains) > 0)
	}
	return secured, auth, err
}

// sourceOf is an IPv4 address, or the /64 of an IPv6 one, since that is what one
// customer has.
func sourceOf(address net.Addr) netip.Prefix {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip, _ := netip.AddrFromSlice(tcp.IP)
	ip = ip.Unmap()
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	prefix, _ := ip.Prefix(bits)
	return prefix
}
