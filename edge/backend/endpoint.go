package backend

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/balance"
	"github.com/reseal/reseal/edge/exchange"
)

// endpoint is one address of a pool, with its connections. It outlives specs:
// what it may do is read from the pool's current settings.
type endpoint struct {
	*balance.Endpoint
	pool *pool

	mu        sync.Mutex // guards what follows
	sets      map[connKey]*connSet
	open      int // connections and dials that hold a slot
	waiting   int
	retired   bool
	clients   map[uint64]*share // client connections that hold or want a connection
	reclaimed int               // connections taken from their clients that are not closed yet
	private   bool              // some connection was a client's own
}

// connSet is the connections of one identity at one endpoint.
type connSet struct {
	key     connKey
	idle    []*h1Conn // longest idle first
	h2      []*h2Conn
	waiters []*waiter // longest waiting first
	dials   int       // under way
	hold    time.Time // no dial before; the next sweep sees to it
	// protocol is what the endpoint chose last; "" is not known yet.
	protocol string
}

// waiter is a call that needs a connection.
type waiter struct {
	call  *exchange.Exchange
	fresh bool // only a connection that has served nothing
	raw   bool // for a tunnel
	// private is set when the request authenticates the connection.
	private bool
	since   time.Time
	got     chan grant // of capacity 1; sent to once, under endpoint.mu
}

// grant is the connection that a waiter gets, or why it gets none.
type grant struct {
	h1     *h1Conn
	h2     *h2Conn
	raw    *pooled
	reused bool // it has served a request
	stale  bool // it may have died since it was known to live
	err    error
}

func newEndpoint(p *pool, at *balance.Endpoint) *endpoint {
	return &endpoint{Endpoint: at, pool: p, sets: map[connKey]*connSet{}, clients: map[uint64]*share{}}
}

func (e *endpoint) settings() *settings { return e.pool.state.Load().settings }

func (e *endpoint) set(key connKey) *connSet {
	s := e.sets[key]
	if s == nil {
		s = &connSet{key: key}
		e.sets[key] = s
	}
	return s
}

// acquire returns a connection for a call: an idle one if one may be used,
// otherwise the first that becomes free or is dialled. The dial goes on when ctx
// ends.
func (e *endpoint) acquire(ctx context.Context, key connKey, w *waiter) (grant, error) {
	for {
		g, err := e.acquireOnce(ctx, key, w)
		if err != nil || g.h2 == nil || g.h2.confirm() {
			return g, err
		}
	}
}

// acquireOnce is acquire without the word of x/net/http2 for a stream.
func (e *endpoint) acquireOnce(ctx context.Context, key connKey, w *waiter) (grant, error) {
	settings := e.settings()
	e.mu.Lock()
	set := e.set(key)
	if !w.raw {
		if g, ok := e.takeIdle(set, w, settings); ok {
			e.mu.Unlock()
			return g, nil
		}
	}
	if e.waiting >= settings.maxPending && !e.displace(w) {
		e.tidy(set)
		e.mu.Unlock()
		return grant{}, fail(ReasonOverloaded, errQueueFull)
	}
	w.got = make(chan grant, 1)
	if w.since.IsZero() {
		w.since = time.Now()
		set.waiters = append(set.waiters, w)
	} else { // its turn came before
		set.waiters = slices.Insert(set.waiters, 0, w)
	}
	e.enter(w)
	e.dialMore(set, settings)
	e.mu.Unlock()
	return e.await(ctx, set, w, settings)
}

func (e *endpoint) await(ctx context.Context, set *connSet, w *waiter, settings *settings) (grant, error) {
	timer := time.NewTimer(time.Until(w.since.Add(settings.queueTimeout())))
	defer timer.Stop()
	var err error
	select {
	case g := <-w.got:
		return g, g.err
	case <-ctx.Done():
		err = ctx.Err()
	case <-timer.C:
		err = fail(ReasonOverloaded, errQueueLate)
	}
	e.leave(set, w)
	return grant{}, err
}

// leave takes out a waiter that gave up. What it was granted meanwhile goes to
// the next one.
func (e *endpoint) leave(set *connSet, w *waiter) {
	e.mu.Lock()
	if i := slices.Index(set.waiters, w); i >= 0 {
		set.waiters = slices.Delete(set.waiters, i, i+1)
		e.exit(w)
		e.tidy(set)
		e.mu.Unlock()
		return
	}
	e.mu.Unlock()
	g := <-w.got
	switch {
	case g.h1 != nil:
		e.putUnused(g.h1)
	case g.h2 != nil:
		g.h2.drop()
	case g.raw != nil:
		g.raw.Close()
	}
}

