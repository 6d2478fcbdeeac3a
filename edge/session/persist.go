package session

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// Export returns all sessions, those of the identities used last first, in a
// form that Import of the same release of Go reads. It holds secrets in clear.
// What does not fit into 8 MiB is left out. clean says that no handshake will be
// made after it: only then does Import trust that a ticket was not used.
func (s *Store) Export(now time.Time, clean bool) []byte {
	c := newContainer(maxContainer, clean)
	s.export(c, s.copyAll(now))
	return c.data
}

// export reports whether all records had room.
func (s *Store) export(c *container, records []exported) bool {
	refused := 0
	for pass := range stockFactor * s.maxSessions {
		for _, r := range records {
			if pass >= max(len(r.sessions), 1) {
				continue
			}
			e, err := r.entry(pass)
			if err != nil {
				continue
			}
			added := c.add(e)
			clear(e.session)
			if !added {
				refused++
			}
			if refused > 16 {
				return false // full
			}
		}
	}
	return refused == 0
}

// exportOf is Export of some identities. One that no longer has anything stands
// there with nothing. ok is false when there is too much.
func (s *Store) exportOf(identities []exchange.Identity, now time.Time) (data []byte, ok bool) {
	c := newContainer(maxContainer, false)
	ok = s.export(c, s.copySome(identities, now))
	return c.data, ok
}

// exported is a record as it was at one moment, its sessions newest first.
type exported struct {
	knowledge

	identity exchange.Identity
	rank     int // in its group, most recently used first
	sessions []held
}

// entry is the n-th session as it travels, or the knowledge alone when there is
// no session.
func (r *exported) entry(n int) (entry, error) {
	if len(r.sessions) == 0 {
		return entry{identity: r.identity, knowledge: r.knowledge}, nil
	}
	return r.sessions[n].entry(r.identity, r.knowledge)
}

func (s *Store) copyAll(now time.Time) []exported {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []exported
	for _, g := range s.groups {
		rank := 0
		for place := g.order.Front(); place != nil; place = place.Next() {
			r := place.Value.(*record)
			out := r.copy(now)
			out.rank = rank
			if len(out.sessions) > 0 || out.known() {
				all = append(all, out)
				rank++
			}
		}
	}
	slices.SortFunc(all, func(a, b exported) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.identity, b.identity))
	})
	return all
}

func (s *Store) copySome(identities []exchange.Identity, now time.Time) []exported {
	s.mu.Lock()
	defer s.mu.Unlock()
	some := make([]exported, 0, len(identities))
	for _, identity := range identities {
		out := exported{identity: identity}
		if r := s.find(identity); r != nil {
			out = r.copy(now)
		}
		some = append(some, out)
	}
	return some
}

func (r *record) copy(now time.Time) exported {
	out := exported{identity: r.identity, knowledge: r.knowledge}
	for _, h := range slices.Backward(r.sessions) {
		if now.Before(h.useBy) {
			out.sessions = append(out.sessions, *h)
		}
	}
	return out
}

// Import takes in the sessions of an Export and returns how many. Expired ones
// are left out. Certificates are not verified again now: crypto/tls does it
// whenever a session is offered. Sessions that the store holds already stay.
//
// Unless the export was clean, a ticket of TLS 1.3 counts as used: it may have
// been offered after the export. Tickets of servers that take each once are then
// left out.
func (s *Store) Import(data []byte, now time.Time) (int, error) {
	entries, clean, err := parseContainer(data, maxContainer)
	if err != nil {
		return 0, err
	}
	return s.take(entries, clean, now), nil
}

func (s *Store) take(entries []entry, clean bool, now time.Time) int {
	taken := 0
	// Backwards, so that the newest and the most recently used end on top.
	for _, e := range slices.Backward(entries) {
		s.remember(e, now)
		if h := s.restore(e, clean, now); h != nil && s.putBack(e, h, clean) {
			taken++
		}
	}
	return taken
}

