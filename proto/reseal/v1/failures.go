package resealv1

import (
	"cmp"
	"slices"
)

const (
	// DefaultFailures is how many failures are listed if a request does not say.
	DefaultFailures = 100
	// MaxFailures is how many may be asked for.
	MaxFailures = 1000
)

// Most is how many failures are asked for.
func (r *ListFailuresRequest) Most() int { return int(cmp.Or(r.GetLimit(), DefaultFailures)) }

// Newest sorts all, the oldest first, and returns a copy of the newest, as many as are
// asked for at most.
func (r *ListFailuresRequest) Newest(all []*Failure) []*Failure {
	slices.SortStableFunc(all, func(a, b *Failure) int { return a.GetTime().AsTime().Compare(b.GetTime().AsTime()) })
	return slices.Clone(all[max(0, len(all)-r.Most()):])
}
