package tally

import (
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Assignments remembers which pools and listeners labels select, for the newest
// configuration. The zero value is ready.
type Assignments struct {
	mu       sync.Mutex
	revision int64
	byLabels map[string]assignment
}

type assignment struct{ pools, listeners map[string]bool }

// maxAssignments bounds the sets of labels that are remembered.
const maxAssignments = 1024

// Of returns the names of the pools and listeners of an edge with these labels;
// nil labels stand for any: all that there are. The results must not be changed.
func (a *Assignments) Of(snapshot *resealv1.Snapshot, labels map[string]string) (pools, listeners map[string]bool) {
	key := "any"
	if labels != nil {
		var text strings.Builder
		for _, name := range slices.Sorted(maps.Keys(labels)) {
			text.WriteString(name + "\x00" + labels[name] + "\x00")
		}
		key = "=" + text.String()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byLabels == nil || a.revision != snapshot.Revision() || len(a.byLabels) >= maxAssignments {
		a.revision, a.byLabels = snapshot.Revision(), map[string]assignment{}
	}
	found, ok := a.byLabels[key]
	if !ok {
		found = assign(snapshot, labels)
		a.byLabels[key] = found
	}
	return found.pools, found.listeners
}

func assign(snapshot *resealv1.Snapshot, labels map[string]string) assignment {
	made := assignment{pools: map[string]bool{}, listeners: map[string]bool{}}
	for _, resource := range snapshot.Kind("Listener") {
		if labels == nil || fleet.Selects(resource.GetListener().GetEdgeSelector(), labels) {
			made.listeners[resource.GetMetadata().GetName()] = true
			made.pools[resource.GetListener().GetPool()] = true
		}
	}
	for _, resource := range snapshot.Kind("Route") {
		route := resource.GetRoute()
		if slices.ContainsFunc(route.GetListeners(), func(name string) bool { return made.listeners[name] }) {
			for _, pool := range route.GetPools() {
				made.pools[pool.GetName()] = true
			}
		}
	}
	delete(made.pools, "")
	return made
}
