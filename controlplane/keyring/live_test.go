package keyring

import (
	"maps"
	"slices"
	"testing"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Each replica knows the edges of all, with the labels that it is asked for, once each
// wherever they go, and for a while after they left.
func TestLive(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	asked := func(c *Config) {
		c.Selectors = func(s *resealv1.Snapshot) []*resealv1.EdgeSelector {
			if s.Revision() < 2 {
				return nil
			}
			return []*resealv1.EdgeSelector{{MatchLabels: map[string]string{"id": "a"}}}
		}
	}
	first, second := f.start("r1", asked), f.start("r2", asked)
	both := []*replica{first, second}
	know := func(what string, want map[string]string) {
		t.Helper()
		for _, r := range both {
			eventually(t, what, func() bool {
				members, complete, _ := r.server.Live()
				got := map[string]string{}
				for _, m := range members {
					got[m.ID] = m.Key()
				}
				return complete && maps.Equal(got, want)
			})
		}
	}
	first.waitFor("default", "1 active")
	a, b := first.connect("a"), second.connect("b")
	a.waitFor("default", "1 active")
	b.waitFor("default", "1 active")
	know("both edges, without labels", map[string]string{"a": "", "b": ""})

	f.source.apply(nil)
	know("labels that are asked for now", map[string]string{"a": "id\x00a\x00", "b": ""})

	_, _, changed := first.server.Live()
	moved := second.connect("a")
	moved.waitFor("default", "1 active")
	<-changed
	<-a.ended // by the newer one
	know("an edge that moved", map[string]string{"a": "id\x00a\x00", "b": ""})
	b.cancel()
	<-b.ended
	members, _, _ := first.server.Live()
	if !slices.ContainsFunc(members, func(m fleet.Member) bool { return m.ID == "b" }) {
		t.Error("an edge that left just now does not count any more")
	}
	know("an edge that left", map[string]string{"a": "id\x00a\x00"})
}
