package sessions

import (
	"slices"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestSharedPools(t *testing.T) {
	resource := func(name string, spec any) *resealv1.Resource {
		r := &resealv1.Resource{Metadata: &resealv1.Metadata{Name: name}}
		switch spec := spec.(type) {
		case *resealv1.Listener:
			r.Spec = &resealv1.Resource_Listener{Listener: spec}
		case *resealv1.Route:
			r.Spec = &resealv1.Resource_Route{Route: spec}
		case *resealv1.BackendPool:
			r.Spec = &resealv1.Resource_BackendPool{BackendPool: spec}
		}
		return r
	}
	pool := func(sharing resealv1.Sessions_Sharing) *resealv1.BackendPool {
		return &resealv1.BackendPool{Sessions: &resealv1.Sessions{Sharing: sharing}}
	}
	west := &resealv1.EdgeSelector{MatchLabels: map[string]string{"site": "west"}}
	fleet := resealv1.Sessions_SHARING_FLEET
	snapshot := resealv1.NewSnapshot("c", 1, []*resealv1.Resource{
		resource("all", &resealv1.Listener{Pool: "default"}),
		resource("west", &resealv1.Listener{EdgeSelector: west, Pool: "alone"}),
		resource("r1", &resealv1.Route{Listeners: []string{"west"}, Pools: []*resealv1.WeightedPool{{Name: "routed"}, {Name: "gone"}}}),
		resource("r2", &resealv1.Route{Listeners: []string{"east"}, Pools: []*resealv1.WeightedPool{{Name: "unused"}}}),
		resource("default", pool(fleet)),
		resource("routed", pool(fleet)),
		resource("unused", pool(fleet)),
		resource("alone", pool(resealv1.Sessions_SHARING_EDGE)),
		resource("bare", &resealv1.BackendPool{}),
	})
	for _, test := range []struct {
		labels map[string]string
		want   []string
	}{
		{nil, []string{"default"}},
		{map[string]string{"site": "east"}, []string{"default"}},
		{map[string]string{"site": "west"}, []string{"default", "routed"}},
	} {
		if got := SharedPools(snapshot, test.labels); !slices.Equal(got, test.want) {
			t.Errorf("%v: %v, want %v", test.labels, got, test.want)
		}
	}
}