// takeIdle finds a connection that is ready. e.mu is held.
func (e *endpoint) takeIdle(set *connSet, w *waiter, settings *settings) (grant, bool) {
	if e.private {
		// First the one on which the client has logged in.
		if c := set.takeH1(w, settings, func(c *h1Conn) bool { return c.owner.private }); c != nil {
			return c.granted(w), true
		}
	}
	if settings.sparesProven(w.call) {
		if c := set.takeH1(w, settings, func(c *h1Conn) bool { return c.served <= 1 }); c != nil {
			return c.granted(w), true
		}
	}
	if c := set.takeH1(w, settings, func(*h1Conn) bool { return true }); c != nil {
		return c.granted(w), true
	}
	if c := set.reserveH2(w, settings); c != nil {
		return c.granted(w), true
	}
	return grant{}, false
}

// takeH1 takes the idle connection that was used last among those that a call
// may and wants to use. endpoint.mu is held.
func (set *connSet) takeH1(w *waiter, settings *settings, wanted func(*h1Conn) bool) *h1Conn {
	now := time.Now()
	for i := len(set.idle) - 1; i >= 0; i-- {
		c := set.idle[i]
		if w.fresh && c.served > 0 || !settings.mayUse(w.call, c.served, c.owner) || !wanted(c) {
			continue
		}
		set.idle = slices.Delete(set.idle, i, i+1)
		if c.expired(settings, now) {
			c.drop()
			continue
		}
		if !c.take() {
			continue // it has just died
		}
		return c
	}
	return nil
}

// reserveH2 takes a stream for a call, on the client's own connection if one is
// reserved for it. endpoint.mu is held.
func (set *connSet) reserveH2(w *waiter, settings *settings) *h2Conn {
	for _, c := range set.h2 {
		if (settings.reserves() && c.streams > 0 || c.owner.private) && c.fits(w, settings) && c.reserve(settings) {
			return c
		}
	}
	for _, c := range set.h2 {
		if c.fits(w, settings) && c.reserve(settings) {
			return c
		}
	}
	return nil
}

// offer gives an HTTP/1 connection that is free to the first waiter that may
// have it, or keeps it idle. It returns false if the connection is to be
// closed. e.mu is held.
func (e *endpoint) offer(c *h1Conn, settings *settings) bool {
	now := time.Now()
	if !c.slot || c.expired(settings, now) || e.open > settings.maxOpen || e.pool.b.ctx.Err() != nil {
		return false
	}
	set := e.set(c.key)
	e.unhold(c)
	may := func(w *waiter) bool {
		return !w.raw && !(w.fresh && c.served > 0) && settings.mayUse(w.call, c.served, c.owner)
	}
	if i := e.next(set, settings, may); i >= 0 {
		w := set.waiters[i]
		set.waiters = slices.Delete(set.waiters, i, i+1)
		e.exit(w)
		w.got <- c.granted(w)
		return true
	}
	if e.retired || settings.maxIdle <= 0 || !c.rest(now) {
		return false
	}
	set.idle = append(set.idle, c)
	if len(set.idle) > settings.maxIdle {
		oldest := set.idle[0]
		set.idle = slices.Delete(set.idle, 0, 1)
		oldest.drop()
	} else {
		e.roomFor(settings)
	}
	return true
}

// roomFor gives up an idle connection when a waiter of another identity, or one
// that may not use it, stands before a full house. e.mu is held.
func (e *endpoint) roomFor(settings *settings) {
	if e.waiting > 0 && e.open >= settings.maxOpen {
		e.evict()
	}
}

// put takes back a connection whose exchange is over.
func (e *endpoint) put(c *h1Conn) {
	e.mu.Lock()
	kept := e.offer(c, e.settings())
	e.mu.Unlock()
	if !kept {
		c.Close()
		return
	}
	c.resume <- struct{}{}
}

// putUnused takes back a connection that was granted but not used.
func (e *endpoint) putUnused(c *h1Conn) {
	e.mu.Lock()
	if c.served > 0 {
		c.served--
	}
	kept := e.offer(c, e.settings())
	e.mu.Unlock()
	if !kept {
		c.Close()
	}
}

// serve gives waiters what h2 connections have free. e.mu is held.
func (e *endpoint) serve(set *connSet, settings *settings) {
	waiters := set.waiters[:0]
	for _, w := range set.waiters {
		var c *h2Conn
		if !w.raw {
			c = set.reserveH2(w, settings)
		}
		if c == nil {
			waiters = append(waiters, w)
			continue
		}
		e.exit(w)
		w.got <- c.granted(w)
	}
	clear(set.waiters[len(waiters):])
	set.waiters = waiters
}

