// Package backend is the edge's leg to TLS backends: pools of endpoints,
// connections that are reused only within their identity, balancing, health,
// retries, and the closing of connections.
//
// It is built so that a backend never pays for a handshake in vain: a dial is
// not tied to the request that caused it, connections are kept as long as they
// may be, and every one ends with close_notify on both sides where the peer
// allows it (close.go), since some servers forget the TLS session otherwise.
package backend

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/backend/crossing"
	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// Handshaker makes client handshakes and keeps the sessions they give.
type Handshaker interface {
	conn.Handshaker
	// Forget drops the sessions of a group of identities.
	Forget(group string)
	// Replace notes that for a pool the group next has taken the place of old,
	// which other pools may keep: places are those of the pool's own identities. It
	// is called before a handshake with the new one and before Forget of the old.
	Replace(old, next string, places []string)
}

// Config configures a Backend.
type Config struct {
	// Handshaker makes the handshakes. Required.
	Handshaker Handshaker
	// Counters returns the counters of a pool. Required.
	Counters func(pool string) exchange.Counters
	// Logger gets changes of health, ejections and look-ups that fail. Default:
	// nothing is logged.
	Logger *slog.Logger
	// Loops run the connections, and the exchanges on them. Required, but for a Backend
	// that is only configured. They have to run until Run has returned.
	Loops *loop.Group
	// Resolve looks up the addresses of a DNS pool. Default: the system's
	// resolver.
	Resolve func(ctx context.Context, name string) ([]netip.Addr, error)
	// Dial opens TCP connections. Default: a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Backend holds all pools. Its methods are safe for concurrent use.
type Backend struct {
	cfg      Config
	ctx      context.Context // ends when Run does
	cancel   context.CancelFunc
	live     *tracker
	stations map[*loop.Loop]*station
	lanes    crossing.Lanes // between the loops

	// pools is what requests see. It is replaced as a whole, so that no request
	// ever waits for an update.
	pools  atomic.Pointer[map[string]*pool]
	closed atomic.Bool

	updating sync.Mutex     // one update, start or shutdown at a time
	running  bool           // guarded by updating
	shares   map[string]int // that were told last, by pool; likewise

	connMu sync.Mutex
	conns  map[*pooled]struct{}
}

// New returns a Backend without pools. It starts nothing.
func New(cfg Config) *Backend {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Resolve == nil {
		cfg.Resolve = func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		}
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	b := &Backend{cfg: cfg, live: newTracker(), stations: map[*loop.Loop]*station{}, conns: map[*pooled]struct{}{}}
	if cfg.Loops != nil {
		b.lanes = crossing.New(cfg.Loops.Loops())
		for _, l := range cfg.Loops.Loops() {
			b.stations[l] = &station{loop: l}
		}
	}
	b.pools.Store(&map[string]*pool{})
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b
}

// Run looks after the pools (health checks, look-ups, idle connections) until
// ctx ends. Then it closes all connections, those in use included, and those whose
// handshake is under way once it is through, and returns when that is done, at
// most twice the longest closeTimeout and a second later. Callers drain requests
// before. It returns nil.
func (b *Backend) Run(ctx context.Context) error {
	b.updating.Lock()
	b.running = true
	for _, p := range *b.pools.Load() {
		p.start()
	}
	b.updating.Unlock()
	<-ctx.Done()
	b.shutdown()
	return nil
}

func (b *Backend) shutdown() {
	b.updating.Lock()
	b.closed.Store(true)
	bound := time.Second
	for _, p := range *b.pools.Load() {
		p.stop()
		bound = max(bound, 2*p.state.Load().settings.closeTimeout+time.Second)
	}
	b.updating.Unlock()
	b.cancel()
	for _, c := range b.open() {
		c.Do(c.speaker.shut)
	}
	timer := time.NewTimer(bound)
	defer timer.Stop()
	select {
	case <-b.live.finish():
	case <-timer.C:
		for _, c := range b.open() {
			c.Kill()
		}
		b.cfg.Logger.Warn("connections to backends did not end in time", "count", len(b.open()))
	}
}

// open lists the open connections.
func (b *Backend) open() []*pooled {
	b.connMu.Lock()
	defer b.connMu.Unlock()
	all := make([]*pooled, 0, len(b.conns))
	for c := range b.conns {
		all = append(all, c)
	}
	return all
}

// track enters a connection whose handshake completed. From here on a shutdown may
// close it at any time.
func (b *Backend) track(c *pooled) {
	b.live.add()
	b.connMu.Lock()
	b.conns[c] = struct{}{}
	b.connMu.Unlock()
}

// untrack takes out a connection whose socket is closed.
func (b *Backend) untrack(c *pooled) {
	b.connMu.Lock()
	delete(b.conns, c)
	b.connMu.Unlock()
	b.live.done()
}

// Update replaces the pools. A pool of the same name and Identity keeps its
// endpoints' connections, health and ejections; otherwise, and for pools and
// endpoints that are gone, requests under way finish and connections are then
// closed. Sessions of identities that no pool has any more are forgotten. A pool
// that did not change costs nothing, and no request waits for an update.
func (b *Backend) Update(pools []exchange.Pool) {
	b.updating.Lock()
	defer b.updating.Unlock()
	if b.closed.Load() {
		return
	}
	old, next := *b.pools.Load(), make(map[string]*pool, len(pools))
	before := identities(old)
	for _, spec := range pools {
		next[spec.Name] = b.updated(old[spec.Name], spec)
	}
	b.pools.Store(&next)
	for name, p := range old {
		if next[name] != p {
			p.stop()
			p.retire()
		}
	}
	after := identities(next)
	for identity := range before {
		if !after[identity] {
			b.cfg.Handshaker.Forget(identity)
		}
	}
}

// updated returns p as spec wants it, or a pool that takes its place. b.updating
// is held.
func (b *Backend) updated(p *pool, spec exchange.Pool) *pool {
	var places []string
	if p != nil {
		state := p.state.Load()
		switch {
		case same(state.spec, spec):
			return p
		case state.spec.Identity == spec.Identity && state.spec.UID == spec.UID:
			p.update(spec)
			return p
		case state.spec.UID == spec.UID:
			places = p.places()
			b.cfg.Handshaker.Replace(state.spec.Identity, spec.Identity, places)
		}
	}
	p = newPool(b, spec)
	p.before = places
	if b.running {
		p.start()
	}
	return p
}

// same reports whether both ask for the same. Equal identities stand for equal TLS
// configurations.
func same(p, other exchange.Pool) bool {
	return p.Identity == other.Identity && p.UID == other.UID &&
		(p.Spec == other.Spec || proto.Equal(p.Spec, other.Spec))
}

func identities(pools map[string]*pool) map[string]bool {
	all := make(map[string]bool, len(pools))
	for _, p := range pools {
		all[p.state.Load().spec.Identity] = true
	}
	return all
}

func (b *Backend) pool(name string) (*pool, error) {
	if b.closed.Load() {
		return nil, fail(ReasonOverloaded, errClosed)
	}
	p := (*b.pools.Load())[name]
	if p == nil {
		return nil, fail(ReasonUnknownPool, nil)
	}
	return p, nil
}

// tracker counts what Run has to wait for.
type tracker struct {
	mu       sync.Mutex
	n        int
	finished chan struct{}
	waiting  bool
}

func newTracker() *tracker { return &tracker{finished: make(chan struct{})} }

func (t *tracker) add() {
	t.mu.Lock()
	t.n++
	t.mu.Unlock()
}

func (t *tracker) done() {
	t.mu.Lock()
	t.n--
	t.check()
	t.mu.Unlock()
}

// finish returns a channel that is closed when nothing is left.
func (t *tracker) finish() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting = true
	t.check()
	return t.finished
}

func (t *tracker) check() {
	if t.waiting && t.n == 0 {
		t.waiting = false
		close(t.finished)
	}
}
