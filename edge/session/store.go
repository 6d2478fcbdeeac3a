package session

import (
	"container/list"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxLifetime12 bounds a TLS 1.2 session, whose ticket's lifetime crypto/tls does
// not reveal (RFC 5246 appendix F.1.4).
const maxLifetime12 = 24 * time.Hour

// maxLifetime13 bounds a TLS 1.3 ticket (RFC 8446 section 4.6.1).
const maxLifetime13 = 7 * 24 * time.Hour

// held is one session of an identity. Its fields are guarded by Store.mu.
type held struct {
	state   *tls.ClientSessionState
	version uint16
	useBy   time.Time
	size    int64
	byID    *idSession // set when it is offered by session ID
	unclean uint64     // record.unclean when the session's connection was made

	filed     time.Time // when it came here
	born      time.Time // when the server gave it, perhaps to another edge
	path      []string  // edges through which it came, if not from the server
	renewed   bool      // the server declined another one before it gave this one
	lent      bool      // other edges may use it too
	restored  bool      // it came from outside; others may have used it before
	lastOffer time.Time // when it was handed out last
	taken     int       // times handed out
	busy      int       // handshakes under way that offer it
	accepted  int       // times resumed
}

// record is what is known about an identity. Guarded by Store.mu.
type record struct {
	store    *Store
	identity exchange.Identity
	sessions []*held // oldest first
	unclean  uint64
	// absent is why there is no session, when there is none.
	absent resealv1.MissReason
	knowledge
	// newest is the supply of the newest connection, if its handshake was full.
	newest *supply
	place  *list.Element // in group.order

	fresh    bool // has a session worth sharing; counted in group.fresh
	lastDeal time.Time

	queue    []*waiter // handshakes that wait for their turn
	pending  int       // connections that may bring a session
	proving  int       // those of them that find out whether a ticket is taken again
	progress time.Time // when the first of them began, or the last ticket came
	escaped  bool      // a waiter went ahead because it took too long
	doubt    bool      // the server may have forgotten the sessions
	turns    turns     // of tickets that are taken once
	grown    time.Time // when a ticket was added to those in circulation
	vain     int       // IDs in a row that were declined at once
}

// group is the identities of a common Group. Guarded by Store.mu.
type group struct {
	name    string
	records map[exchange.Identity]*record
	order   *list.List // of *record, most recently used first
	bytes   int64
	// lost remembers why identities without a record have no session any more,
	// so that the next handshake of one can say so. lostOrder bounds it.
	lost      map[exchange.Identity]*list.Element
	lostOrder *list.List // of loss, newest first
	fresh     int        // records that are

	// What Holds said last, and when; touched since sessions came or went.
	some, extra, stock bool
	looked             time.Time
	touched            bool
}

// loss is an identity whose sessions were dropped: to bound memory, or because
// the pool's policy changed.
type loss struct {
	identity exchange.Identity
	why      resealv1.MissReason
}

// offer is what was decided for one handshake: a session, or why there is none.
type offer struct {
	session *held
	miss    resealv1.MissReason
	pending *pending
	again   bool      // the session may have been used before, and be spent
	proof   bool      // this is how it is learned whether that matters
	at      time.Time // when it was taken
	terms   exchange.Terms
	way     idWay // how a session is offered by ID
}

// find returns the record of identity, or nil.
func (s *Store) find(identity exchange.Identity) *record {
	g := s.groups[identity.Group()]
	if g == nil {
		return nil
	}
	return g.records[identity]
}

// group returns the group of a name, made if need be.
func (s *Store) group(name string) *group {
	g := s.groups[name]
	if g == nil {
		g = &group{
			name: name, records: map[exchange.Identity]*record{}, order: list.New(),
			lost: map[exchange.Identity]*list.Element{}, lostOrder: list.New(),
		}
		s.groups[name] = g
	}
	return g
}

// use returns the record of identity, made if need be, as the most recently
// used one.
func (s *Store) use(identity exchange.Identity) (*group, *record) {
	g := s.group(identity.Group())
	if r := g.records[identity]; r != nil {
		g.order.MoveToFront(r.place)
		return g, r
	}
	r := &record{store: s, identity: identity, absent: resealv1.MissReason_MISS_REASON_NO_SESSION}
	if place, ok := g.lost[identity]; ok {
		r.absent = place.Value.(loss).why
		g.found(place)
	}
	r.place = g.order.PushFront(r)
	g.records[identity] = r
	for len(g.records) > s.maxIdentities {
		g.evictOldest(s.maxIdentities)
	}
	return g, r
}

// evictOldest drops the least recently used identity.
func (g *group) evictOldest(remember int) {
	r := g.order.Back().Value.(*record)
	why := r.loss(resealv1.MissReason_MISS_REASON_EVICTED)
	g.drop(r)
	r.store.changed(r.identity)
	g.lose(r.identity, why, remember)
}

// loss is the reason to remember when the record is dropped for the reason why:
// an earlier one, when it had lost its sessions already, or 0.
func (r *record) loss(why resealv1.MissReason) resealv1.MissReason {
	switch {
	case len(r.sessions) > 0:
		return why
	case r.absent == resealv1.MissReason_MISS_REASON_EVICTED, r.absent == resealv1.MissReason_MISS_REASON_POLICY_CHANGED:
		return r.absent
	}
	return 0
}

// lose remembers why an identity has no session any more, for a bounded number of
// the newest identities. It does nothing when why is 0.
func (g *group) lose(identity exchange.Identity, why resealv1.MissReason, remember int) {
	if why == 0 {
		return
	}
	if place, ok := g.lost[identity]; ok {
		g.found(place)
	}
	g.lost[identity] = g.lostOrder.PushFront(loss{identity, why})
	for g.lostOrder.Len() > remember {
		g.found(g.lostOrder.Back())
	}
}

// found forgets a loss.
func (g *group) found(place *list.Element) {
	delete(g.lost, place.Value.(loss).identity)
	g.lostOrder.Remove(place)
}

func (g *group) drop(r *record) {
	g.stale(r)
	r.release()
	for _, h := range r.sessions {
		g.bytes -= h.size
	}
	g.order.Remove(r.place)
	delete(g.records, r.identity)
	r.sessions = nil
}

// forget drops all identities.
func (g *group) forget() {
	for _, r := range g.records {
		g.drop(r)
	}
	clear(g.lost)
	g.lostOrder.Init()
}

// missing says why the identity has no session.
func (r *record) missing() resealv1.MissReason {
	if r.newest != nil && r.newest.withheld() {
		return resealv1.MissReason_MISS_REASON_UNSUPPORTED_BY_PEER
	}
	return r.absent
}

// expire drops the sessions that are past their lifetime.
func (g *group) expire(r *record, now time.Time) {
	for _, h := range slices.Clone(r.sessions) {
		if !now.Before(h.useBy) {
			g.remove(r, h, resealv1.MissReason_MISS_REASON_EXPIRED)
		}
	}
}

// remove deletes one session. why is kept as the reason when none is left.
func (g *group) remove(r *record, h *held, why resealv1.MissReason) {
	i := slices.Index(r.sessions, h)
	if i < 0 {
		return
	}
	r.sessions = slices.Delete(r.sessions, i, i+1)
	g.bytes -= h.size
	if len(r.sessions) == 0 {
		r.absent = why
	}
}

// discard deletes a session by identity. It does nothing when the identity was
// forgotten or evicted meanwhile.
func (s *Store) discard(identity exchange.Identity, h *held, why resealv1.MissReason) *record {
	g := s.groups[identity.Group()]
	if g == nil {
		return nil
	}
	r := g.records[identity]
	if r != nil {
		g.remove(r, h, why)
		s.changed(identity)
	}
	return r
}

// accepted notes that a session was resumed. Unclean closes before that did it
// no harm.
func (s *Store) accepted(identity exchange.Identity, o offer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, now := o.session, time.Now()
	o.concluded()
	h.accepted++
	r := s.find(identity)
	if r == nil {
		return
	}
	h.unclean = r.unclean
	r.doubt = false
	if h.byID != nil {
		r.vain = 0
	}
	if h.version == tls.VersionTLS13 && h.accepted > 1 {
		r.learn(reuseMany, now) // one that was lent may be used for the first time
	}
	r.serve(now)
}

// failed deletes a session whose handshake failed and returns the reason for
// the full handshake that follows.
func (s *Store) failed(identity exchange.Identity, o offer, err error) resealv1.MissReason {
	s.mu.Lock()
	defer s.mu.Unlock()
	o.concluded()
	r := s.discard(identity, o.session, resealv1.MissReason_MISS_REASON_NO_SESSION)
	if r != nil && o.proof && fromPeer(err) {
		r.learn(reuseOnce, time.Now()) // it says no in its own way
	}
	return declineReason(r, o.session)
}

// declined deletes a session that the server answered with a full handshake and
// returns the reason.
func (s *Store) declined(identity exchange.Identity, o offer, version uint16) resealv1.MissReason {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := o.session
	o.concluded()
	r := s.discard(identity, h, resealv1.MissReason_MISS_REASON_NO_SESSION)
	if version != h.version {
		if r != nil {
			s.groups[identity.Group()].removeVersion(r, h.version)
			r.goes(wayAsked, time.Now()) // it is another kind of server now
		}
		return resealv1.MissReason_MISS_REASON_VERSION_CHANGED
	}
	if r == nil {
		return declineReason(r, h)
	}
	r.doubt = false
	if h.byID != nil {
		r.idDeclined(o, time.Now())
	}
	switch now := time.Now(); {
	case o.proof:
		r.learn(reuseOnce, now)
	case o.again && r.reuse == reuseMany:
		// The server has lost its keys, or is another one now.
		r.reuse = reuseUnknown
		fallthrough
	case !o.again:
		// The server has lost what its sessions stand on; the others would cost
		// a declined handshake each.
		s.groups[identity.Group()].removeOlder(r, h)
	}
	r.serve(time.Now())
	return declineReason(r, h)
}

// fromPeer reports whether a handshake's error is an alert of the peer.
func fromPeer(err error) bool {
	var failure *net.OpError
	return errors.As(err, &failure) && failure.Op == "remote error"
}

func declineReason(r *record, h *held) resealv1.MissReason {
	if r != nil && r.unclean > h.unclean {
		return resealv1.MissReason_MISS_REASON_DECLINED_AFTER_UNCLEAN_CLOSE
	}
	return resealv1.MissReason_MISS_REASON_DECLINED
}

// refused deletes a session that crypto/tls did not offer and returns why. It
// deletes sessions whose certificate or chain is no longer valid; others it
// silently leaves, when version, cipher suite or verification rules differ.
func (s *Store) refused(cache *connCache) resealv1.MissReason {
	why := resealv1.MissReason_MISS_REASON_POLICY_CHANGED
	switch {
	case cache.refusal != 0:
		why = cache.refusal
	case cache.wasDropped():
		why = resealv1.MissReason_MISS_REASON_EXPIRED
	}
	s.drop(cache.identity, cache.offer, why)
	return why
}

// drop deletes an offered session that was not sent.
func (s *Store) drop(identity exchange.Identity, o offer, why resealv1.MissReason) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o.concluded()
	s.discard(identity, o.session, why)
}

