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

// epochLines say how the tickets of each epoch fared, the newest first.
func epochLines(epochs []*resealv1.EpochStats) []string {
	newest := slices.SortedFunc(slices.Values(epochs), func(a, b *resealv1.EpochStats) int {
		return cmp.Or(cmp.Compare(b.GetEpoch(), a.GetEpoch()), cmp.Compare(a.GetKeyring(), b.GetKeyring()))
	})
	var lines []string
	older, olderMisses, rest := uint64(0), map[string]uint64{}, 0
	for i, e := range newest {
		switch {
		case e.GetEpoch() == 0:
			lines = append(lines, "tickets of no known epoch: "+counted(e.GetMisses()))
		case i < shownEpochs:
			lines = append(lines, fmt.Sprintf("tickets of epoch %d (%s): %s", e.GetEpoch(), e.GetKeyring(), faredText(e.GetResumed(), e.GetMisses())))
		default:
			rest++
			older += e.GetResumed()
			for reason, n := range e.GetMisses() {
				olderMisses[reason] += n
			}
		}
	}
	if rest > 0 {
		lines = slices.Insert(lines, shownEpochs, fmt.Sprintf("tickets of %d older: %s", rest, faredText(older, olderMisses)))
	}
	return lines
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

// unknownKeys are the edges that saw tickets of keys that they don't know, on a
// listener: one that lags behind the fleet, or selects other keyrings.
func unknownKeys(edges []*resealv1.EdgeStats, listener string) map[string]uint64 {
	label := resealv1.Label(resealv1.MissReason_MISS_REASON_KEY_UNKNOWN)
	var unknown map[string]uint64
	for _, edge := range edges {
		for _, stats := range edge.GetListeners() {
			if n := stats.GetMisses()[label]; n > 0 && stats.GetName() == listener {
				if unknown == nil {
					unknown = map[string]uint64{}
				}
				unknown[edge.GetEdge()] += n
			}
		}
	}
	return unknown
}
