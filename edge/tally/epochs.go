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
const maxEpochs = 24

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
	counts map[epochKey]*[misses]uint64 // place 0: resumed
}

// Ticket counts a handshake for which a ticket of an epoch was offered. A zero
// miss means that it was resumed. When there are too many epochs, those that have
// ended are dropped: the ones of another keyring, then the lowest numbers.
func (l *Listener) Ticket(keyring string, epoch uint64, miss resealv1.MissReason) {
	if miss < 0 || int(miss) >= misses {
		return
	}
	key, e := epochKey{keyring, epoch}, &l.epochs
	e.mu.Lock()
	defer e.mu.Unlock()
	count := e.counts[key]
	if count == nil {
		count = e.add(key)
	}
	count[miss]++
}

// add makes room for a further epoch. One that is older than all that are kept is
// counted under number 0.
func (e *epochs) add(key epochKey) *[misses]uint64 {
	if e.counts == nil {
		e.counts = map[epochKey]*[misses]uint64{}
	}
	if len(e.counts) >= maxEpochs {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(e.counts)), func(a, b epochKey) int {
			return cmp.Or(key.distance(b)-key.distance(a), cmp.Compare(a.number, b.number))
		})
		if oldest.keyring == key.keyring && oldest.number > key.number {
			key.number = 0
		}
		if count := e.counts[key]; count != nil {
			return count
		}
		delete(e.counts, oldest)
	}
	count := new([misses]uint64)
	e.counts[key] = count
	return count
}

// distance is how little another epoch matters beside k: those of another
// keyring are of a policy that the listener had before.
func (k epochKey) distance(other epochKey) int {
	switch {
	case other.keyring != k.keyring:
		return 2
	case other.number > 0:
		return 1
	}
	return 0
}

// stats are the epochs sorted by keyring and number.
func (e *epochs) stats() []*resealv1.EpochStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []*resealv1.EpochStats
	for _, key := range slices.SortedFunc(maps.Keys(e.counts), epochKey.compare) {
		count := e.counts[key]
		stats := &resealv1.EpochStats{Keyring: key.keyring, Epoch: key.number, Resumed: count[0], Misses: map[string]uint64{}}
		for miss := 1; miss < misses; miss++ {
			if count[miss] > 0 {
				stats.Misses[missLabel(miss)] = count[miss]
			}
		}
		all = append(all, stats)
	}
	return all
}
