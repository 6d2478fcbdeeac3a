package tally

import (
	"cmp"
	"slices"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxEpochs bounds the epochs of a listener that are taken from a report: more than
// the 65 that an edge sends, number 0 included.
const maxEpochs = 72

// epoch is what became of the tickets of one epoch; number 0, of no keyring, is that
// of other tickets.
type epoch struct {
	keyring string
	number  uint64
	resumed uint64
	misses  []share // sorted by key
}

func compareEpochs(a, b *epoch) int {
	return cmp.Or(cmp.Compare(a.keyring, b.keyring), cmp.Compare(a.number, b.number))
}

// toEpochs are the epochs as messages.
func toEpochs(epochs []*epoch) []*resealv1.EpochStats {
	var all []*resealv1.EpochStats
	for _, e := range epochs {
		all = append(all, &resealv1.EpochStats{Keyring: e.keyring, Epoch: e.number, Resumed: e.resumed, Misses: toMap(e.misses)})
	}
	return all
}

// epoch returns an epoch of c, new if it has none of this number yet.
func (c *counters) epoch(keyring string, number uint64) *epoch {
	wanted := &epoch{keyring: keyring, number: number}
	i, ok := slices.BinarySearchFunc(c.epochs, wanted, compareEpochs)
	if !ok {
		c.epochs = slices.Insert(c.epochs, i, wanted)
	}
	return c.epochs[i]
}

// epochsSince is what was counted after base. An epoch that is below base was given
// up meanwhile: its edge added it to number 0, and counts anew if it is back. So
// base is moved to number 0 likewise, and the sum is right.
func epochsSince(epochs, base []*epoch) []*epoch {
	var kept []*epoch
	moved := &epoch{}
	for _, e := range base {
		if e.number == 0 || !findEpoch(epochs, e).below(e) {
			kept = append(kept, e)
		} else {
			moved = moved.combine(&epoch{resumed: e.resumed, misses: e.misses}, plus)
		}
	}
	base = mergeEpochs([]*epoch{moved}, kept, plus)
	return mergeEpochs(epochs, base, func(a, b uint64) uint64 { return a - min(a, b) })
}

// findEpoch finds the counters of the same epoch in a sorted list.
func findEpoch(epochs []*epoch, same *epoch) *epoch {
	i, ok := slices.BinarySearchFunc(epochs, same, compareEpochs)
	if !ok {
		return &epoch{}
	}
	return epochs[i]
}

// below reports whether a counter is lower than before.
func (e *epoch) below(before *epoch) bool {
	return e.resumed < before.resumed || anyBelow(e.misses, before.misses)
}

// mergeEpochs combines sorted lists, as merge does.
func mergeEpochs(a, b []*epoch, combine func(a, b uint64) uint64) []*epoch {
	merged := make([]*epoch, 0, max(len(a), len(b)))
	for len(a) > 0 || len(b) > 0 {
		var one, other *epoch
		if len(b) == 0 || len(a) > 0 && compareEpochs(a[0], b[0]) <= 0 {
			one, a = a[0], a[1:]
		}
		if len(b) > 0 && (one == nil || compareEpochs(one, b[0]) == 0) {
			other, b = b[0], b[1:]
		}
		if sum := one.combine(other, combine); sum.resumed > 0 || len(sum.misses) > 0 {
			merged = append(merged, sum)
		}
	}
	return merged
}

// combine combines two counts of an epoch, one of which may be nil.
func (e *epoch) combine(other *epoch, combine func(a, b uint64) uint64) *epoch {
	name := cmp.Or(e, other)
	if e == nil {
		e = &epoch{}
	}
	if other == nil {
		other = &epoch{}
	}
	return &epoch{name.keyring, name.number, combine(e.resumed, other.resumed), merge(e.misses, other.misses, combine)}
}
