package sessions

import (
	"maps"
	"slices"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// SharedPools are the names of the pools with sharing: fleet that an edge with
// these labels needs: those of the listeners that select it, and of the routes of
// those listeners. Sorted.
func SharedPools(snapshot *resealv1.Snapshot, labels map[string]string) []string {
	selected, shared := map[string]bool{}, map[string]bool{}
	add := func(name string) {
		pool := snapshot.Get("BackendPool", name).GetBackendPool()
		if pool.GetSessions().GetSharing() == resealv1.Sessions_SHARING_FLEET {
			shared[name] = true
		}
	}
	for _, resource := range snapshot.Kind("Listener") {
		if fleet.Selects(resource.GetListener().GetEdgeSelector(), labels) {
			selected[resource.GetMetadata().GetName()] = true
			add(resource.GetListener().GetPool())
		}
	}
	for _, resource := range snapshot.Kind("Route") {
		route := resource.GetRoute()
		if slices.ContainsFunc(route.GetListeners(), func(name string) bool { return selected[name] }) {
			for _, pool := range route.GetPools() {
				add(pool.GetName())
			}
		}
	}
	return slices.Sorted(maps.Keys(shared))
}
