package tally

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	edgetally "github.com/reseal/reseal/edge/tally"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func epochStats(keyring string, number, resumed uint64, misses map[string]uint64) *resealv1.EpochStats {
	if misses == nil {
		misses = map[string]uint64{}
	}
	return &resealv1.EpochStats{Keyring: keyring, Epoch: number, Resumed: resumed, Misses: misses}
}

func withEpochs(epochs ...*resealv1.EpochStats) *counters {
	return countersOf(&resealv1.Stats{Name: "web", Epochs: epochs}, newVocabularies())
}

func TestEpochs(t *testing.T) {
	unknown := map[string]uint64{"key_unknown": 3}
	a := withEpochs(epochStats("default", 9, 5, nil), epochStats("default", 10, 7, unknown), epochStats("a/b", 1, 1, nil), epochStats("default", 11, 0, nil))
	b := withEpochs(epochStats("default", 10, 1, nil), epochStats("default", 12, 2, nil))
	want := []*resealv1.EpochStats{
		epochStats("a/b", 1, 1, nil), epochStats("default", 9, 5, nil), epochStats("default", 10, 8, unknown), epochStats("default", 12, 2, nil),
	}
	if diff := cmp.Diff(want, a.add(b).stats().GetEpochs(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	later := withEpochs(epochStats("default", 9, 5, nil), epochStats("default", 10, 9, unknown), epochStats("default", 11, 1, nil), epochStats("a/b", 1, 1, nil))
	want = []*resealv1.EpochStats{epochStats("default", 10, 2, nil), epochStats("default", 11, 1, nil)}
	if diff := cmp.Diff(want, later.since(a).stats().GetEpochs(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// What an edge has forgotten since is nothing, and no restart.
func TestEpochsThatWereForgotten(t *testing.T) {
	unknown := map[string]uint64{"key_unknown": 3}
	base := withEpochs(epochStats("default", 9, 5, nil), epochStats("default", 10, 7, unknown), epochStats("a/b", 1, 1, nil), epochStats("default", 11, 0, nil))
	later := withEpochs(epochStats("default", 10, 9, unknown), epochStats("default", 11, 1, nil))
	want := []*resealv1.EpochStats{epochStats("default", 10, 2, nil), epochStats("default", 11, 1, nil)}
	if diff := cmp.Diff(want, later.since(base).stats().GetEpochs(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// Edges give epochs up for others and add them to number 0. What they had before the
// window is not counted in it.
func TestEpochsThatWereGivenUp(t *testing.T) {
	expired := map[string]uint64{"expired": 2}
	base := withEpochs(epochStats("", 0, 5, nil), epochStats("default", 7, 100, expired), epochStats("default", 8, 50, nil), epochStats("default", 9, 10, nil))
	// 7 went with three more than before, 8 as it was, and came back.
	later := withEpochs(epochStats("", 0, 159, expired), epochStats("default", 8, 4, nil), epochStats("default", 9, 11, nil))
	want := []*resealv1.EpochStats{epochStats("", 0, 4, nil), epochStats("default", 8, 4, nil), epochStats("default", 9, 1, nil)}
	if diff := cmp.Diff(want, later.since(base).stats().GetEpochs(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// In any window the epochs add up to the tickets that were offered in it.
func TestEpochsAddUp(t *testing.T) {
	words := newVocabularies()
	outcomes := []resealv1.MissReason{0, resealv1.MissReason_MISS_REASON_EXPIRED, resealv1.MissReason_MISS_REASON_KEY_UNKNOWN}
	rapid.Check(t, func(t *rapid.T) {
		edge := edgetally.New(nil)
		offer := func() map[string]uint64 {
			offered := map[string]uint64{}
			from, many := rapid.Uint64Range(0, 200).Draw(t, "from"), rapid.Uint64Range(0, 200).Draw(t, "many")
			for number := range many {
				miss := rapid.SampledFrom(outcomes).Draw(t, "miss")
				edge.Listener("web").Ticket("default", from+number, miss)
				offered[resealv1.Label(miss)]++
			}
			return offered
		}
		read := func() *counters { return countersOf(edge.Report("a", "1", 0).GetListeners()[0], words) }
		edge.Listener("web")
		for range 3 {
			offer()
			base := read()
			want, got := offer(), map[string]uint64{}
			for _, e := range read().since(base).stats().GetEpochs() {
				addTo(got, resealv1.Label(outcomes[0]), e.GetResumed())
				for reason, n := range e.GetMisses() {
					addTo(got, reason, n)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}

func addTo(counts map[string]uint64, key string, n uint64) {
	if n > 0 {
		counts[key] += n
	}
}

// An edge can't make the control plane keep what it likes.
func TestEpochsAreBounded(t *testing.T) {
	var many []*resealv1.EpochStats
	for number := range uint64(10 * maxEpochs) {
		many = append(many, epochStats("default", number, 1, nil))
	}
	if got := len(withEpochs(many...).stats().GetEpochs()); got != maxEpochs {
		t.Errorf("%d epochs of a report", got)
	}
	strange := withEpochs(epochStats(strings.Repeat("k", maxName+1), 1, 1, nil), epochStats("default", 2, 1, nil), epochStats("default", 2, 5, nil), epochStats("", 0, 2, map[string]uint64{"": 1, "resumed": 4, "a/b": 4}))
	if got := strange.stats().GetEpochs(); len(got) != 2 || got[1].GetResumed() != 1 {
		t.Errorf("strange: %v", got)
	}
}

// Retired epochs don't make windows shorter.
func TestEpochsAreSmall(t *testing.T) {
	words := newVocabularies()
	var before *report
	for i := range uint64(10) {
		listener := &resealv1.Stats{Name: "web"}
		for number := range uint64(14) {
			listener.Epochs = append(listener.Epochs, epochStats("default", number+1, 100, map[string]uint64{"expired": 1}))
		}
		listener.Epochs[13].Resumed += i
		made := reportOf(&resealv1.ReportRequest{Listeners: []*resealv1.Stats{listener}}, words, nil, before)
		if made.cells != 2 {
			t.Errorf("report %d costs %d cells", i, made.cells)
		}
		before = made
	}
}

// What changed in reports that are not kept is new in the next that is, as with
// stats --watch, which makes edges report often.
func TestReportsThatAreNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		from := newTestStream("a")
		listener := &resealv1.Stats{Name: "web", Epochs: []*resealv1.EpochStats{epochStats("default", 1, 1, nil), epochStats("default", 2, 1, nil), epochStats("default", 3, 1, nil)}}
		for i := range 10 * 10 {
			if i%10 == 5 { // not the first of its slot
				for _, e := range listener.Epochs {
					e.Resumed++
				}
			}
			if err := s.takeMessage(from, &resealv1.ReportRequest{Edge: "a", Listeners: []*resealv1.Stats{listener}}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(sampleInterval / 10)
		}
		// A report, and its counters.
		if kept := s.edges["a"].history; len(kept) != 10 || s.cells != 2*len(kept) {
			t.Errorf("%d cells for %d reports", s.cells, len(kept))
		}
	})
}
