package tally

import (
	"cmp"
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
	// a few hundred bytes each that is about 100 MB. Over it windows get
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
	pools     []*counters // sorted by name
	listeners []*counters
	cells     int // what it costs to keep: itself, and counters that the one kept before does not hold
}

// newReport copies a message, within bounds. A partial one builds on last, the
// previous report on the stream. What has not changed since the report that was kept
// before is shared with it.
func newReport(message *resealv1.ReportRequest, at time.Time, words *vocabularies, last, before *report) *report {
	made := &report{at: at, bootID: message.GetBootId(), cells: 1}
	if before == nil {
		before = &report{}
	}
	if !message.GetPartial() || last == nil {
		last = &report{}
	}
	made.pools = made.take(named(message.GetPools(), words), last.pools, before.pools)
	made.listeners = made.take(named(message.GetListeners(), words), last.listeners, before.listeners)
	return made
}

// named copies what has a name, within bounds, sorted.
func named(all []*resealv1.Stats, words *vocabularies) []*counters {
	taken := make([]*counters, 0, min(len(all), maxPerReport))
	for _, stats := range all {
		if name := stats.GetName(); name != "" && len(name) <= maxName && len(taken) < maxPerReport {
			taken = append(taken, fromStats(stats, words))
		}
	}
	return unique(taken)
}

// unique sorts by name and keeps the first of each.
func unique(all []*counters) []*counters {
	slices.SortStableFunc(all, compareNames)
	return slices.CompactFunc(all, func(a, b *counters) bool { return a.name == b.name })
}

// take returns what was reported and what stands beside it, sorted.
func (r *report) take(reported, stand, before []*counters) []*counters {
	if len(reported) == 0 && slices.Equal(stand, before) {
		return before
	}
	taken := unique(slices.Concat(reported, stand))
	taken = taken[:min(len(taken), maxPerReport)]
	for i, c := range taken {
		changed := len(c.epochs)
		if same := byName(before, c.name); same != nil {
			if same == c || same.equal(c) {
				taken[i] = same
				continue
			}
			changed = shareEpochs(c.epochs, same.epochs)
		}
		r.cells += 1 + (changed+len(c.epochs)/16)/3 // their sizes beside a cell's
	}
	if slices.Equal(taken, before) {
		return before
	}
	return taken
}

func compareNames(a, b *counters) int { return cmp.Compare(a.name, b.name) }

// byName finds counters in a sorted list.
func byName(all []*counters, name string) *counters {
	i, ok := slices.BinarySearchFunc(all, name, func(c *counters, name string) int { return cmp.Compare(c.name, name) })
	if !ok {
		return nil
	}
	return all[i]
}

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
// with the history; from is where it does.
func (h history) window(newest *report, start time.Time) (pools, listeners totals, from time.Time) {
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
		pools.addSince(r.pools, base.pools, r == newest)
		listeners.addSince(r.listeners, base.listeners, r == newest)
		base = &report{}
	}
	return pools, listeners, from
}

// totals are sums by name.
type totals map[string]*counters

func (t totals) add(c *counters) { t[c.name] = t[c.name].add(c) }

// addSince adds what was counted after base. Gauges count only now.
func (t totals) addSince(all, base []*counters, now bool) {
	for _, c := range all {
		grown := c.since(byName(base, c.name))
		if !now {
			still := *grown
			still.active, still.idle = 0, 0
			grown = &still
		}
		t.add(grown)
	}
}

func (t totals) addAll(all []*counters) {
	for _, c := range all {
		t.add(c)
	}
}

// stats are the totals sorted by name, of one name unless it is empty.
func (t totals) stats(name string) []*resealv1.Stats {
	var sorted []*resealv1.Stats
	for _, c := range t {
		if name == "" || c.name == name {
			sorted = append(sorted, c.stats())
		}
	}
	slices.SortFunc(sorted, func(a, b *resealv1.Stats) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return sorted
}