// dialMore starts the dials that the waiters need. HTTP/1 connections carry one
// request, so each waiter has a dial; for h2, or while the protocol is not known
// yet, one dial at a time serves all. e.mu is held.
func (e *endpoint) dialMore(set *connSet, settings *settings) {
	want := len(set.waiters)
	if want == 0 || time.Now().Before(set.hold) {
		return
	}
	if !e.manyDials(set, settings) {
		want = min(want, 1)
	}
	for set.dials < want {
		if e.open >= settings.maxOpen {
			if !e.evict() {
				e.reclaim(set, settings)
			}
			return
		}
		e.open++
		set.dials++
		e.pool.b.spawn("a dial", func() { e.dial(set) })
	}
}

func (e *endpoint) manyDials(set *connSet, settings *settings) bool {
	return set.protocol == protocolHTTP1 || set.protocol == protocolTCP || set.key.http1 ||
		settings.speaksHTTP1Only() || settings.private() && set.protocol != ""
}

// evict closes an idle connection, of whatever identity, so that its slot
// becomes free, if there is one. e.mu is held.
func (e *endpoint) evict() bool {
	settings := e.settings()
	var from *connSet
	var oldest time.Time
	for _, set := range e.sets {
		if len(set.idle) > 0 && (from == nil || set.idle[0].since.Before(oldest)) {
			from, oldest = set, set.idle[0].since
		}
		for _, c := range set.h2 {
			if c.idleNow() && !slices.ContainsFunc(set.waiters, func(w *waiter) bool { return c.fits(w, settings) }) {
				c.retireLocked()
				return true
			}
		}
	}
	if from == nil {
		return false
	}
	c := from.idle[0]
	from.idle = slices.Delete(from.idle, 0, 1)
	c.drop()
	return true
}

// slotFreed gives back the slot of a connection that is closed.
func (e *endpoint) slotFreed(c *pooled) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.reclaimed {
		e.reclaimed--
	}
	e.freeSlot()
}

// freeSlot lets the longest waiting call dial. e.mu is held.
func (e *endpoint) freeSlot() {
	e.open--
	settings := e.settings()
	for e.open < settings.maxOpen {
		var next *connSet
		for _, set := range e.sets {
			if len(set.waiters) > 0 && e.canDial(set, settings) &&
				(next == nil || set.waiters[0].since.Before(next.waiters[0].since)) {
				next = set
			}
		}
		if next == nil {
			return
		}
		e.open++
		next.dials++
		e.pool.b.spawn("a dial", func() { e.dial(next) })
	}
}

func (e *endpoint) canDial(set *connSet, settings *settings) bool {
	if time.Now().Before(set.hold) {
		return false
	}
	if e.manyDials(set, settings) {
		return set.dials < len(set.waiters)
	}
	return set.dials == 0
}

// tidy forgets a set that holds nothing. e.mu is held.
func (e *endpoint) tidy(set *connSet) {
	if len(set.idle) == 0 && len(set.h2) == 0 && len(set.waiters) == 0 && set.dials == 0 && set.protocol == "" {
		delete(e.sets, set.key)
	}
}

// shrink closes idle connections that exceed the bounds of a new configuration.
// Those in use are closed when they come back.
func (e *endpoint) shrink() {
	e.mu.Lock()
	defer e.mu.Unlock()
	settings := e.settings()
	for range e.open - settings.maxOpen {
		e.evict()
	}
	for _, set := range e.sets {
		for len(set.idle) > max(settings.maxIdle, 0) {
			set.idle[0].drop()
			set.idle = slices.Delete(set.idle, 0, 1)
		}
	}
}

// retire closes idle connections now and the others when they come back.
func (e *endpoint) retire() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retired = true
	for _, set := range e.sets {
		for _, c := range set.idle {
			c.drop()
		}
		set.idle = nil
		for _, c := range slices.Clone(set.h2) {
			c.retireLocked()
		}
	}
}

// maxSets is how many identities without connections an endpoint remembers the
// protocol of.
const maxSets = 256

// sweep closes what is idle for too long or too old, and forgets empty sets
// when there are many.
func (e *endpoint) sweep(now time.Time) {
	settings := e.settings()
	e.mu.Lock()
	defer e.mu.Unlock()
	for key, set := range e.sets {
		kept := set.idle[:0]
		for _, c := range set.idle {
			if c.expired(settings, now) {
				c.drop()
			} else {
				kept = append(kept, c)
			}
		}
		clear(set.idle[len(kept):])
		set.idle = kept
		for _, c := range slices.Clone(set.h2) {
			c.sweep(settings, now)
		}
		e.serve(set, settings)
		e.dialMore(set, settings)
		if len(e.sets) > maxSets && len(set.idle)+len(set.h2)+len(set.waiters)+set.dials == 0 {
			delete(e.sets, key)
		}
	}
}
