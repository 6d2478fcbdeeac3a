package resealv1

import "slices"

// maxSilent bounds the edges that are named because they don't answer.
const maxSilent = 1000

// SetSilent names the edges that don't answer, sorted, as many as may be named.
func (f *ObservedFleet) SetSilent(edges []string) {
	slices.Sort(edges)
	f.SilentEdges = edges[:min(len(edges), maxSilent)]
}
