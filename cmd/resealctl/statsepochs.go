package main

import (
	"cmp"
	"fmt"
	"slices"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// shownEpochs is how many epochs have a line of their own in a table.
const shownEpochs = 4

// epochStatsView is what became of the tickets of one epoch.
type epochStatsView struct {
	Keyring string            `json:"keyring"`
	Epoch   uint64            `json:"epoch"`
	Resumed uint64            `json:"resumed"`
	Misses  map[string]uint64 `json:"misses"`
}

func viewEpochs(epochs []*resealv1.EpochStats) []epochStatsView {
	var views []epochStatsView
	for _, e := range epochs {
		views = append(views, epochStatsView{e.GetKeyring(), e.GetEpoch(), e.GetResumed(), orEmpty(e.GetMisses())})
	}
	return views
}

// epochLines say how the tickets of each epoch fared, the newest first. Epochs
// whose tickets were opened come before those that only clients speak of.
func epochLines(epochs []*resealv1.EpochStats) []string {
	newest := slices.SortedFunc(slices.Values(epochs), func(a, b *resealv1.EpochStats) int {
		return cmp.Or(cmp.Compare(min(opened(b), 1), min(opened(a), 1)),
			cmp.Compare(b.GetEpoch(), a.GetEpoch()), cmp.Compare(a.GetKeyring(), b.GetKeyring()))
	})
	var lines []string
	var older, other fared
	for _, e := range newest {
		switch {
		case e.GetEpoch() == 0:
			other.add(e)
		case len(lines) < shownEpochs:
			lines = append(lines, fmt.Sprintf("tickets of epoch %d (%s): %s", e.GetEpoch(), e.GetKeyring(), faredText(e.GetResumed(), e.GetMisses())))
		default:
			older.add(e)
		}
	}
	if older.epochs > 0 {
		lines = append(lines, fmt.Sprintf("tickets of %d other epochs: %s", older.epochs, faredText(older.resumed, older.misses)))
	}
	if other.epochs > 0 {
		lines = append(lines, "other tickets: "+faredText(other.resumed, other.misses))
	}
	return lines
}

// opened is how many tickets of an epoch were opened, which proves that it exists.
func opened(e *resealv1.EpochStats) uint64 {
	return e.GetResumed() + e.GetMisses()[resealv1.Label(resealv1.MissReason_MISS_REASON_EXPIRED)] +
		e.GetMisses()[resealv1.Label(resealv1.MissReason_MISS_REASON_REFUSED)]
}

// fared is a sum over epochs.
type fared struct {
	epochs  int
	resumed uint64
	misses  map[string]uint64
}

func (f *fared) add(e *resealv1.EpochStats) {
	if f.misses == nil {
		f.misses = map[string]uint64{}
	}
	f.epochs++
	f.resumed += e.GetResumed()
	for reason, n := range e.GetMisses() {
		f.misses[reason] += n
	}
}

func faredText(resumed uint64, misses map[string]uint64) string {
	all := resumed + total(misses)
	if all == 0 {
		return "none offered"
	}
	text := fmt.Sprintf("%d of %d resumed (%s%%)", resumed, all, percent(resumed, all))
	if reasons := counted(misses); reasons != "" {
		text += "; " + reasons
	}
	return text
}

// unknownKeys are the edges that saw tickets of epochs that they don't know, on a
// listener: those that lag behind the fleet. Other tickets, which may be those of
// another product's servers, don't count.
func unknownKeys(edges []*resealv1.EdgeStats, listener string) map[string]uint64 {
	label := resealv1.Label(resealv1.MissReason_MISS_REASON_KEY_UNKNOWN)
	unknown := map[string]uint64{}
	for _, edge := range edges {
		for _, stats := range edge.GetListeners() {
			if stats.GetName() != listener {
				continue
			}
			for _, epoch := range stats.GetEpochs() {
				if n := epoch.GetMisses()[label]; n > 0 && epoch.GetEpoch() > 0 {
					unknown[edge.GetEdge()] += n
				}
			}
		}
	}
	return unknown
}
