package backend

import (
	"context"
	"crypto/tls"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// tally implements Counters.
type tally struct {
	mu                           sync.Mutex
	opened, closed, active, idle int
	full, resumed, failed        int
	misses                       map[resealv1.MissReason]int
	kinds                        map[resealv1.CloseKind]int
	byPeer, requests, reused     int
	private, share               int
	errors                       map[string]int
}

func newTally() *tally {
	return &tally{
		misses: map[resealv1.MissReason]int{}, kinds: map[resealv1.CloseKind]int{}, errors: map[string]int{},
	}
}

func (c *tally) with(f func()) { c.mu.Lock(); defer c.mu.Unlock(); f() }

func (c *tally) Add(cell exchange.Cell, delta int64) {
	at, d := cell.Places(), int(delta)
	c.with(func() {
		switch cell.Counter {
		case exchange.Opened:
			c.opened += d
		case exchange.Closed:
			c.closed += d
			c.kinds[resealv1.CloseKind(at[0])] += d
			c.byPeer += d * at[1]
		case exchange.Private:
			c.private += d
		case exchange.Share:
			c.share += d
		case exchange.Connections:
			if at[0] == exchange.Active {
				c.active += d
			} else {
				c.idle += d
			}
		}
	})
}

func (c *tally) Handshake(m resealv1.Mechanism, miss resealv1.MissReason, _ uint16, _ time.Duration) {
	c.with(func() {
		if m == 0 {
			c.full++
			c.misses[miss]++
		} else {
			c.resumed++
		}
	})
}

func (c *tally) HandshakeFailed(time.Duration) { c.with(func() { c.failed++ }) }

func (c *tally) Request(reused bool, _ time.Duration) {
	c.with(func() {
		c.requests++
		if reused {
			c.reused++
		}
	})
}

func (c *tally) Error(reason string) { c.with(func() { c.errors[reason]++ }) }

// get reads a number under the lock.
func (c *tally) get(f func(*tally) int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f(c)
}

// fakeSessions is a small Handshaker with a session per identity.
type fakeSessions struct {
	mu      sync.Mutex
	caches  map[exchange.Identity]tls.ClientSessionCache
	unclean map[exchange.Identity]int
	forgot  []string
	// replaced holds "old next place ..." of each call of Replace.
	replaced []string
	seen     []exchange.Identity
	breakIt  func() bool // fail this handshake as if a session had broken it
}

func newFakeSessions() *fakeSessions {
	return &fakeSessions{caches: map[exchange.Identity]tls.ClientSessionCache{}, unclean: map[exchange.Identity]int{}}
}

func (f *fakeSessions) Reserve(_ context.Context, identity exchange.Identity, _ exchange.Terms) (exchange.Attempt, error) {
	return fakeAttempt{f, identity}, nil
}

func (f *fakeSessions) Doubt(exchange.Identity) {}

func (f *fakeSessions) Replace(old, next string, places []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.replaced = append(f.replaced, strings.Join(append([]string{old, next}, places...), " "))
}

type fakeAttempt struct {
	f        *fakeSessions
	identity exchange.Identity
}

func (a fakeAttempt) Release() {}

func (a fakeAttempt) Handshake(ctx context.Context, conn net.Conn, cfg *tls.Config) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	return a.f.Handshake(ctx, conn, a.identity, cfg)
}

func (f *fakeSessions) Handshake(ctx context.Context, conn net.Conn, identity exchange.Identity, cfg *tls.Config) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	f.mu.Lock()
	if f.caches[identity] == nil {
		f.caches[identity] = tls.NewLRUClientSessionCache(32)
	}
	cfg.ClientSessionCache = f.caches[identity]
	f.seen = append(f.seen, identity)
	broken := f.breakIt
	f.mu.Unlock()
	if broken != nil && broken() {
		return nil, 0, 0, brokenSession{f, identity, cfg}
	}
	return f.shake(ctx, conn, cfg)
}

func (f *fakeSessions) shake(ctx context.Context, conn net.Conn, cfg *tls.Config) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	tc := tls.Client(conn, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, 0, 0, err
	}
	switch state := tc.ConnectionState(); {
	case !state.DidResume:
		return tc, 0, resealv1.MissReason_MISS_REASON_NO_SESSION, nil
	case state.Version == tls.VersionTLS13:
		return tc, resealv1.Mechanism_MECHANISM_PSK, 0, nil
	default:
		return tc, resealv1.Mechanism_MECHANISM_TICKET, 0, nil
	}
}

func (f *fakeSessions) Forget(group string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgot = append(f.forgot, group)
	for identity := range f.caches {
		if identity.Group() == group {
			delete(f.caches, identity)
		}
	}
}

func (f *fakeSessions) Unclean(identity exchange.Identity) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unclean[identity]++
}

func (f *fakeSessions) identities() []exchange.Identity {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := slices.Clone(f.seen)
	slices.Sort(all)
	return slices.Compact(all)
}

func (f *fakeSessions) uncleanCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, c := range f.unclean {
		n += c
	}
	return n
}

type brokenSession struct {
	f        *fakeSessions
	identity exchange.Identity
	cfg      *tls.Config
}

func (brokenSession) Error() string { return "broken by the session" }

func (brokenSession) Release()       {}
func (brokenSession) Declined() bool { return false }

func (b brokenSession) FullHandshake(ctx context.Context, conn net.Conn) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	b.cfg.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	return b.f.shake(ctx, conn, b.cfg)
}
