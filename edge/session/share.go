package session

import (
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Sharing: sessions that this edge holds are dealt to other edges, and theirs
// are adopted. A session that was adopted is used, and dealt on, for at most
// maxSharedAge after its server gave it, and so are the sessions that come of
// resuming it: for that long its server's certificate has been verified by
// another edge.
const (
	maxSharedAge = time.Hour
	// spreadExpiry makes edges give up an adopted session at different times:
	// the first makes a full handshake and deals the new session to the others.
	spreadExpiry = 10 * time.Minute
	// dealAgain is how old the last dealt session of an identity gets before one
	// that came by resumption is dealt.
	dealAgain = maxSharedAge / 2
	// dealGap is the least time between two rounds of an identity, for servers
	// that make every handshake a full one.
	dealGap = 10 * time.Second
	// maxSkew is how far the clocks of two edges may differ.
	maxSkew = 5 * time.Minute

	// lookAgain is how often Holds looks for sessions that became too old.
	lookAgain = 5 * time.Second

	maxOffer      = 62 << 10 // bytes of sessions for one edge
	maxDealt      = 10_000   // identities in one round
	maxAdopted    = 8        // TLS 1.3 sessions of an identity
	maxOfferItems = 8        // sessions of one offer

	// idleTicket is how long a ticket that is taken once must have lain idle for
	// another edge to get it. On an edge that has use for it, it is under way.
	idleTicket = 250 * time.Millisecond

	absentNow = resealv1.MissReason_MISS_REASON_NO_SESSION
)

// ErrFull is the error of Adopt when an adopted session would take the place of
// the edge's own.
var ErrFull = errors.New("no room for sessions of other edges")

var errTooOld = errors.New("the session is too old")

// Deal returns, identity by identity, what recipients other edges may get of the
// sessions of a group: a slice of as many containers, nil for an edge that gets
// nothing. They hold secrets in clear; the caller seals and wipes them.
//
// Sessions that the server takes any number of times go to all. A ticket of TLS
// 1.3 that was not used goes to one, and this edge uses it only when the server
// is not known to take each ticket once.
//
// With seed above 0 it goes through all identities, for edges that have nothing,
// and gives each at most that many tickets that the server takes once; with 0
// through those that got a new session worth sharing since the last round.
func (s *Store) Deal(group string, recipients, seed int) iter.Seq2[exchange.Identity, [][]byte] {
	return func(yield func(exchange.Identity, [][]byte) bool) {
		if recipients <= 0 {
			return
		}
		for _, identity := range s.candidates(group, seed > 0) {
			now := time.Now()
			dealt, known := s.dealOne(identity, recipients, seed, now)
			if containers := pack(identity, dealt, known); containers != nil && !yield(identity, containers) {
				return
			}
		}
	}
}

// candidates are identities of a group, most recently used first.
func (s *Store) candidates(name string, seed bool) []exchange.Identity {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.groups[name]
	if g == nil {
		return nil
	}
	var identities []exchange.Identity
	for place := g.order.Front(); place != nil && len(identities) < maxDealt; place = place.Next() {
		r := place.Value.(*record)
		if seed && len(r.sessions) > 0 || !seed && r.fresh {
			identities = append(identities, r.identity)
		}
		if !seed && len(identities) == g.fresh {
			break
		}
	}
	return identities
}

// pack encodes the sessions of each recipient. Equal ones are encoded once.
func pack(identity exchange.Identity, dealt [][]*held, known knowledge) [][]byte {
	var containers [][]byte
	encoded := map[*held][]byte{}
	for i, sessions := range dealt {
		if len(sessions) == 0 {
			continue
		}
		if containers == nil {
			containers = make([][]byte, len(dealt))
		}
		if encoded[sessions[0]] == nil {
			c := newContainer(maxOffer, false)
			for _, h := range sessions {
				if e, err := h.entry(identity, known); err == nil {
					c.add(e) // what has no room is lost
					clear(e.session)
				}
			}
			if c.empty() {
				continue
			}
			encoded[sessions[0]] = c.data
		}
		containers[i] = slices.Clone(encoded[sessions[0]])
	}
	for _, data := range encoded {
		clear(data)
	}
	return containers
}

// dealOne picks the sessions of each recipient, as copies.
func (s *Store) dealOne(identity exchange.Identity, recipients, seed int, now time.Time) ([][]*held, knowledge) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.groups[identity.Group()]
	if g == nil || g.records[identity] == nil {
		return nil, knowledge{}
	}
	r := g.records[identity]
	g.expire(r, now)
	newest := r.shareable(now)
	switch {
	case r.reuse == reuseOnce && len(r.sessions) > 0 && len(r.stock(seed > 0, now)) == 0:
		return nil, knowledge{} // all are in use; stays fresh
	case newest == nil:
		g.stale(r)
		return nil, knowledge{}
	case r.doubt || seed == 0 && now.Before(r.lastDeal.Add(dealGap)):
		return nil, knowledge{} // stays fresh
	case seed == 0:
		g.stale(r)
		r.lastDeal = now
	}
	s.changed(identity)
	if newest.version != tls.VersionTLS13 {
		return slices.Repeat([][]*held{{newest.copy()}}, recipients), r.knowledge
	}
	if r.reuse == reuseOnce {
		return g.dealStock(r, recipients, seed, now), r.knowledge
	}
	return g.dealTickets(r, newest, recipients, seed > 0, now), r.knowledge
}

