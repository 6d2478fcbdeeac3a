package rules

import (
	"fmt"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func listenerAt(name, address string, labels map[string]string) *resealv1.Resource {
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec: &resealv1.Resource_Listener{Listener: &resealv1.Listener{
			Address: address, EdgeSelector: &resealv1.EdgeSelector{MatchLabels: labels},
		}},
	}
}

func TestAddressesCollide(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want bool
	}{
		{":443", ":443", true},
		{":443", ":0443", true},
		{":443", ":444", false},
		{":443", "127.0.0.1:443", true},
		{"0.0.0.0:443", "[::1]:443", true},
		{"[::]:443", "10.0.0.1:443", true},
		{"127.0.0.1:443", "127.0.0.2:443", false},
		{"127.0.0.1:443", "[::ffff:127.0.0.1]:443", true},
		{"[::1]:443", "[0:0:0:0:0:0:0:1]:443", true},
		{"EDGE.test:443", "edge.test:443", true},
		{":0", ":0", false},
		{"443", "443", false},
	} {
		snapshot := resealv1.NewSnapshot("c", 1, []*resealv1.Resource{listenerAt("a", test.a, nil), listenerAt("b", test.b, nil)})
		for view, check := range map[string]func(*resealv1.Snapshot) []*resealv1.Violation{"configuration": Configuration, "selection": Selection} {
			violations := check(snapshot)
			got := len(violations) == 1 && violations[0].GetResource().GetName() == "b" && violations[0].GetField() == "spec.address"
			if got != test.want || len(violations) > 1 {
				t.Errorf("%s: %s and %s: %v", view, test.a, test.b, violations)
			}
		}
	}
}

// Listeners on one address are refused at apply when the edges of the one are all
// edges of the other, and by the edge in any case.
func TestAddressesOfDifferentEdges(t *testing.T) {
	labels := func(pairs ...string) map[string]string {
		all := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			all[pairs[i]] = pairs[i+1]
		}
		return all
	}
	for _, test := range []struct {
		a, b map[string]string
		want bool
	}{
		{nil, labels("site", "a"), true},
		{labels("site", "a"), labels("site", "a"), true},
		{labels("site", "a"), labels("site", "a", "role", "b"), true},
		{labels("site", "a", "role", "b"), labels("role", "b"), true},
		{labels("site", "a"), labels("site", "b"), false},
		{labels("site", "a"), labels("role", "b"), false},
		{labels("site", "a", "role", "c"), labels("site", "a", "role", "b"), false},
	} {
		snapshot := resealv1.NewSnapshot("c", 1, []*resealv1.Resource{listenerAt("a", ":1", test.a), listenerAt("b", ":1", test.b)})
		if got := len(Configuration(snapshot)) == 1; got != test.want {
			t.Errorf("apply of %v beside %v: refused %t", test.a, test.b, got)
		}
		if len(Selection(snapshot)) != 1 {
			t.Errorf("%v beside %v: an edge that has both takes them", test.a, test.b)
		}
	}
}

// An edge does not miss what only other edges hold.
func TestSelectionIsPartOfTheWhole(t *testing.T) {
	resources := []*resealv1.Resource{
		listenerAt("here", ":1", nil),
		{Metadata: &resealv1.Metadata{Name: "p"}, Spec: &resealv1.Resource_TlsPolicy{TlsPolicy: &resealv1.TLSPolicy{Resumption: &resealv1.Resumption{Keyring: "elsewhere"}}}},
		{Metadata: &resealv1.Metadata{Name: "r"}, Spec: &resealv1.Resource_Route{Route: &resealv1.Route{
			Listeners: []string{"here", "there"}, Pools: []*resealv1.WeightedPool{{Name: "gone"}},
		}}},
		{Metadata: &resealv1.Metadata{Name: "s"}, Spec: &resealv1.Resource_Route{Route: &resealv1.Route{
			Listeners: []string{"there"}, Pools: []*resealv1.WeightedPool{{Name: "gone"}},
		}}},
	}
	var got []string
	for _, violation := range Selection(resealv1.NewSnapshot("c", 1, resources)) {
		got = append(got, violation.Text())
	}
	if want := `[Route/r: spec.pools[0].name: BackendPool "gone" does not exist]`; fmt.Sprint(got) != want {
		t.Errorf("%v", got)
	}
	if n := len(Configuration(resealv1.NewSnapshot("c", 1, resources))); n != 5 {
		t.Errorf("%d violations of the whole", n)
	}
}