// connected notes a completed handshake before its sessions are filed.
func (s *Store) connected(cache *connCache, resumed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, r := s.use(cache.identity)
	cache.unclean = r.unclean
	// A server that withheld sessions is assumed to do so again: whoever comes before
	// this connection has been read need not wait for it.
	r.absent = r.missing()
	r.newest = nil
	if resumed {
		cache.parent = cache.offer.session
		return
	}
	r.newest = cache.supply
	cache.renewed = cache.declines()
}

// file keeps a session that the server gave on the cache's connection.
func (s *Store) file(cache *connCache, state *tls.ClientSessionState) {
	if h, ok := newHeld(state, time.Now()); ok {
		s.keep(cache, h)
	}
}

func (s *Store) keep(cache *connCache, h *held) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, r := s.use(cache.identity)
	now := time.Now()
	h.unclean = cache.unclean
	if h.version != tls.VersionTLS13 {
		// A new TLS 1.2 ticket replaces the old ones (RFC 5077 section 3.3).
		g.removeVersion(r, h.version)
	} else {
		g.trimUsed(r, now)
		if cache.parent != nil && !cache.turned {
			cache.turned = true
			r.turns.add(now.Sub(cache.offer.at), r.turn, now)
			r.turn = r.turns.shortest()
		}
	}
	h.filed = now
	h.descend(cache)
	g.freshen(r, h, cache.parent == nil)
	r.sessions = append(r.sessions, h)
	g.bytes += h.size
	r.progress, r.escaped = now, false
	r.serve(now)
	s.changed(r.identity)
	for len(r.sessions) > s.most(r) {
		g.remove(r, r.sessions[0], resealv1.MissReason_MISS_REASON_EVICTED)
	}
	for g.bytes > s.maxBytes && g.order.Len() > 0 {
		g.evictOldest(s.maxIdentities)
	}
}

