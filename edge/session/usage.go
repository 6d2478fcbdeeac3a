package session

import "slices"

// Identities counts the identities of a group that have a session, by place. Those of
// other places than these are left out: they are of other pools.
func (s *Store) Identities(group string, places []string) map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	counts := map[string]int{}
	g := s.groups[group]
	if g == nil {
		return counts
	}
	for identity, r := range g.records {
		if place := identity.Place(); len(r.sessions) > 0 && slices.Contains(places, place) {
			counts[place]++
		}
	}
	return counts
}
