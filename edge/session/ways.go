package session

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/session/abbreviated"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Which way the session IDs of an identity go is learned. A server that answers
// a session_ticket extension with an empty ticket, or declines an ID that it gave
// out, is asked for none from then on: its next full handshake is crypto/tls's
// without the extension, and what that gives is offered without it too, by
// edge/session/abbreviated. That is one full handshake more, once.

// knowledge is what was learned of an identity's server. It stays for as long as
// the identity, over restarts, and travels with its sessions.
type knowledge struct {
	reuse   reuseKind
	way     idWay
	learned time.Time // when the last of it was
	// turn is the shortest turn of a ticket that is taken once, or 0. It says what
	// is slow, for those that have measured nothing yet.
	turn time.Duration
}

// idWay is how a server takes session IDs of TLS 1.2.
type idWay uint8

const (
	// wayAsked: with the session_ticket extension in the ClientHello, as
	// crypto/tls sends it, or nobody knows yet.
	wayAsked idWay = iota
	// wayBare: only without that extension (JSSE that chooses certificates by
	// SNI).
	wayBare
	// wayNone: it gives out IDs and declines them in every way. It is tried
	// again after reviewAfter.
	wayNone

	ways = 3 // kinds
)

// alertProtocolVersion says that the server does not speak TLS 1.2 (RFC 5246
// section 7.2.2).
const alertProtocolVersion tls.AlertError = 70

// mostVain is how many sessions in a row may be declined when they are offered
// for the first time, without the extension, before none is offered by ID.
const mostVain = 2

// known reports whether there is anything to keep.
func (k knowledge) known() bool { return k.reuse != reuseUnknown || k.way != wayAsked }

// merge takes in what another edge, or an earlier run, has learned.
func (k *knowledge) merge(other knowledge, now time.Time) {
	if k.turn == 0 {
		k.turn = other.turn
	}
	if other.known() && other.learned.After(k.learned) && !other.learned.After(now.Add(maxSkew)) {
		other.turn = k.turn
		*k = other
	}
}

// bareWorks reports whether sessions can be resumed without crypto/tls here. It
// is not allowed when FIPS 140-3 is enforced.
func bareWorks() bool { return abbreviated.Supports(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256) }

// goesBare reports whether the offered session goes without the session_ticket
// extension: when the server wants it so, or crypto/tls can't offer it.
func (s *Store) goesBare(o offer) bool {
	h := o.session
	if h == nil || h.byID == nil || !abbreviated.Supports(h.byID.suite) {
		return false
	}
	return o.way == wayBare || h.state == nil
}

// shakeBare resumes a session by ID without the session_ticket extension. The
// error of an attempt that the server declines is a *ResumptionError, as that of
// one that fails: there is no going on to a full handshake on the same
// connection.
func (s *Store) shakeBare(ctx context.Context, conn net.Conn, identity exchange.Identity, cfg *tls.Config, o offer) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	byID := o.session.byID
	why := byID.refusal(cfg, time.Now())
	if o.terms.CryptoTLS {
		why = resealv1.MissReason_MISS_REASON_POLICY_CHANGED
	}
	if why != 0 {
		s.drop(identity, o, why)
		o.session, o.miss = nil, why
		return s.shake(ctx, conn, identity, cfg, o)
	}
	tc := abbreviated.Client(conn, abbreviated.Config{
		Session: abbreviated.Session{
			ID: byID.id, Secret: byID.secret, CipherSuite: byID.suite, ExtendedMasterSecret: byID.extends,
			PeerCertificates: byID.peers, VerifiedChains: byID.chains,
		},
		Config: cfg,
	})
	err := tc.HandshakeContext(ctx)
	if err == nil {
		s.accepted(identity, o)
		o.pending.settle()
		return tc, resealv1.Mechanism_MECHANISM_SESSION_ID, 0, nil
	}
	var alert tls.AlertError
	failure := &ResumptionError{Err: err, store: s, identity: identity, cfg: cfg, offer: o}
	switch {
	case errors.Is(err, abbreviated.ErrDeclined):
		failure.miss = s.declined(identity, o, tls.VersionTLS12)
	case errors.Is(err, abbreviated.ErrVersionChanged), errors.As(err, &alert) && alert == alertProtocolVersion:
		failure.miss = s.declined(identity, o, tls.VersionTLS13)
	default:
		failure.miss = s.failed(identity, o, err)
	}
	return nil, 0, 0, failure
}

// idDeclined learns from an ID that was declined: if it was never accepted, and
// no unclean close made the server forget it, the server may want it in another
// way. Store.mu is held.
func (r *record) idDeclined(o offer, now time.Time) {
	if o.session.accepted > 0 || o.session.restored || r.unclean > o.session.unclean || o.way != r.way {
		return
	}
	switch r.way {
	case wayAsked:
		if bareWorks() && !o.terms.CryptoTLS {
			r.goes(wayBare, now)
		}
	case wayBare:
		if r.vain++; r.vain >= mostVain {
			r.goes(wayNone, now)
		}
	}
}

// goes notes the way of an identity's session IDs. Store.mu is held.
func (r *record) goes(way idWay, now time.Time) {
	if r.way == way {
		return
	}
	switch way {
	case wayBare:
		r.store.logger.Info("backend resumes TLS 1.2 sessions only without the session_ticket extension", "identity", r.identity)
	case wayNone:
		r.store.logger.Warn("backend gives out TLS 1.2 session IDs and declines each of them", "identity", r.identity)
	case wayAsked:
	}
	r.way, r.learned = way, now
	r.store.changed(r.identity)
}

// fileID keeps the session of a full handshake under its ID, unless the server
// gave a ticket, which is the better of the two: the server need not remember it.
func (s *Store) fileID(cache *connCache, state tls.ConnectionState, secret []byte) {
	if cache.supply.given.Load() {
		return
	}
	tls12 := state.Version == tls.VersionTLS12
	if !s.wayHolds(cache, tls12 && len(cache.spy.hello.sessionID) > 0, time.Now()) || !tls12 {
		return
	}
	onTop := s.sessionIDs()
	h := newIDSession(cache.spy.hello, state, secret, onTop, time.Now())
	if h == nil || h.state == nil && cache.offer.terms.CryptoTLS {
		return
	}
	cache.supply.given.Store(true)
	s.keep(cache, h)
}

// wayHolds learns from a full handshake that gave no ticket, and reports whether
// a session with its ID can be offered. gave is whether there is an ID.
func (s *Store) wayHolds(cache *connCache, gave bool, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.find(cache.identity)
	switch {
	case r == nil || cache.offer.terms.SessionIDsOff:
		return false
	case cache.bare && !gave:
		// Another kind of server: it is asked for tickets again.
		r.goes(wayAsked, now)
	case !cache.bare && r.way == wayAsked && gave && cache.gotEmpty() && bareWorks() && !cache.offer.terms.CryptoTLS:
		r.goes(wayBare, now)
	case !cache.bare && r.way == wayBare:
		// It was learned meanwhile, by this handshake or another.
	default:
		return r.way != wayNone
	}
	r.newest = nil // the next handshake may well bring a session
	return false
}
