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

// epochLines say how the tickets of each epoch fared, the newest first. Epochs of
// which tickets opened come before those that only clients speak of.
func epochLines(epochs []*resealv1.EpochStats) []string {
	newest := slices.SortedFunc(slices.Values(epochs), func(a, b *resealv1.EpochStats) int {
		return cmp.Or(cmp.Compare(min(b.GetResumed(), 1), min(a.GetResumed(), 1)),
			cmp.Compare(b.GetEpoch(), a.GetEpoch()), cmp.Compare(a.GetKeyring(), b.GetKeyring()))
	})
	var lines []string
	rest, resumed, misses, strange := 0, uint64(0), map[string]uint64{}, map[string]uint64{}
	for _, e := range newest {
		switch {
		case e.GetEpoch() == 0:
			addCounts(strange, e.GetMisses())
		case len(lines) < shownEpochs:
			lines = append(lines, fmt.Sprintf("tickets of epoch %d (%s): %s", e.GetEpoch(), e.GetKeyring(), faredText(e.GetResumed(), e.GetMisses())))
		default:
			rest++
			resumed += e.GetResumed()
			addCounts(misses, e.GetMisses())
		}
	}
	if rest > 0 {
		lines = append(lines, fmt.Sprintf("tickets of %d other epochs: %s", rest, faredText(resumed, misses)))
	}
	if len(strange) > 0 {
		lines = append(lines, "tickets of no known epoch: "+counted(strange))
	}
	return lines
}

func addCounts(to, from map[string]uint64) {
	for key, n := range from {
		to[key] += n
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
// listener: one that lags behind the fleet, or selects other keyrings. Tickets that
// are none of the keyring's, as of another product's servers, don't count.
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
