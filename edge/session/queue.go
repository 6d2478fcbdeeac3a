package session

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Coalescing: while a connection of an identity may soon bring a session, other
// handshakes that have none wait for it and resume, instead of making a full
// handshake each. The same holds while the identity's sessions are in doubt, and
// while it is being tried whether its server takes a ticket again: one handshake
// tries, the others wait for how it went.
//
// Handshakes wait in a queue, first come, first served. A connection is
// *expected* to bring news from the moment it takes its offer until its pending
// is settled: by a session, by what the server sent without one, by failure or
// by its end. With every piece of news, serve lets those go whose turn it is.

// waiter is a handshake that waits for its turn.
type waiter struct {
	terms exchange.Terms
	turn  chan offer // gets one offer; closed when the identity was dropped
}

// pending is one connection that may bring a session.
type pending struct {
	store  *Store
	record *record
	once   sync.Once
}

// settle says that nothing more is to be expected of the connection for now.
func (p *pending) settle() {
	if p == nil {
		return
	}
	p.once.Do(func() {
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		p.record.pending--
		p.record.serve(time.Now())
	})
}

// acquire takes an offer for one handshake. It waits while other connections of
// the identity may bring a session: for one of them at most terms.Wait, after
// which one waiter goes ahead without, and the others until ctx ends.
func (s *Store) acquire(ctx context.Context, identity exchange.Identity, terms exchange.Terms) (offer, error) {
	for {
		w := s.join(identity, terms)
		o, ok, err := s.await(ctx, identity, w)
		if ok || err != nil {
			return o, err
		}
	}
}

// join queues a handshake. Its turn may have come already.
func (s *Store) join(identity exchange.Identity, terms exchange.Terms) *waiter {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, r := s.use(identity)
	now := time.Now()
	g.expire(r, now)
	if terms.SessionIDsOff {
		g.removeIDs(r)
	}
	w := &waiter{terms: terms, turn: make(chan offer, 1)}
	if terms.Wait <= 0 {
		// Whoever asks not to wait passes the queue.
		o := r.chooseNow(now)
		w.turn <- r.lead(o, terms, now)
		return w
	}
	r.queue = append(r.queue, w)
	r.serve(now)
	return w
}

// await waits for a waiter's turn. ok is false when the waiter must join anew.
func (s *Store) await(ctx context.Context, identity exchange.Identity, w *waiter) (o offer, ok bool, err error) {
	select {
	case o, ok = <-w.turn:
		return o, ok, nil
	default:
	}
	timer := time.NewTimer(s.look(identity, w))
	defer timer.Stop()
	for {
		select {
		case o, ok = <-w.turn:
			return o, ok, nil
		case <-timer.C:
			timer.Reset(s.look(identity, w))
		case <-ctx.Done():
			s.leave(identity, w)
			return offer{}, false, ctx.Err()
		}
	}
}

// look sees whether somebody has waited for too long, and returns after which
// time to look again.
func (s *Store) look(identity exchange.Identity, w *waiter) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, now := s.find(identity), time.Now()
	if r == nil {
		return w.terms.Wait
	}
	r.serve(now)
	// The time counts for each leader anew: while a server restarts, one dial
	// after the other leads and is refused, and nobody is late.
	if rest := w.terms.Wait - now.Sub(r.progress); rest > 0 && !r.escaped {
		return rest
	}
	return w.terms.Wait
}

// leave takes a waiter out of the queue, and gives back what it got meanwhile.
func (s *Store) leave(identity exchange.Identity, w *waiter) {
	s.mu.Lock()
	if r := s.find(identity); r != nil {
		if i := slices.Index(r.queue, w); i >= 0 {
			r.queue = slices.Delete(r.queue, i, i+1)
		}
	}
	s.mu.Unlock()
	select {
	case o, ok := <-w.turn:
		if ok {
			s.unused(o)
			o.pending.settle()
		}
	default:
	}
}

// serve lets those go whose turn it is. Store.mu is held.
func (r *record) serve(now time.Time) {
	if r.pending == 0 {
		r.escaped = false
	}
	for len(r.queue) > 0 {
		w := r.queue[0]
		o, ok := r.decide(w.terms, now)
		if !ok {
			return
		}
		r.queue = slices.Delete(r.queue, 0, 1)
		w.turn <- r.lead(o, w.terms, now)
	}
	r.queue = nil
}

// decide says whether the first of the queue goes now, and with what.
func (r *record) decide(terms exchange.Terms, now time.Time) (o offer, ok bool) {
	o, sure := r.choose(now)
	if r.pending == 0 || sure && !r.doubt {
		return o, true
	}
	if !r.doubt && r.grows(terms, now) {
		return o, true
	}
	if r.escaped || now.Sub(r.progress) < terms.Wait {
		return offer{}, false
	}
	r.escaped = true
	if o.session == nil {
		o.miss = resealv1.MissReason_MISS_REASON_COALESCE_TIMEOUT
	}
	return o, true
}

// lead makes an offer the one of a handshake that begins. Store.mu is held.
func (r *record) lead(o offer, terms exchange.Terms, now time.Time) offer {
	if r.pending == 0 {
		r.progress = now
	}
	if h := o.session; h != nil {
		if h.taken++; h.taken == 1 {
			r.store.touch(r.identity)
		}
		h.busy++
		h.lastOffer = now
		o.proof = o.again && r.reuse != reuseMany
		if o.proof {
			r.proving++
		}
	}
	r.pending++
	if r.way == wayNone && now.Sub(r.learned) >= reviewAfter {
		r.way, r.vain = wayAsked, 0
	}
	o.terms, o.way, o.at = terms, r.way, now
	if terms.CryptoTLS && o.way == wayBare {
		o.way = wayAsked
	}
	o.pending = &pending{store: r.store, record: r}
	return o
}

// release drops the waiters of a record that is dropped: they join anew.
func (r *record) release() {
	for _, w := range r.queue {
		close(w.turn)
	}
	r.queue = nil
}

// acquireAgain takes an offer in place of one that failed: a session that
// another connection brought, unless it could be declined like that one.
func (s *Store) acquireAgain(e *ResumptionError) offer {
	defer e.offer.pending.settle() // only now: the others are still to wait
	s.mu.Lock()
	defer s.mu.Unlock()
	g, r := s.use(e.identity)
	now := time.Now()
	g.expire(r, now)
	o := r.chooseNow(now)
	if o.session == nil || o.session.byID != nil {
		o = offer{miss: e.miss}
	}
	return r.lead(o, e.offer.terms, now)
}

// unused takes back that a session was handed out: nothing was sent.
func (s *Store) unused(o offer) {
	if o.session == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o.session.taken--
	o.concluded()
}

// concluded notes that it is known what became of the offered session.
// Store.mu is held.
func (o *offer) concluded() {
	o.session.busy--
	if o.proof {
		o.pending.record.proving--
	}
}

// Doubt notes that the server of identity may have forgotten its sessions: a
// dial was refused, or pooled connections were lost. The next handshake tries
// them alone, the others wait for how it goes, so that a server that was
// restarted costs one full handshake and not one per connection.
func (s *Store) Doubt(identity exchange.Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.find(identity); r != nil && len(r.sessions) > 0 {
		r.doubt = true
	}
}
