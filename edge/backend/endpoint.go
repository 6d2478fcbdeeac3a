package backend

import (
	"slices"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/balance"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// endpoint is one address of a pool, with its connections. It outlives specs:
// what it may do is read from the pool's current settings.
type endpoint struct {
	*balance.Endpoint
	pool *pool

	mu        sync.Mutex // guards what follows
	sets      map[connKey]*connSet
	open      int // connections and dials that hold a slot
	parting   int // connections of open that are on their way out
	waiting   int
	retired   bool
	clients   map[uint64]*share // client connections that hold or want a connection
	spare     *share            // for the next one
	reclaimed int               // connections taken from their clients that are not closed yet
	noReclaim time.Time         // nothing is taken from clients before
	private   bool              // some connection was a client's own
}

// connSet is the connections of one identity at one endpoint.
type connSet struct {
	key     connKey
	idle    []*soloConn // longest idle first
	h2      []*h2Conn
	waiters []*waiter // longest waiting first
	dials   int       // under way
	hold    time.Time // no dial before; the next sweep sees to it
	// protocol is what the endpoint chose last; "" is not known yet.
	protocol string
}

// waiter is a call that needs a connection. It belongs to its loop, but for what the
// endpoint reads while it waits.
type waiter struct {
	call  *exchange.Exchange
	fresh bool // only a connection that has served nothing
	raw   bool // for a tunnel
	// private is set when the request authenticates the connection.
	private bool
	since   time.Time
	loop    *loop.Loop
	by      claimant // told on loop, once, unless acquire has granted at once
	left    bool     // it gave up; what it gets is given back
}

// claimant is whom a waiter waits for.
type claimant interface{ granted(g grant) }

// told hands the waiter what it gets. It is called on the waiter's loop.
func (w *waiter) told(g grant) {
	switch {
	case !w.left:
		w.by.granted(g)
	case g.err == nil:
		g.drop()
	}
}

// tell is told for callers anywhere.
func (w *waiter) tell(g grant) { w.loop.Post(func() { w.told(g) }) }

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

// acquire finds a connection for a call, or has it wait for the first that becomes
// free or is dialled; the dial goes on when it leaves. It reports whether the waiter
// has its grant at once, and otherwise tells by later. It is called on the
// waiter's loop.
func (e *endpoint) acquire(key connKey, w *waiter) (g grant, now bool) {
	settings := e.settings()
	e.mu.Lock()
	defer e.mu.Unlock()
	set := e.set(key)
	if !w.raw {
		if g, here := e.takeIdle(set, w, settings); g.carrier != nil {
			return g, here
		}
	}
	if e.waiting >= settings.maxPending && !e.displace(w) {
		e.tidy(set)
		return grant{err: fail(ReasonOverloaded, errQueueFull)}, true
	}
	w.since = time.Now()
	set.waiters = append(set.waiters, w)
	e.enter(w)
	e.dialMore(set, settings)
	return grant{}, false
}

// leave takes out a waiter that gives up. What it was granted meanwhile it gives back.
func (e *endpoint) leave(key connKey, w *waiter) {
	w.left = true
	e.mu.Lock()
	defer e.mu.Unlock()
	set := e.sets[key]
	if set == nil {
		return
	}
	if i := slices.Index(set.waiters, w); i >= 0 {
		set.waiters = slices.Delete(set.waiters, i, i+1)
		e.exit(w)
		e.tidy(set)
	}
}

// takeIdle finds a connection that is ready, and reports whether it is on the
// waiter's loop; another one is on its way there. e.mu is held.
func (e *endpoint) takeIdle(set *connSet, w *waiter, settings *settings) (g grant, here bool) {
	var c *soloConn
	if e.private {
		// First the one on which the client has logged in.
		c = set.takeSolo(w, settings, func(c *soloConn) bool { return c.owner.private })
	}
	if c == nil && settings.sparesProven(w.call) {
		c = set.takeSolo(w, settings, func(c *soloConn) bool { return c.served <= 1 })
	}
	if c == nil {
		c = set.takeSolo(w, settings, func(*soloConn) bool { return true })
	}
	if c == nil {
		if h := set.reserveH2(w, settings); h != nil {
			return h.granted(w), true
		}
		return grant{}, false
	}
	here = c.at == w.loop
	c.at = nil
	g = c.granted(w)
	if !here {
		c.goTo(w, g)
	}
	return g, here
}

// takeSolo takes the idle connection that was used last among those that a call
// may and wants to use, on its own loop if there is one. endpoint.mu is held.
func (set *connSet) takeSolo(w *waiter, settings *settings, wanted func(*soloConn) bool) *soloConn {
	now, found := time.Now(), -1
	for i := len(set.idle) - 1; i >= 0; i-- {
		c := set.idle[i]
		if w.fresh && c.served > 0 || !settings.mayUse(w.call, c.served, c.owner) || !wanted(c) {
			continue
		}
		if c.expired(settings, now, true) {
			set.idle = slices.Delete(set.idle, i, i+1)
			found = max(found-1, -1) // it was behind
			c.at = nil
			c.e.discard(c)
			continue
		}
		if c.at == w.loop {
			found = i
			break
		}
		if found < 0 {
			found = i
		}
	}
	if found < 0 {
		return nil
	}
	c := set.idle[found]
	set.idle = slices.Delete(set.idle, found, found+1)
	return c
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

// offer gives a connection that is free to the first waiter that may have it, or
// keeps it idle. It returns false if the connection is to be closed. It is called on
// the connection's loop, with e.mu held.
func (e *endpoint) offer(c *soloConn, settings *settings) bool {
	now := time.Now()
	if c.Closing() || !c.slot || c.expired(settings, now, false) || e.surplus(settings) > 0 || e.pool.b.ctx.Err() != nil {
		return false
	}
	set := e.set(c.key)
	e.unhold(c)
	may := func(w *waiter) bool {
		return w.raw == (c.http == nil) && !(w.fresh && c.served > 0) && settings.mayUse(w.call, c.served, c.owner)
	}
	if i := e.next(set, settings, may); i >= 0 {
		w := set.waiters[i]
		set.waiters = slices.Delete(set.waiters, i, i+1)
		e.exit(w)
		c.goTo(w, c.granted(w))
		return true
	}
	// A tunnel's connection is not kept: servers that speak first would leave it in an
	// unknown state.
	if e.retired || c.http == nil || settings.maxIdle <= 0 || !c.rest(now) {
		return false
	}
	set.idle = append(set.idle, c)
	if len(set.idle) > settings.maxIdle {
		e.discardOldest(set)
	} else {
		e.roomFor(settings)
	}
	return true
}

// discardOldest ends the connection of a set that has been idle for longest. e.mu is
// held.
func (e *endpoint) discardOldest(set *connSet) {
	c := set.idle[0]
	set.idle = slices.Delete(set.idle, 0, 1)
	c.at = nil
	e.discard(c)
}

// discard ends a connection that is not in use, and in no set. e.mu is held.
func (e *endpoint) discard(c *soloConn) {
	e.part(c.pooled)
	c.Do(c.end)
}

// part notes that a connection is on its way out. e.mu is held.
func (e *endpoint) part(c *pooled) {
	if c.slot && !c.parting {
		c.parting = true
		e.parting++
	}
}

// surplus is how many connections more than may be are not on their way out yet. e.mu
// is held.
func (e *endpoint) surplus(settings *settings) int { return e.open - e.parting - settings.maxOpen }

// dropIdle takes a connection that died out of the idle ones. e.mu is held.
func (e *endpoint) dropIdle(c *soloConn) {
	set := e.sets[c.key]
	if c.at == nil || set == nil {
		return
	}
	c.at = nil
	if i := slices.Index(set.idle, c); i >= 0 {
		set.idle = slices.Delete(set.idle, i, i+1)
	}
}

// roomFor gives up an idle connection when a waiter of another identity, or one
// that may not use it, stands before a full house. e.mu is held.
func (e *endpoint) roomFor(settings *settings) {
	if e.waiting > 0 && e.open >= settings.maxOpen {
		e.evict()
	}
}

// put takes back a connection whose exchange is over, or which was granted and not
// used. It is called on the connection's loop.
func (e *endpoint) put(c *soloConn, used bool) {
	e.mu.Lock()
	if !used && c.served > 0 {
		c.served--
	}
	kept := e.offer(c, e.settings())
	if !kept {
		e.part(c.pooled)
	}
	e.mu.Unlock()
	if !kept {
		c.end()
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
		w.tell(c.granted(w))
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
		e.beginDial(set)
	}
}

// beginDial dials for a set, on the loop of the waiter that lacks it. e.mu is held.
func (e *endpoint) beginDial(set *connSet) {
	at := set.waiters[min(set.dials, len(set.waiters)-1)].loop
	e.open++
	set.dials++
	e.pool.b.spawn("a dial", func() { e.dial(set, at) })
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
	e.discardOldest(from)
	return true
}

// slotFreed gives back the slot of a connection that is closed.
func (e *endpoint) slotFreed(c *pooled) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.reclaimed {
		e.reclaimed--
	}
	if c.parting {
		e.parting--
	}
	c.parting = true // whoever is late with a place of it finds it gone
	e.freeSlot()
}

// freeSlot gives back a slot. e.mu is held.
func (e *endpoint) freeSlot() {
	e.open--
	e.fillSlots(e.settings())
}

// fillSlots lets the longest waiting calls dial, as many as there are slots. e.mu is
// held.
func (e *endpoint) fillSlots(settings *settings) {
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
		e.beginDial(next)
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

// fit goes by new bounds: idle connections beyond them are closed, and calls that wait
// dial within them. Connections in use are closed when their requests have ended.
func (e *endpoint) fit() {
	e.mu.Lock()
	defer e.mu.Unlock()
	settings := e.settings()
	for e.surplus(settings) > 0 && (e.evict() || e.retireLeastUsed()) {
	}
	for _, set := range e.sets {
		for len(set.idle) > max(settings.maxIdle, 0) {
			e.discardOldest(set)
		}
	}
	e.fillSlots(settings)
}

// retireLeastUsed lets no more requests on the HTTP/2 connection that has the fewest,
// if there is one: while there are always some it would never be idle. e.mu is held.
func (e *endpoint) retireLeastUsed() bool {
	var least *h2Conn
	for _, set := range e.sets {
		for _, c := range set.h2 {
			if least == nil || c.live < least.live {
				least = c
			}
		}
	}
	if least == nil {
		return false
	}
	least.retireLocked()
	return true
}

// retire closes idle connections now and the others when they come back.
func (e *endpoint) retire() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retired = true
	for _, set := range e.sets {
		for len(set.idle) > 0 {
			e.discardOldest(set)
		}
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
		set.idle = slices.DeleteFunc(set.idle, func(c *soloConn) bool {
			if !c.expired(settings, now, true) {
				return false
			}
			c.at = nil
			e.discard(c)
			return true
		})
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
