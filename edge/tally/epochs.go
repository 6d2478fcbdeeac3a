package tally

import (
	"cmp"
	"slices"
	"sync"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// This many epochs of a listener are counted separately. Tickets live for
// retireAfter, half a day by default, so that there are fourteen with an hour
// between rotations and fifty with a quarter of one.
const (
	maxProven = 56 // epochs of which a ticket has opened
	// maxNamed bounds the others. They have places of their own: anybody can name
	// numbers, and an edge that lags behind must still show on which ones.
	maxNamed = 8
)

// misses is how many values resealv1.MissReason has.
const misses = int(resealv1.MissReason_MISS_REASON_REFUSED) + 1

func missLabel(miss int) string {
	return exchange.Full.Labels[0].Values[miss]
}

// epochKey names an epoch.
type epochKey struct {
	keyring string
	number  uint64
}

// epochs counts what became of clients' tickets by the epoch that they name. The
// lock is held for a map's look-up, beside a handshake.
type epochs struct {
	mu     sync.Mutex
	proven map[epochKey]*epochCount // epochs of which a ticket has opened
	named  map[epochKey]*epochCount // others
	other  epochCount               // number 0: tickets of neither
	ticks  uint64                   // tickets so far
}

func newEpochs() *epochs {
	return &epochs{proven: map[epochKey]*epochCount{}, named: map[epochKey]*epochCount{}}
}

// epochCount counts the tickets of one epoch.
type epochCount struct {
	outcomes [misses]uint64 // place 0: resumed
	last     uint64         // the tick of the last one
}

// proves reports whether a ticket with this outcome has opened. Until then its
// number is what a stranger says.
func proves(miss resealv1.MissReason) bool {
	return miss == 0 || miss == resealv1.MissReason_MISS_REASON_EXPIRED || miss == resealv1.MissReason_MISS_REASON_REFUSED
}

// Ticket counts a handshake for which a ticket of an epoch was offered. A zero
// miss means that it was resumed. When there are too many epochs, the one whose
// last ticket was longest ago is given up and what it had is added to number 0:
// the counters never go back in sum.
func (c *Counters) Ticket(keyring string, epoch uint64, miss resealv1.MissReason) {
	if miss < 0 || int(miss) >= misses || c.epochs == nil {
		return
	}
	e := c.epochs
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ticks++
	count := e.count(epochKey{keyring, epoch}, proves(miss))
	count.outcomes[miss]++
	count.last = e.ticks
}

// count finds or makes the counter of an epoch. With its first ticket that opens,
// an epoch moves to the proven ones.
func (e *epochs) count(key epochKey, proven bool) *epochCount {
	if key.number == 0 {
		return &e.other
	}
	if count := e.proven[key]; count != nil {
		return count
	}
	count := e.named[key]
	if count != nil && !proven {
		return count
	}
	if count == nil {
		count = &epochCount{}
	}
	if proven {
		delete(e.named, key)
		e.makeRoom(e.proven, maxProven)
		e.proven[key] = count
	} else {
		e.makeRoom(e.named, maxNamed)
		e.named[key] = count
	}
	return count
}

// makeRoom gives an epoch up when there are as many as the limit.
func (e *epochs) makeRoom(counts map[epochKey]*epochCount, limit int) {
	if len(counts) < limit {
		return
	}
	var least epochKey
	for key, count := range counts {
		if counts[least] == nil || count.last < counts[least].last {
			least = key
		}
	}
	for miss, n := range counts[least].outcomes {
		e.other.outcomes[miss] += n
	}
	delete(counts, least)
}

// stats are those of the epochs, sorted by keyring and number.
func (e *epochs) stats() []*resealv1.EpochStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []*resealv1.EpochStats
	if e.other.outcomes != [misses]uint64{} {
		all = append(all, e.other.stats(epochKey{}))
	}
	for _, counts := range []map[epochKey]*epochCount{e.proven, e.named} {
		for key, count := range counts {
			all = append(all, count.stats(key))
		}
	}
	slices.SortFunc(all, func(a, b *resealv1.EpochStats) int {
		return cmp.Or(cmp.Compare(a.GetKeyring(), b.GetKeyring()), cmp.Compare(a.GetEpoch(), b.GetEpoch()))
	})
	return all
}

func (c *epochCount) stats(key epochKey) *resealv1.EpochStats {
	stats := &resealv1.EpochStats{Keyring: key.keyring, Epoch: key.number, Resumed: c.outcomes[0], Misses: map[string]uint64{}}
	for miss := 1; miss < misses; miss++ {
		if n := c.outcomes[miss]; n > 0 {
			stats.Misses[missLabel(miss)] = n
		}
	}
	return stats
}
