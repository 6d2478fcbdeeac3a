package tally

import (
	"cmp"
	"slices"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Places of the plain counters.
const (
	requests = iota
	full
	resumedSessionID
	resumedTicket
	resumedPSK
	failed
	opened
	reused
	plain
)

// Places of the counters that are divided by a key.
const (
	byError = iota
	byMiss
	byClose
	byCloser
	byAnswer
	byWait
	divided
)

// counters are the counters of one pool or listener, to add up and to compare. Reports
// keep them packed.
type counters struct {
	name   string
	plain  [plain]uint64
	active int64
	idle   int64
	budget int64            // the edge's share of it
	shares [divided][]share // sorted by key
	epochs []*epoch         // sorted; listeners have them
}

type share struct {
	key   string
	count uint64
}

func (c *counters) stats() *resealv1.Stats {
	return &resealv1.Stats{
		Name:     c.name,
		Requests: c.plain[requests],
		Errors:   toMap(c.shares[byError]),
		Handshakes: &resealv1.Handshakes{
			Full: c.plain[full], ResumedSessionId: c.plain[resumedSessionID], ResumedTicket: c.plain[resumedTicket],
			ResumedPsk: c.plain[resumedPSK], Failed: c.plain[failed],
		},
		Misses: toMap(c.shares[byMiss]),
		Connections: &resealv1.ConnectionStats{
			Opened: c.plain[opened], Reused: c.plain[reused], Active: c.active, Idle: c.idle, Share: c.budget,
		},
		Closes:   toMap(c.shares[byClose]),
		ClosesBy: toMap(c.shares[byCloser]),
		Answers:  toMap(c.shares[byAnswer]),
		Waits:    toMap(c.shares[byWait]),
		Epochs:   toEpochs(c.epochs),
	}
}

func toMap(shares []share) map[string]uint64 {
	counts := make(map[string]uint64, len(shares))
	for _, s := range shares {
		counts[s.key] = s.count
	}
	return counts
}

// plus is the sum of two counts.
func plus(a, b uint64) uint64 { return a + b }

// add returns the sum. The receiver may be nil.
func (c *counters) add(other *counters) *counters {
	if c == nil {
		c = &counters{name: other.name}
	}
	total := &counters{name: c.name, active: c.active + other.active, idle: c.idle + other.idle, budget: c.budget + other.budget}
	for i := range total.plain {
		total.plain[i] = c.plain[i] + other.plain[i]
	}
	for i := range total.shares {
		total.shares[i] = merge(c.shares[i], other.shares[i], plus)
	}
	total.epochs = mergeEpochs(c.epochs, other.epochs, plus)
	return total
}

// since returns what was counted after base, a nil base being all 0. A counter
// that is below base was started again meanwhile, and so were all.
func (c *counters) since(base *counters) *counters {
	if base == nil || c.below(base) {
		return c
	}
	grown := &counters{name: c.name, active: c.active, idle: c.idle, budget: c.budget}
	for i := range grown.plain {
		grown.plain[i] = c.plain[i] - base.plain[i]
	}
	for i := range grown.shares {
		grown.shares[i] = merge(c.shares[i], base.shares[i], func(a, b uint64) uint64 { return a - b })
	}
	grown.epochs = epochsSince(c.epochs, base.epochs)
	return grown
}

// below reports whether a counter is lower than before. Those of epochs do not
// count: edges give old ones up.
func (c *counters) below(base *counters) bool {
	for i := range c.plain {
		if c.plain[i] < base.plain[i] {
			return true
		}
	}
	for i := range c.shares {
		if anyBelow(c.shares[i], base.shares[i]) {
			return true
		}
	}
	return false
}

// anyBelow reports whether a share is lower than before.
func anyBelow(shares, before []share) bool {
	return slices.ContainsFunc(before, func(s share) bool { return find(shares, s.key) < s.count })
}

func find(shares []share, key string) uint64 {
	i, ok := slices.BinarySearchFunc(shares, key, compareKeys)
	if !ok {
		return 0
	}
	return shares[i].count
}

func compareKeys(s share, key string) int { return cmp.Compare(s.key, key) }

// merge combines sorted lists. A key that is missing counts 0, and a result of
// 0 is left out.
func merge(a, b []share, combine func(a, b uint64) uint64) []share {
	merged := make([]share, 0, max(len(a), len(b)))
	put := func(key string, count uint64) {
		if count > 0 {
			merged = append(merged, share{key, count})
		}
	}
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && a[0].key < b[0].key:
			put(a[0].key, combine(a[0].count, 0))
			a = a[1:]
		case len(a) == 0 || b[0].key < a[0].key:
			put(b[0].key, combine(0, b[0].count))
			b = b[1:]
		default:
			put(a[0].key, combine(a[0].count, b[0].count))
			a, b = a[1:], b[1:]
		}
	}
	return merged
}
