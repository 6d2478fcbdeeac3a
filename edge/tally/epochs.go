package tally

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxEpochs bounds the epochs of a listener that are counted apart. With an hour
// between rotations and tickets that live for twelve there are fourteen.
const maxEpochs = 64

// epochKey names an epoch. Number 0 is of no keyring's epoch.
type epochKey struct {
	keyring string
	number  uint64
}

func (k epochKey) compare(other epochKey) int {
	return cmp.Or(cmp.Compare(k.keyring, other.keyring), cmp.Compare(k.number, other.number))
}

// epochs counts what became of clients' tickets by the epoch that they name. The
// lock is held for a map's look-up, beside a handshake.
type epochs struct {
	mu     sync.Mutex
	counts map[epochKey]*epochCount
	ticks  uint64 // tickets so far
}

// epochCount counts the tickets of one epoch.
type epochCount struct {
	outcomes [misses]uint64 // place 0: resumed
	last     uint64         // the tick of the last one
	proven   bool           // one has opened, so that the epoch exists
}

// proves reports whether a ticket with this outcome has opened. Until then its
// number is what a stranger says.
func proves(miss resealv1.MissReason) bool {
	return miss == 0 || miss == resealv1.MissReason_MISS_REASON_EXPIRED || miss == resealv1.MissReason_MISS_REASON_REFUSED
}

// Ticket counts a handshake for which a ticket of an epoch was offered. A zero
// miss means that it was resumed. When there are too many epochs, one is dropped.
func (l *Listener) Ticket(keyring string, epoch uint64, miss resealv1.MissReason) {
	if miss < 0 || int(miss) >= misses {
		return
	}
	e := &l.epochs
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ticks++
	count := e.count(epochKey{keyring, epoch}, proves(miss))
	count.outcomes[miss]++
	count.last = e.ticks
	count.proven = count.proven || proves(miss)
}

// count finds or makes the counter of an epoch. When all places are taken by
// epochs that exist, a ticket that proves nothing is counted under number 0.
func (e *epochs) count(key epochKey, proven bool) *epochCount {
	if count := e.counts[key]; count != nil {
		return count
	}
	if key.number != 0 && len(e.counts) >= maxEpochs {
		least := e.least()
		if e.counts[least].proven && !proven {
			return e.count(epochKey{key.keyring, 0}, false)
		}
		delete(e.counts, least)
	}
	if e.counts == nil {
		e.counts = map[epochKey]*epochCount{}
	}
	if key.number == 0 { // not among those that make room, so there is one
		maps.DeleteFunc(e.counts, func(other epochKey, _ *epochCount) bool { return other.number == 0 })
	}
	count := &epochCount{}
	e.counts[key] = count
	return count
}

// least is the epoch that matters least: one that nothing proves, else the one
// whose last ticket is the longest ago.
func (e *epochs) least() epochKey {
	var least epochKey
	var chosen *epochCount
	for key, count := range e.counts {
		if key.number == 0 {
			continue
		}
		if chosen == nil || count.proven == chosen.proven && count.last < chosen.last || !count.proven && chosen.proven {
			least, chosen = key, count
		}
	}
	return least
}

// stats are the epochs sorted by keyring and number.
func (e *epochs) stats() []*resealv1.EpochStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []*resealv1.EpochStats
	for _, key := range slices.SortedFunc(maps.Keys(e.counts), epochKey.compare) {
		count := e.counts[key]
		stats := &resealv1.EpochStats{Keyring: key.keyring, Epoch: key.number, Resumed: count.outcomes[0], Misses: map[string]uint64{}}
		for miss := 1; miss < misses; miss++ {
			if n := count.outcomes[miss]; n > 0 {
				stats.Misses[missLabel(miss)] = n
			}
		}
		all = append(all, stats)
	}
	return all
}
