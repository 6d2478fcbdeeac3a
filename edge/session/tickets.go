package session

import (
	"crypto/tls"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Tickets of TLS 1.3: some servers take a ticket any number of times, others,
// which keep the session, once (JSSE that chooses certificates by SNI, OpenSSL
// without stateless tickets). No server says which kind it is. So the first
// ticket that was accepted once is offered again by one handshake while the
// others wait for the verdict, and that is remembered for as long as the
// identity.
//
// A server of the second kind gives one ticket per handshake, so as many
// handshakes can be under way as there are tickets, and the others queue for the
// next. Another full handshake adds a ticket to those in circulation. It pays
// when the queue gets too long, but only if the server and this machine have time
// for more: otherwise handshakes take longer in the same measure as there are more of
// them, and full ones most of all.

// reuseKind is what is known of a server's tickets of TLS 1.3.
type reuseKind uint8

const (
	reuseUnknown reuseKind = iota
	reuseMany              // each ticket any number of times
	reuseOnce              // each ticket once

	reuses = 3 // kinds
)

const (
	// reviewAfter is how old the verdict that tickets are taken once gets before
	// it is tried again, by a handshake that would be full anyway: a server that
	// lost its keys at the wrong moment looks the same.
	reviewAfter = 10 * time.Minute
	// stockFactor is how many times more sessions are kept of a server that
	// takes each once.
	stockFactor = 4
)

// choose picks the session for one handshake: the newest unused one; without
// one, the newest used one, unless the server takes each ticket once. TLS 1.2
// sessions may be used any number of times. sure says that the handshake need
// not wait for what others bring.
func (r *record) choose(now time.Time) (o offer, sure bool) {
	var used, settled *held
	for _, h := range slices.Backward(r.sessions) {
		if !h.worn() {
			return offer{session: h}, true
		}
		if used == nil {
			used = h
		}
		if settled == nil && h.busy == 0 {
			settled = h
		}
	}
	spent := offer{miss: resealv1.MissReason_MISS_REASON_SINGLE_USE_SPENT}
	switch {
	case used == nil:
		o = offer{miss: r.missing()}
		return o, o.miss == resealv1.MissReason_MISS_REASON_UNSUPPORTED_BY_PEER
	case r.reuse == reuseMany:
		return offer{session: used, again: true}, true
	case r.reuse == reuseOnce:
		if settled != nil && r.proving == 0 && now.Sub(r.learned) >= reviewAfter {
			return offer{session: settled, again: true}, false
		}
		return spent, false
	case r.proving > 0:
		return spent, false
	case settled != nil:
		return offer{session: settled, again: true}, true
	case r.pending == 0:
		return offer{session: used, again: true}, true
	}
	return spent, false
}

// chooseNow is choose for a handshake that does not wait. It offers a ticket that
// may be in use while it is not known that this is in vain.
func (r *record) chooseNow(now time.Time) offer {
	o, _ := r.choose(now)
	if n := len(r.sessions); o.session == nil && n > 0 && r.reuse == reuseUnknown {
		return offer{session: r.sessions[n-1], again: true}
	}
	return o
}

// learn notes what the server made of a ticket that was offered again. Store.mu
// is held.
func (r *record) learn(kind reuseKind, now time.Time) {
	if r.reuse != kind && kind == reuseOnce {
		r.store.logger.Info("backend takes each TLS 1.3 ticket only once", "identity", r.identity)
	}
	if r.reuse != kind {
		r.store.changed(r.identity)
	}
	r.reuse, r.learned = kind, now
}

// trimUsed deletes used TLS 1.3 tickets: a newer one is about to be filed. While
// a ticket may have to be offered again to learn, one that was accepted stays.
func (g *group) trimUsed(r *record, now time.Time) {
	keep := r.reuse == reuseUnknown || r.reuse == reuseOnce && now.Sub(r.learned) >= reviewAfter
	for _, h := range slices.Backward(slices.Clone(r.sessions)) {
		switch {
		case h.version != tls.VersionTLS13 || !h.worn() || h.busy > 0 && r.reuse == reuseUnknown:
		case keep && h.busy == 0 && h.accepted > 0:
			keep = false
		default:
			g.remove(r, h, resealv1.MissReason_MISS_REASON_NO_SESSION)
		}
	}
}

// turns measures the circulation of an identity's tickets: how long it takes
// from a ticket to the next one that it brings.
type turns struct {
	mean   time.Duration // of the last sixteen or so
	known  int           // of how many, at most sixteen
	least  time.Duration // in this period
	before time.Duration // least in the one before
	period time.Time     // when this one began
	count  int           // since a ticket was added
}

// enoughTurns is how many turns say what one takes. The first ones of a process
// take longest.
const enoughTurns = 8

// leastPeriod is how long the shortest turn counts, at most twice.
const leastPeriod = 30 * time.Second

// maxTurn bounds what is believed of a turn.
const maxTurn = time.Minute

// add takes in how long one turn took. hint is the shortest one that was measured
// earlier or elsewhere, 0 for none; it counts until there are ones of its own.
func (t *turns) add(took, hint time.Duration, now time.Time) {
	t.count++
	t.known = min(t.known+1, 16)
	t.mean += (took - t.mean) / time.Duration(t.known)
	if now.Sub(t.period) > leastPeriod {
		if t.known == 1 {
			t.least = hint
		}
		t.before, t.least, t.period = t.least, took, now
		if t.before == 0 {
			t.before = took
		}
	}
	t.least = min(t.least, took)
}

// delay is what a turn takes beyond what it could: the time that it waits for a
// busy server, or for this machine.
func (t *turns) delay() time.Duration { return max(t.mean-t.shortest(), 0) }

// shortest is what a turn takes when nobody is busy.
func (t *turns) shortest() time.Duration { return min(t.least, t.before) }

// delayFactor is how long the queue may be, in delays of a turn. With a server
// that has no time, each further ticket makes a turn so much longer that one in
// sixteen of those that wait gets one.
const delayFactor = 16

// grows reports whether another full handshake, besides those under way, is to
// add a ticket to those in circulation: when those that wait now, one by one,
// would wait longer than they may. After one has been added the tickets go round
// twice before it is looked at again. Store.mu is held.
func (r *record) grows(terms exchange.Terms, now time.Time) bool {
	if r.reuse != reuseOnce || r.turns.known < enoughTurns || r.proving > 0 {
		return false
	}
	limit := max(terms.TicketWait, min(delayFactor*r.turns.delay(), terms.Wait))
	wait := r.turns.mean * time.Duration(len(r.queue)) / time.Duration(r.pending)
	if wait <= limit || now.Sub(r.grown) < limit || r.turns.count < 2*r.pending {
		return false
	}
	r.grown, r.turns.count = now, 0
	return true
}