// restore makes an own session of an entry, or nil when it must not be used.
func (s *Store) restore(e entry, clean bool, now time.Time) *held {
	if len(e.session) == 0 || !now.Before(e.useBy) || e.born.After(now.Add(maxSkew)) {
		return nil
	}
	session, err := parseSession(e.session)
	if err != nil {
		return nil
	}
	if session.version == tls.VersionTLS13 && !clean {
		e.used = true
	}
	if e.used && e.knowledge.reuse == reuseOnce {
		return nil
	}
	h, err := e.held(session, len(e.id) > 0 && s.sessionIDs(), now)
	if err != nil || !now.Before(h.useBy) {
		return nil
	}
	return h
}

// remember takes in what an entry tells of its identity's server.
func (s *Store) remember(e entry, now time.Time) {
	if !e.knowledge.known() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, r := s.use(e.identity)
	r.merge(e.knowledge, now)
}

func (s *Store) putBack(e entry, h *held, clean bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, r := s.use(e.identity)
	if len(r.sessions) >= s.most(r) || g.bytes+h.size > s.maxBytes || slices.ContainsFunc(r.sessions, h.same) ||
		h.version != tls.VersionTLS13 && r.holds(h.version) {
		return false
	}
	r.lastDeal = h.born
	s.add(g, r, h)
	if !clean && h.version != tls.VersionTLS13 {
		// A crash ends the connections of the session without close_notify.
		r.unclean++
	}
	return true
}

// add files h among the sessions of r by age. Store.mu is held.
func (s *Store) add(g *group, r *record, h *held) {
	h.filed, h.unclean = time.Now(), r.unclean
	i := len(r.sessions)
	for i > 0 && h.born.Before(r.sessions[i-1].born) {
		i--
	}
	r.sessions = slices.Insert(r.sessions, i, h)
	g.bytes += h.size
	r.serve(time.Now())
	s.changed(r.identity)
}

// Retain drops the identities of all groups but these: sessions that were kept
// for a configuration that is no more.
func (s *Store) Retain(groups ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.groups {
		if !slices.Contains(groups, name) {
			s.forget(name)
		}
	}
}

func (r *record) holds(version uint16) bool {
	return slices.ContainsFunc(r.sessions, func(h *held) bool { return h.version == version })
}

// same reports whether both are the same session for the server.
func (h *held) same(other *held) bool {
	if h.byID != nil || other.byID != nil {
		return h.byID != nil && other.byID != nil && bytes.Equal(h.byID.id, other.byID.id)
	}
	ticket, _, err := h.state.ResumptionState()
	theirs, _, otherErr := other.state.ResumptionState()
	return err == nil && otherErr == nil && string(ticket) == string(theirs)
}

// Watch returns a channel that gets a value after sessions came or went, one for
// any number of changes. stop ends it.
func (s *Store) Watch() (changes <-chan struct{}, stop func()) {
	c := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watchers == nil {
		s.watchers = map[chan struct{}]struct{}{}
	}
	s.watchers[c] = struct{}{}
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, c)
	}
}

// changed tells those who watch that sessions of an identity, or what is known of
// its server, changed. Store.mu is held.
func (s *Store) changed(identity exchange.Identity) {
	s.touch(identity)
	if s.kept != nil && !s.kept.all {
		s.kept.identities[identity] = struct{}{}
		s.kept.all = len(s.kept.identities) > maxChanges
	}
	s.tell()
}

// touch notes that what Holds says of an identity's group may have changed.
func (s *Store) touch(identity exchange.Identity) {
	if g := s.groups[identity.Group()]; g != nil {
		g.touched = true
	}
}

// changedAll is changed of any number of identities.
func (s *Store) changedAll() {
	for _, g := range s.groups {
		g.touched = true
	}
	if s.kept != nil {
		s.kept.all = true
	}
	s.tell()
}

func (s *Store) tell() {
	for c := range s.watchers {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// maxChanges bounds the identities that are named as changed.
const maxChanges = 16384

// changes are the identities that changed since the keeper looked last.
type changes struct {
	identities map[exchange.Identity]struct{}
	all        bool // that would be too many to name
}

// takeChanges returns what changed since the last call, at first all.
func (s *Store) takeChanges() changes {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := changes{all: true}
	if s.kept != nil {
		last = *s.kept
	}
	s.kept = &changes{identities: map[exchange.Identity]struct{}{}}
	return last
}