// dealTickets picks tickets of TLS 1.3: unused ones first, one for each; then
// the newest for all.
func (g *group) dealTickets(r *record, newest *held, recipients int, seed bool, now time.Time) [][]*held {
	spare := r.spare(now, 0)
	if !seed && len(spare) > 0 {
		spare = spare[:len(spare)-1] // the newest stays here
	}
	dealt := make([][]*held, recipients)
	var common *held
	for i := range dealt {
		if len(spare) > 0 {
			h := spare[0]
			spare = spare[1:]
			dealt[i] = []*held{h.copy()}
			h.taken, h.lent = h.taken+1, true
			continue
		}
		if common == nil {
			newest.lent = true
			common = newest.copy()
		}
		dealt[i] = []*held{common}
	}
	return dealt
}

// dealStock gives away tickets of a server that takes each once: those that have
// been idle, since this edge has no use for them at present.
func (g *group) dealStock(r *record, recipients, seed int, now time.Time) [][]*held {
	spare := r.stock(seed > 0, now)
	if seed == 0 && len(spare) == len(r.spare(now, 0)) && len(spare) > 0 {
		spare = spare[:len(spare)-1] // one stays here
	}
	most := min(max(seed, 1), maxOfferItems)
	dealt := make([][]*held, recipients)
	for i, h := range spare[:min(len(spare), most*recipients)] {
		dealt[i%recipients] = append(dealt[i%recipients], h.copy())
		g.remove(r, h, resealv1.MissReason_MISS_REASON_SINGLE_USE_SPENT)
	}
	return dealt
}

// stock are the tickets of a server that takes each once which other edges may
// get: the idle ones. An edge that has nothing also gets one that is not idle,
// while this edge has others in use.
func (r *record) stock(seed bool, now time.Time) []*held {
	idle, all := r.spare(now, idleTicket), r.spare(now, 0)
	if seed && len(idle) == 0 && len(all) > 0 && r.pending > 0 {
		return all[:1]
	}
	return idle
}

// spare are the tickets of TLS 1.3 that nobody was given, and that came at least
// the time idle ago.
func (r *record) spare(now time.Time, idle time.Duration) []*held {
	var spare []*held
	for _, h := range r.sessions {
		if h.version == tls.VersionTLS13 && !h.worn() && h.young(now) && now.Sub(h.filed) >= idle {
			spare = append(spare, h)
		}
	}
	return spare
}

func (h *held) copy() *held {
	c := *h
	return &c
}

// young reports whether a session may be dealt.
func (h *held) young(now time.Time) bool {
	return now.Before(h.born.Add(maxSharedAge-spreadExpiry)) && now.Before(h.useBy) && len(h.path) < maxPath
}

// shareable is the newest session that may be dealt, or nil.
func (r *record) shareable(now time.Time) *held {
	for _, h := range slices.Backward(r.sessions) {
		if h.young(now) && !(h.worn() && r.reuse == reuseOnce) {
			return h
		}
	}
	return nil
}

// Holds reports whether a group has a session that may be dealt, whether one
// is spare, not a ticket of TLS 1.3 that was used or dealt before, and whether
// one of these is a ticket that the server takes once.
func (s *Store) Holds(group string) (some, spare, stock bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.groups[group]
	if g == nil {
		return false, false, false
	}
	now := time.Now()
	if !g.touched && now.Before(g.looked.Add(lookAgain)) {
		return g.some, g.extra, g.stock
	}
	defer func() { g.some, g.extra, g.stock, g.looked, g.touched = some, spare, stock, now, false }()
	for place := g.order.Front(); place != nil && !stock; place = place.Next() {
		r := place.Value.(*record)
		some = some || r.shareable(now) != nil
		if slices.ContainsFunc(r.sessions, func(h *held) bool { return h.young(now) && !h.worn() }) {
			spare, stock = true, r.reuse == reuseOnce
		}
	}
	return some, spare, stock
}

// Fresh reports whether Deal without seed may have something to give.
func (s *Store) Fresh(group string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.groups[group]
	return g != nil && g.fresh > 0
}

// worn reports whether a session may be spent, if its server takes each once.
func (h *held) worn() bool {
	return h.version == tls.VersionTLS13 && (h.taken > 0 || h.lent)
}

