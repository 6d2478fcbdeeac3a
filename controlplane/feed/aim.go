package feed

import "context"

// aim is what edges are to serve: of two generations one each. It is immutable.
type aim struct {
	newest *generation // nil: none was published yet
	// known is false before Aim was called, where that decides.
	known           bool
	base, candidate int64
	moved           func(id string, labels map[string]string) bool // nil: none has the candidate
	// before and after are the generations of base and candidate, nil while they are not
	// known here.
	before, after *generation
}

// of is the generation that an edge is to serve, nil when it is not known, or can't be
// had: then the edge keeps what it has. holds says whether it has anything.
func (a *aim) of(id string, labels map[string]string, holds bool) *generation {
	switch {
	case !a.known:
		return nil
	case a.candidate == a.base || a.moved == nil:
		return a.before
	case a.after != nil && (a.moved(id, labels) || a.before == nil && !holds || a.before != nil && !a.before.serves(labels)):
		return a.after
	}
	return a.before
}

// revision is that of the generation that an edge is to serve.
func (a *aim) revision(id string, labels map[string]string) int64 {
	g := a.of(id, labels, true)
	switch {
	case g != nil:
		return g.revision()
	case a.known && a.moved != nil && a.moved(id, labels):
		return a.candidate
	case a.known:
		return a.base
	}
	return 0
}

// holds says whether edges may be served of g.
func (a *aim) holds(g *generation) bool { return g == a.newest || g == a.before || g == a.after }

// serves says whether edges with labels have a listener.
func (g *generation) serves(labels map[string]string) bool {
	return len(g.choose(labels).listeners) > 0
}

// Aim says what edges are to serve from now on: those for which moved is true the
// revision candidate, the others base, but those that serve nothing at base the candidate
// too. A revision that is not known yet is waited for; edges of one that can't be had
// keep what they have. Only edges for which it is another one than before are woken. It
// has an effect only with Config.Aimed.
func (s *Server) Aim(ctx context.Context, base, candidate int64, moved func(id string, labels map[string]string) bool) {
	// From history, maybe; not under the lock.
	for _, revision := range []int64{base, candidate} {
		if newest, _ := s.current(); newest != nil && revision <= newest.revision() {
			s.at(ctx, revision)
		}
	}
	s.mu.Lock()
	old := s.aims.Load()
	next := &aim{newest: old.newest, known: true, base: base, candidate: candidate, moved: moved}
	s.resolveLocked(next, old)
	s.aims.Store(next)
	s.mu.Unlock()
	if candidate < old.candidate {
		s.table.abandon(candidate)
	}
	s.turn(old, next)
}

// resolve looks in history for what edges are to serve and is not in memory.
func (s *Server) resolve(ctx context.Context) {
	wanted := s.aims.Load()
	if !wanted.known || wanted.before != nil && wanted.after != nil {
		return
	}
	for _, revision := range []int64{wanted.base, wanted.candidate} {
		if revision <= wanted.newest.revision() {
			s.at(ctx, revision)
		}
	}
	s.mu.Lock()
	old := s.aims.Load() // it may be another one by now
	next := *old
	s.resolveLocked(&next, old)
	s.aims.Store(&next)
	s.mu.Unlock()
	s.turn(old, &next)
}

// resolveLocked finds the generations of an aim.
func (s *Server) resolveLocked(next, old *aim) {
	find := func(revision int64) *generation {
		for _, g := range []*generation{next.newest, old.before, old.after} {
			if g != nil && g.revision() == revision && g.snapshot.ClusterID() == next.newest.snapshot.ClusterID() {
				return g
			}
		}
		for _, g := range s.past {
			if g.revision() == revision {
				return g
			}
		}
		return nil
	}
	if next.newest == nil {
		return
	}
	next.before, next.after = find(next.base), find(next.candidate)
}

// turn wakes the edges that are to serve something else than before, and drops what is
// not needed any more.
func (s *Server) turn(old, next *aim) {
	for _, stream := range s.table.streams() {
		for _, holds := range []bool{false, true} { // which of them it is, its conversation knows
			if old.of(stream.id, stream.labels, holds) != next.of(stream.id, stream.labels, holds) {
				stream.line.Wake()
				break
			}
		}
	}
	for _, g := range []*generation{old.newest, old.before, old.after} {
		if g != nil && !next.holds(g) {
			g.retire()
		}
	}
}

// abandon forgets that edges are to ack revisions above the one given.
func (t *table) abandon(revision int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, p := range t.converging {
		if p.revision > revision {
			t.converging = t.converging[:i]
			return
		}
	}
}

// Touched says whether edges with labels serve something at the revision base and are to
// hold something else at candidate. Where that can't be told it is true.
func (s *Server) Touched(ctx context.Context, base, candidate int64) func(labels map[string]string) bool {
	before, after := s.at(ctx, base), s.at(ctx, candidate)
	known := map[string]bool{}
	return func(labels map[string]string) bool {
		if before == nil || after == nil {
			return true
		}
		was, is := before.choose(labels), after.choose(labels)
		if len(was.listeners) == 0 {
			return false
		}
		key := was.key() + "\x02" + is.key()
		touched, ok := known[key]
		if !ok {
			touched = s.differ(before, after, labels)
			known[key] = touched
		}
		return touched
	}
}

func (s *Server) differ(before, after *generation, labels map[string]string) bool {
	was, err := s.view(before, labels)
	if err != nil {
		return true
	}
	is, err := s.view(after, labels)
	return err != nil || string(was.hash) != string(is.hash)
}

// view is what edges with labels hold of a generation.
func (s *Server) view(g *generation, labels map[string]string) (*view, error) {
	if newest, _ := s.current(); g == newest {
		return g.view(labels, g.encoder.newestForm)
	}
	return g.view(labels, g.encoder.pastForm)
}

// publishedLocked is what edges are to serve now that g is the newest generation: where
// nobody decides, g.
func (s *Server) publishedLocked(g *generation) (old, next *aim) {
	old = s.aims.Load()
	next = &aim{newest: g, known: old.known, base: old.base, candidate: old.candidate, moved: old.moved}
	if !s.config.Aimed {
		next.known, next.base, next.candidate, next.moved = true, g.revision(), g.revision(), nil
	}
	s.resolveLocked(next, old)
	s.aims.Store(next)
	return old, next
}
