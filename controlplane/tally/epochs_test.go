package tally

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func epoch(keyring string, number, resumed uint64, misses map[string]uint64) *resealv1.EpochStats {
	if misses == nil {
		misses = map[string]uint64{}
	}
	return &resealv1.EpochStats{Keyring: keyring, Epoch: number, Resumed: resumed, Misses: misses}
}

func fromEpochs(epochs ...*resealv1.EpochStats) *counters {
	return fromStats(&resealv1.Stats{Name: "web", Epochs: epochs}, newVocabularies())
}

func TestEpochs(t *testing.T) {
	unknown := map[string]uint64{"key_unknown": 3}
	a := fromEpochs(epoch("default", 9, 5, nil), epoch("default", 10, 7, unknown), epoch("a/b", 1, 1, nil), epoch("default", 11, 0, nil))
	b := fromEpochs(epoch("default", 10, 1, nil), epoch("default", 12, 2, nil))
	want := []*resealv1.EpochStats{
		epoch("a/b", 1, 1, nil), epoch("default", 9, 5, nil), epoch("default", 10, 8, unknown), epoch("default", 12, 2, nil),
	}
	if diff := cmp.Diff(want, a.add(b).stats().GetEpochs(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	// What an edge has forgotten since is nothing, and no restart.
	later := fromEpochs(epoch("default", 10, 9, unknown), epoch("default", 11, 1, nil))
	want = []*resealv1.EpochStats{epoch("default", 10, 2, nil), epoch("default", 11, 1, nil)}
	if diff := cmp.Diff(want, later.since(a).stats().GetEpochs(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// An edge can't make the control plane keep what it likes.
func TestEpochsAreBounded(t *testing.T) {
	var many []*resealv1.EpochStats
	for number := range uint64(10 * maxEpochs) {
		many = append(many, epoch("default", number, 1, nil))
	}
	if got := len(fromEpochs(many...).stats().GetEpochs()); got != maxEpochs {
		t.Errorf("%d epochs of a report", got)
	}
	strange := fromEpochs(epoch(strings.Repeat("k", maxName+1), 1, 1, nil), epoch("default", 2, 1, nil), epoch("default", 2, 5, nil), epoch("", 0, 2, map[string]uint64{"": 1, "resumed": 4}))
	if got := strange.stats().GetEpochs(); len(got) != 2 || got[1].GetResumed() != 1 {
		t.Errorf("strange: %v", got)
	}
}