// Adopt takes in what Deal of another edge, sender, gave for identity. cfg is
// what this edge would make a full handshake of identity with: the session's
// certificates are verified by it. A session that the store has, or has a better
// one than, is not an error.
//
// A sender can only make up a session whose secret it knows. The server would
// decline it; but whoever holds the secret and sits on the path could pose as the
// server until the session's end.
func (s *Store) Adopt(identity exchange.Identity, sender string, data []byte, cfg *tls.Config) error {
	entries, _, err := parseContainer(data, maxOffer)
	if err != nil {
		return err
	}
	if len(entries) > maxOfferItems {
		return errContainer
	}
	now := time.Now()
	for _, e := range entries {
		if e.identity != identity {
			return fmt.Errorf("%w: one of another identity", errContainer)
		}
		h, err := s.check(e, sender, cfg, now)
		if err != nil {
			return err
		}
		if err := s.adopt(e, h, now); err != nil {
			return err
		}
	}
	return nil
}

// check verifies a session of another edge.
func (s *Store) check(e entry, sender string, cfg *tls.Config, now time.Time) (*held, error) {
	if cfg.SessionTicketsDisabled {
		return nil, errors.New("sessions are switched off")
	}
	if e.born.After(now.Add(maxSkew)) || !now.Before(e.born.Add(maxSharedAge)) || !now.Before(e.useBy) {
		return nil, errTooOld
	}
	session, err := parseSession(e.session)
	if err != nil {
		return nil, err
	}
	if session, err = session.verify(cfg, now); err != nil {
		return nil, fmt.Errorf("the session's certificate: %w", err)
	}
	if e.path = append(e.path, sender); len(e.path) > maxPath {
		return nil, errors.New("passed on too often")
	}
	h, err := e.held(session, len(e.id) > 0 && s.sessionIDs(), now)
	if err != nil {
		return nil, err
	}
	last := e.born.Add(maxSharedAge - rand.N(spreadExpiry))
	if last.Before(h.useBy) {
		h.useBy = last
	}
	if !now.Before(h.useBy) {
		return nil, errTooOld
	}
	return h, nil
}

// adopt files a session of another edge. It never takes the place of what this
// edge has of other identities, or of what is as good.
func (s *Store) adopt(e entry, h *held, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.find(e.identity) != nil
	if g := s.groups[e.identity.Group()]; g != nil && !known &&
		(len(g.records) >= s.maxIdentities/2 || g.bytes+h.size > s.maxBytes/2) {
		return ErrFull
	}
	g, r := s.use(e.identity)
	if !known {
		g.order.MoveToBack(r.place) // nobody has asked for it here
	}
	g.expire(r, now)
	r.merge(e.knowledge, now)
	if slices.ContainsFunc(r.sessions, h.same) || !g.makeRoom(r, h, s.maxSessions) {
		return nil
	}
	s.add(g, r, h)
	return nil
}

// makeRoom deletes what h replaces and reports whether h is wanted.
func (g *group) makeRoom(r *record, h *held, limit int) bool {
	var adopted []*held
	for _, other := range slices.Clone(r.sessions) {
		newer := h.born.After(other.born)
		switch {
		case h.renewed && newer:
			// The server declined a session elsewhere: it has lost the old ones.
			g.remove(r, other, absentNow)
		case other.version != h.version:
		case h.version != tls.VersionTLS13:
			if !newer || len(other.path) == 0 {
				return false
			}
			g.remove(r, other, absentNow)
		case len(other.path) > 0:
			adopted = append(adopted, other)
		}
	}
	if len(adopted) >= maxAdopted {
		g.remove(r, adopted[0], absentNow)
	}
	return len(r.sessions) < limit
}

// Expel drops the sessions that came from or through an edge.
func (s *Store) Expel(edge string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.groups {
		for _, r := range g.records {
			for _, h := range slices.Clone(r.sessions) {
				if slices.Contains(h.path, edge) {
					g.remove(r, h, absentNow)
				}
			}
		}
	}
	s.changedAll()
}

// descend gives a session that was kept on a connection what it has of the one
// that the connection resumed. Store.mu is held.
func (h *held) descend(cache *connCache) {
	h.born = time.Now()
	if parent := cache.parent; parent != nil && len(parent.path) > 0 {
		h.born, h.path = parent.born, parent.path
		if parent.useBy.Before(h.useBy) {
			h.useBy = parent.useBy
		}
		return
	}
	h.renewed = cache.renewed
}

// declines reports whether the server declined a session before or in the full
// handshake that cache was for, other than one that it had taken before.
func (c *connCache) declines() bool {
	return c.spy.offered && !c.offer.again || c.offer.miss == resealv1.MissReason_MISS_REASON_DECLINED ||
		c.offer.miss == resealv1.MissReason_MISS_REASON_DECLINED_AFTER_UNCLEAN_CLOSE
}

// freshen notes that r got a session that is worth sharing: by a full handshake,
// or because what other edges hold is getting old.
func (g *group) freshen(r *record, h *held, full bool) {
	if r.fresh || len(h.path) > 0 || !full && h.born.Before(r.lastDeal.Add(dealAgain)) {
		return
	}
	r.fresh = true
	g.fresh++
}

// stale takes that back.
func (g *group) stale(r *record) {
	if r.fresh {
		r.fresh = false
		g.fresh--
	}
}
