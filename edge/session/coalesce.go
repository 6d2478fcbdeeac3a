package session

import (
	"context"
	"crypto/tls"
	"slices"
	"sync"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Coalescing: while a connection of an identity may soon bring a session, other
// handshakes that have none wait for it and resume, instead of making a full
// handshake each. The same holds while the identity's sessions are in doubt: one
// handshake tries them, the others wait for how it went.
//
// A connection is *expected* to bring news from the moment it takes its offer
// until its pending is settled: by a session, by what the server sent without
// one, by failure or by its end. A waiter wakes with every piece of news and
// decides anew, so that exactly one of them goes ahead when a leader fails.

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
		p.record.wake()
	})
}

// wake makes all waiters of the record decide anew. Store.mu is held.
func (r *record) wake() {
	if r.pending == 0 {
		r.escaped = false
	}
	if r.news != nil {
		close(r.news)
		r.news = nil
	}
}

// acquire takes an offer for one handshake. It waits while other connections of
// the identity may bring a session: for one of them at most the time wait, after
// which one waiter goes ahead without, and the others until ctx ends.
func (s *Store) acquire(ctx context.Context, identity string, wait time.Duration) (offer, error) {
	var timer *time.Timer
	for {
		offer, news, rest := s.try(identity, wait)
		if news == nil {
			return offer, nil
		}
		if timer == nil {
			timer = time.NewTimer(rest)
			defer timer.Stop()
		} else {
			timer.Reset(rest)
		}
		select {
		case <-ctx.Done():
			return offer, ctx.Err()
		case <-timer.C:
		case <-news:
		}
	}
}

// try takes an offer, or returns the channel that is closed with the next news
// and the time after which to try again without any.
func (s *Store) try(identity string, wait time.Duration) (_ offer, news <-chan struct{}, rest time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, r := s.use(identity)
	now := time.Now()
	g.expire(r, now)
	chosen := r.choose(now)
	expectant := chosen.session == nil && chosen.miss != resealv1.MissReason_MISS_REASON_UNSUPPORTED_BY_PEER
	if r.pending > 0 && (expectant || r.doubt) && wait > 0 {
		// The time counts for each leader anew: while a server restarts, one
		// dial after the other leads and is refused, and nobody is late.
		if rest = wait - now.Sub(r.leads); rest > 0 || r.escaped {
			if r.news == nil {
				r.news = make(chan struct{})
			}
			if r.escaped {
				rest = wait
			}
			return offer{}, r.news, rest
		}
		r.escaped = true
		if chosen.session == nil {
			chosen.miss = resealv1.MissReason_MISS_REASON_COALESCE_TIMEOUT
		}
	}
	if r.pending == 0 {
		r.leads = now
	}
	if chosen.session != nil {
		chosen.session.taken++
		chosen.session.lastOffer = now
	}
	r.pending++
	chosen.pending = &pending{store: s, record: r}
	return chosen, nil, 0
}

// unused takes back that a session was handed out: nothing was sent.
func (s *Store) unused(o offer) {
	if o.session == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o.session.taken--
}

// choose picks the session for one handshake: the newest unused one; without
// one, the newest used one, unless the server takes each ticket once. TLS 1.2
// sessions may be used any number of times.
func (r *record) choose(now time.Time) offer {
	var newest *held
	for _, h := range slices.Backward(r.sessions) {
		if h.taken == 0 || h.version != tls.VersionTLS13 {
			return offer{session: h}
		}
		if newest == nil {
			newest = h
		}
	}
	switch {
	case newest == nil:
		return offer{miss: r.missing()}
	case now.Before(r.singleUse):
		return offer{miss: resealv1.MissReason_MISS_REASON_SINGLE_USE_SPENT}
	}
	return offer{session: newest}
}

// Doubt notes that the server of identity may have forgotten its sessions: a
// dial was refused, or pooled connections were lost. The next handshake tries
// them alone, the others wait for how it goes, so that a server that was
// restarted costs one full handshake and not one per connection.
func (s *Store) Doubt(identity string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.find(identity); r != nil && len(r.sessions) > 0 {
		r.doubt = true
	}
}
