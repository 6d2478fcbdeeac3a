// Package session keeps the TLS sessions that the edge holds as a client of
// backends, and makes handshakes with them.
//
// Sessions are kept per identity: a string made by the caller that holds
// everything a session may depend on. Two identities never share a session.
// For each handshake that was not resumed the package says why.
package session

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/session/abbreviated"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Config configures a Store. The zero value is usable.
type Config struct {
	// Logger gets what an operator may want to know about resumption. Default:
	// nothing is logged.
	Logger *slog.Logger
	// MaxSessions bounds the sessions of one identity. Default 16, at least 1.
	MaxSessions int
	// MaxIdentities bounds the identities of one group; the least recently used one goes
	// first. Default 10,000.
	MaxIdentities int
	// MaxBytes bounds the encoded size of a group's sessions. Default 64 MiB.
	MaxBytes int64
}

const (
	defaultMaxSessions   = 16
	defaultMaxIdentities = 10_000
	defaultMaxBytes      = 64 << 20
)

// Store holds sessions. Its methods are safe for concurrent use.
type Store struct {
	logger        *slog.Logger
	maxSessions   int
	maxIdentities int
	maxBytes      int64

	// sessionIDs is whether sessions are resumed by ID; it finds out once.
	sessionIDs func() bool

	mu     sync.Mutex
	groups map[string]*group
	// watchers are told of changes.
	watchers map[chan struct{}]struct{}
	kept     *changes // for the keeper, once there is one
}

// New returns an empty Store.
func New(cfg Config) *Store {
	s := &Store{
		logger:        cfg.Logger,
		maxSessions:   cfg.MaxSessions,
		maxIdentities: cfg.MaxIdentities,
		maxBytes:      cfg.MaxBytes,
		groups:        map[string]*group{},
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	s.sessionIDs = sync.OnceValue(func() bool { return checkSessionIDs(s.logger) })
	if s.maxSessions <= 0 {
		s.maxSessions = defaultMaxSessions
	}
	if s.maxIdentities <= 0 {
		s.maxIdentities = defaultMaxIdentities
	}
	if s.maxBytes <= 0 {
		s.maxBytes = defaultMaxBytes
	}
	return s
}

// Handshake makes a client handshake on conn, offering a session of identity
// when there is one, and keeps the sessions that the server gives during the
// handshake and later while the connection is read. cfg is cloned; its
// ClientSessionCache is replaced. With SessionTicketsDisabled nothing is
// offered or kept.
//
// A completed handshake has either a mechanism or a miss reason, never both. On
// error conn is left open for the caller to close. If a session had been
// offered it is deleted and the error is a *ResumptionError, which can make a
// full handshake on another connection.
//
// Handshake waits for nobody. Reserve, before the dial, saves full handshakes.
func (s *Store) Handshake(ctx context.Context, conn net.Conn, identity exchange.Identity, cfg *tls.Config) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	attempt, err := s.Reserve(ctx, identity, exchange.Terms{CryptoTLS: true})
	if err != nil {
		return nil, 0, 0, err
	}
	return attempt.Handshake(ctx, conn, cfg)
}

// attempt is an exchange.Attempt, with what it will offer.
type attempt struct {
	store    *Store
	identity exchange.Identity
	offer    offer
}

// Reserve waits until a handshake of identity should be made. While another
// connection may bring a session it waits for that, at most for terms.Wait; then
// one caller goes ahead and the others wait until ctx ends. It is called before
// the dial: a server that serves one connection at a time would otherwise serve
// those that wait, while the one that they wait for stands in line.
func (s *Store) Reserve(ctx context.Context, identity exchange.Identity, terms exchange.Terms) (exchange.Attempt, error) {
	offer, err := s.acquire(ctx, identity, terms)
	if err != nil {
		return nil, err
	}
	return &attempt{store: s, identity: identity, offer: offer}, nil
}

// Release implements exchange.Attempt.
func (a *attempt) Release() {
	a.store.unused(a.offer)
	a.offer.pending.settle()
}

// Handshake makes the handshake as Store.Handshake does.
func (a *attempt) Handshake(ctx context.Context, conn net.Conn, cfg *tls.Config) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	if cfg.SessionTicketsDisabled {
		a.Release()
		tc := tls.Client(conn, cfg)
		if err := tc.HandshakeContext(ctx); err != nil {
			return tc, 0, 0, err
		}
		return tc, 0, resealv1.MissReason_MISS_REASON_DISABLED, nil
	}
	return a.store.shake(ctx, conn, a.identity, cfg, a.offer)
}

// shake makes one handshake with what was taken from the store.
func (s *Store) shake(ctx context.Context, conn net.Conn, identity exchange.Identity, cfg *tls.Config, offer offer) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	if s.goesBare(offer) {
		return s.shakeBare(ctx, conn, identity, cfg, offer)
	}
	spy := &helloSpy{Conn: conn, supply: &supply{}, pending: offer.pending}
	cache := &connCache{store: s, identity: identity, offer: offer, spy: spy, supply: spy.supply}
	own := cfg.Clone()
	own.ClientSessionCache = cache
	if offer.session == nil && offer.way == wayBare {
		// The server remembers a session under its ID only for clients that don't
		// ask for a ticket.
		own.SessionTicketsDisabled, cache.bare = true, true
	}
	secret := s.prepareID(own, cache)
	defer secret.end()
	tc := tls.Client(spy, own)
	if err := tc.HandshakeContext(ctx); err != nil {
		switch {
		case spy.offered && (cache.handed() || cache.refusal != 0):
			failure := &ResumptionError{Err: err, store: s, identity: identity, cfg: cfg, offer: offer}
			failure.miss = s.failed(identity, offer, err)
			return tc, 0, 0, failure
		case cache.handed() || cache.refusal != 0:
			s.refused(cache)
		default:
			s.unused(offer)
		}
		offer.pending.settle()
		return tc, 0, 0, err
	}
	spy.done.Store(true)
	state := tc.ConnectionState()
	mechanism, miss := s.outcome(cache, state)
	cache.complete(state.DidResume)
	if !state.DidResume {
		s.fileID(cache, state, secret.secret)
	}
	if state.Version != tls.VersionTLS13 {
		// Only in TLS 1.3 does a session come after the handshake.
		spy.supply.read.Store(true)
		offer.pending.settle()
	}
	return tc, mechanism, miss, nil
}

