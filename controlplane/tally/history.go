package tally

import (
	"maps"
	"slices"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxSince is the longest window.
	maxSince = time.Hour
	// sampleInterval is the resolution of windows.
	sampleInterval = 5 * time.Second
	// maxCells bounds the counters that are kept for windows, of all edges. At
	// some 300 bytes each, at most, that is about 75 MB. Over it windows get
	// shorter.
	maxCells = 250_000

	// maxReports bounds the history of an edge, also of one that restarts again
	// and again.
	maxReports = 1024
	// maxPerReport bounds the pools and the listeners of a report.
	maxPerReport = 5000
	// maxName is the longest name, in bytes.
	maxName = 253
)

// report is what an edge counted until a moment. It is immutable.
type report struct {
	at        time.Time // on this replica's clock
	bootID    string
	pools     []*packed // sorted by name
	listeners []*packed
	cells     int // what it costs to keep: itself, and counters that the one kept before does not hold
}

// newReport makes a report of what was heard and of the counters in it. A partial one
// builds on last, the previous report on the stream. What has not changed since the
// report that was kept before is shared with it.
func newReport(h heard, pools, listeners []*packed, at time.Time, last, before *report) *report {
	made := &report{at: at, bootID: h.bootID, cells: 1}
	if before == nil {
		before = &report{}
	}
	if !h.partial || last == nil {
		last = &report{}
	}
	made.pools = made.take(pools, last.pools, before.pools)
	made.listeners = made.take(listeners, last.listeners, before.listeners)
	return made
}

// sorted sorts by name and keeps the first of each.
func sorted(all []*packed) []*packed {
	slices.SortStableFunc(all, comparePacked)
	return slices.CompactFunc(all, func(a, b *packed) bool { return a.name == b.name })
}

// take returns what was reported and what stands beside it, sorted.
func (r *report) take(reported, stand, before []*packed) []*packed {
	if len(reported) == 0 && slices.Equal(stand, before) {
		return before
	}
	taken := reported
	if len(stand) > 0 {
		taken = sorted(slices.Concat(reported, stand))
	}
	taken = slices.Clip(taken[:min(len(taken), maxPerReport)])
	changed := 0
	for i, p := range taken {
		if same := byName(before, p.name.Value()); same != nil && same.equal(p) {
			taken[i] = same
			continue
		}
		changed += p.cells()
	}
	if slices.Equal(taken, before) {
		return before
	}
	r.cells += changed + len(taken)/listCells
	return taken
}

// listCells is how many pointers to counters cost as much as a cell.
const listCells = 32

// history are the reports of an edge that windows start from, oldest first.
type history []*report

// keep adds a report if its time slot has none yet, and returns how many cells that
// costs. While nothing changes, only the first and the newest report are kept.
func (h history) keep(r *report) (history, int) {
	last := h.last()
	switch {
	case last != nil && slot(last.at) == slot(r.at) && last.bootID == r.bootID:
		return h, 0
	case len(h) > 1 && r.same(last) && last.same(h[len(h)-2]):
		h[len(h)-1] = r
		return h, r.cells - last.cells
	}
	return append(h, r), r.cells
}

// same says whether nothing was counted between two reports, which share what has not
// changed.
func (r *report) same(other *report) bool {
	return r.bootID == other.bootID && slices.Equal(r.pools, other.pools) && slices.Equal(r.listeners, other.listeners)
}

// last is nil when there is none yet.
func (h history) last() *report {
	if len(h) == 0 {
		return nil
	}
	return h[len(h)-1]
}

func slot(at time.Time) int64 { return at.UnixNano() / int64(sampleInterval) }

// trim drops what no window can start from. Of what is older than the longest
// window one report stays, the base of that window.
func (h history) trim(now time.Time) (kept, dropped history) {
	first := max(0, len(h)-maxReports)
	for first+1 < len(h) && now.Sub(h[first+1].at) >= maxSince {
		first++
	}
	return h[first:], h[:first]
}

// window returns what an edge counted from start until its newest report. What an
// earlier process of the edge counted in it is included, and a process that
// started in it counts from 0. A window that reaches beyond the history starts
// with the history; from is where it does. An empty name stands for all.
func (h history) window(words *vocabularies, newest *report, start time.Time, name string) (pools, listeners totals, from time.Time) {
	pools, listeners = totals{}, totals{}
	reports := append(slices.Clip(h), newest)
	first := 0
	for first+1 < len(reports) && !reports[first+1].at.After(start) {
		first++
	}
	base := reports[first]
	from = base.at
	if first+1 < len(reports) && base.same(reports[first+1]) && start.After(from) {
		from = start // nothing was counted in between
	}
	for i := first; i < len(reports); i++ {
		r := reports[i]
		if i+1 < len(reports) && reports[i+1].bootID == r.bootID {
			continue
		}
		// r is the last report of its process.
		pools.addSince(words, only(r.pools, name), base.pools, r == newest)
		listeners.addSince(words, only(r.listeners, name), base.listeners, r == newest)
		base = &report{}
	}
	return pools, listeners, from
}

// only are the counters of one name, or all when it is empty.
func only(all []*packed, name string) []*packed {
	if name == "" {
		return all
	}
	if p := byName(all, name); p != nil {
		return []*packed{p}
	}
	return nil
}

// totals are sums by name. Nothing else holds any part of them.
type totals map[string]*counters

func (t totals) add(c *counters) { t[c.name] = t[c.name].add(c) }

// addPacked adds parts of packed counters. It allocates nothing for names and keys that
// were added before.
func (t totals) addPacked(words *vocabularies, all []*packed, what parts) {
	for _, p := range all {
		name := p.name.Value()
		if t[name] == nil {
			t[name] = &counters{name: name}
		}
		words.addTo(t[name], p, what)
	}
}

// addSince adds what was counted after base. Gauges count only now.
func (t totals) addSince(words *vocabularies, all, base []*packed, now bool) {
	for _, p := range all {
		grown, before := words.unpack(p), byName(base, p.name.Value())
		if before != nil {
			grown = grown.since(words.unpack(before))
		}
		if !now {
			grown.active, grown.idle, grown.budget = 0, 0, 0
		}
		t.add(grown)
	}
}

// stats are the totals sorted by name.
func (t totals) stats() []*resealv1.Stats {
	var stats []*resealv1.Stats
	for _, name := range slices.Sorted(maps.Keys(t)) {
		stats = append(stats, t[name].stats())
	}
	return stats
}