// removeOlder deletes the sessions that were filed before h was declined and
// are of its connection or older ones.
func (g *group) removeOlder(r *record, h *held) {
	for _, other := range slices.Clone(r.sessions) {
		if !other.filed.After(h.lastOffer) {
			g.remove(r, other, resealv1.MissReason_MISS_REASON_NO_SESSION)
		}
	}
}

// removeIDs deletes the sessions that are offered by ID.
func (g *group) removeIDs(r *record) {
	for _, h := range slices.Clone(r.sessions) {
		if h.byID != nil {
			g.remove(r, h, resealv1.MissReason_MISS_REASON_UNSUPPORTED_BY_PEER)
		}
	}
}

// removeVersion deletes the sessions of one TLS version.
func (g *group) removeVersion(r *record, version uint16) {
	for _, h := range slices.Clone(r.sessions) {
		if h.version == version {
			g.remove(r, h, resealv1.MissReason_MISS_REASON_NO_SESSION)
		}
	}
}

// most is how many sessions of an identity are kept.
func (s *Store) most(r *record) int {
	if r.reuse == reuseOnce {
		return stockFactor * s.maxSessions
	}
	return s.maxSessions
}

// newHeld measures a session. The encoding of client sessions ends with use_by
// and age_add (see tls.SessionState); a value outside of what RFC 8446 allows
// means that the encoding has changed, then the protocol's bound holds.
func newHeld(state *tls.ClientSessionState, now time.Time) (*held, bool) {
	_, session, err := state.ResumptionState()
	if err != nil || session == nil {
		return nil, false
	}
	encoded, err := session.Bytes()
	if err != nil || len(encoded) < 2 {
		return nil, false
	}
	defer clear(encoded) // it holds the secret
	h := &held{state: state, version: binary.BigEndian.Uint16(encoded), size: int64(len(encoded))}
	h.useBy = now.Add(maxLifetime12)
	if h.version == tls.VersionTLS13 {
		h.useBy = now.Add(maxLifetime13)
		if useBy, ok := trailingUseBy(encoded, now); ok {
			h.useBy = useBy
		}
	}
	return h, true
}

func trailingUseBy(encoded []byte, now time.Time) (time.Time, bool) {
	const trailer = 8 + 4 // use_by, age_add
	if len(encoded) < trailer {
		return time.Time{}, false
	}
	seconds := binary.BigEndian.Uint64(encoded[len(encoded)-trailer:])
	low, high := now.Unix(), now.Add(maxLifetime13).Unix()+1
	if seconds > uint64(high) || seconds < uint64(low) {
		return time.Time{}, false
	}
	return time.Unix(int64(seconds), 0), true
}