// prepareID makes a handshake ready for session IDs: own offers the one that was
// taken, and what a later offer needs is noted.
func (s *Store) prepareID(own *tls.Config, cache *connCache) *secretLog {
	log := &secretLog{}
	if !offersTLS12(own) || cache.offer.terms.SessionIDsOff || cache.offer.way == wayNone || !(s.sessionIDs() || bareWorks()) {
		return log
	}
	own.KeyLogWriter = log
	cache.spy.listens = true
	taken := cache.offer.session
	if taken == nil || taken.byID == nil { // otherwise it does not go bare
		return log
	}
	if why := taken.byID.refusal(own, time.Now()); why != 0 {
		cache.refusal = why
		return log
	}
	own.Rand = &idRand{id: [sessionIDSize]byte(taken.byID.id)}
	cache.spy.armed = taken.byID.id
	return log
}

// outcome settles what became of the offered session and says how the handshake
// was resumed, or why not.
func (s *Store) outcome(cache *connCache, state tls.ConnectionState) (resealv1.Mechanism, resealv1.MissReason) {
	taken := cache.offer.session
	switch {
	case taken == nil:
		return 0, cache.offer.miss
	case state.DidResume:
		s.accepted(cache.identity, cache.offer)
		if state.Version == tls.VersionTLS13 {
			return resealv1.Mechanism_MECHANISM_PSK, 0
		}
		if taken.byID != nil {
			return resealv1.Mechanism_MECHANISM_SESSION_ID, 0
		}
		return resealv1.Mechanism_MECHANISM_TICKET, 0
	case !cache.spy.offered:
		return 0, s.refused(cache)
	default:
		return 0, s.declined(cache.identity, cache.offer, state.Version)
	}
}

// ResumptionError is a handshake that failed while a session was offered. The
// session has been deleted. Either FullHandshake or Release is called, once:
// other handshakes may wait for what comes of it.
type ResumptionError struct {
	// Err is the handshake's error.
	Err error

	store    *Store
	identity exchange.Identity
	cfg      *tls.Config
	miss     resealv1.MissReason
	offer    offer
}

// Error implements error.
func (e *ResumptionError) Error() string {
	return "handshake with an offered session: " + e.Err.Error()
}

// Unwrap returns the handshake's error.
func (e *ResumptionError) Unwrap() error { return e.Err }

// Declined reports whether the server just did not want the session: nothing
// failed.
func (e *ResumptionError) Declined() bool {
	return errors.Is(e.Err, abbreviated.ErrDeclined) || errors.Is(e.Err, abbreviated.ErrVersionChanged)
}

// FullHandshake repeats the handshake on a new connection to the same server
// without the session (RFC 5077 section 3.2). Its miss reason says that the
// offered session was declined. Another session is offered when one has come
// meanwhile.
func (e *ResumptionError) FullHandshake(ctx context.Context, conn net.Conn) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	return e.store.shake(ctx, conn, e.identity, e.cfg, e.store.acquireAgain(e))
}

// Release says that there will be no full handshake.
func (e *ResumptionError) Release() { e.offer.pending.settle() }

// Unclean notes that a connection of identity ended without close_notify, after
// which some servers forget the session (RFC 2246 section 7.2.1).
func (s *Store) Unclean(identity exchange.Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.find(identity); r != nil {
		r.unclean++
	}
}

// Forget drops all identities of a group, with what is known about them.
func (s *Store) Forget(group string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(group)
}

// forget is Forget with s.mu held.
func (s *Store) forget(group string) {
	if g := s.groups[group]; g != nil {
		g.forget()
		delete(s.groups, group)
		s.changedAll()
	}
}

// Replace notes that a pool went from the identities of the group old to those of
// the group next: its trust, client certificate or policy changed. places are
// those of its own identities; others in the group are of pools that stay. Handshakes of the new identities whose old ones had a
// session are then full because of that. The old ones stay until they are
// forgotten.
func (s *Store) Replace(old, next string, places []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from := s.groups[old]
	if from == nil || old == next {
		return
	}
	moves := make(map[string]bool, len(places))
	for _, place := range places {
		moves[place] = true
	}
	to, now := s.group(next), time.Now()
	lose := func(identity exchange.Identity, why resealv1.MissReason) {
		if !moves[identity.Place()] {
			return
		}
		identity = identity.Moved(next)
		if to.records[identity] == nil {
			to.lose(identity, why, s.maxIdentities)
		}
	}
	for place := from.lostOrder.Back(); place != nil; place = place.Prev() {
		lose(place.Value.(loss).identity, place.Value.(loss).why)
	}
	for place := from.order.Back(); place != nil; place = place.Prev() {
		r := place.Value.(*record)
		from.expire(r, now)
		lose(r.identity, r.loss(resealv1.MissReason_MISS_REASON_POLICY_CHANGED))
	}
}
