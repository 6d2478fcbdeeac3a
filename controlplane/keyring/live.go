package keyring

import (
	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Live are the edges that live, on whichever replica, as the replicas tell each other,
// with the labels that selectors of keyrings and Config.Selectors ask for. complete is
// false while there may be others, of whom this replica has not heard yet. changed is
// closed when something may have changed.
func (s *Server) Live() (members []fleet.Member, complete bool, changed <-chan struct{}) {
	st := s.state
	st.mu.Lock()
	defer st.mu.Unlock()
	members = make([]fleet.Member, 0, len(st.ledger.covers))
	for edge, c := range st.ledger.covers {
		members = append(members, fleet.Member{ID: edge, Labels: c.Labels, Vague: c.Terms != st.terms.id})
	}
	return members, st.ready() && st.complete(s.config.LiveFor), st.all
}

// selectors are those that the covers of edges are asked for.
func (s *Server) selectors(snapshot *resealv1.Snapshot, specs []keyringSpec) []*resealv1.EdgeSelector {
	var all []*resealv1.EdgeSelector
	for _, k := range specs {
		all = append(all, k.spec.GetEdgeSelector())
	}
	if s.config.Selectors != nil {
		all = append(all, s.config.Selectors(snapshot)...)
	}
	return all
}
