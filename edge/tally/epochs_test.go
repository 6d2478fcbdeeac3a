package tally

import (
	"fmt"
	"strings"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// epochText is "keyring/number resumed reason:n ...", one for each epoch.
func epochText(l *Listener) string {
	var all []string
	for _, e := range l.stats().GetEpochs() {
		text := fmt.Sprintf("%s/%d %d", e.GetKeyring(), e.GetEpoch(), e.GetResumed())
		for reason, n := range e.GetMisses() {
			text += fmt.Sprintf(" %s:%d", reason, n)
		}
		all = append(all, text)
	}
	return strings.Join(all, ", ")
}

func TestEpochs(t *testing.T) {
	const unknown = resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
	l := New(nil).Listener("web")
	l.Ticket("default", 7, 0)
	l.Ticket("default", 7, 0)
	l.Ticket("default", 8, unknown)
	l.Ticket("default", 0, unknown)
	l.Ticket("default", 8, -1)
	l.Ticket("default", 8, resealv1.MissReason(misses))
	if got := epochText(l); got != "default/0 0 key_unknown:1, default/7 2, default/8 0 key_unknown:1" {
		t.Error(got)
	}
	if stats := New(nil).Pool("web").stats(); stats.GetEpochs() != nil {
		t.Error("a pool has epochs")
	}
}

// Epochs that have ended make room for new ones, and numbers that are too old to
// matter don't.
func TestEpochsAreBounded(t *testing.T) {
	l := New(nil).Listener("web")
	for number := range uint64(3 * maxEpochs) {
		l.Ticket("default", number+1, 0)
	}
	epochs := l.stats().GetEpochs()
	if len(epochs) != maxEpochs || epochs[0].GetEpoch() != 2*maxEpochs+1 || epochs[len(epochs)-1].GetEpoch() != 3*maxEpochs {
		t.Errorf("kept %v", epochs)
	}
	for range 5 {
		l.Ticket("default", 3, resealv1.MissReason_MISS_REASON_KEY_RETIRED)
	}
	if got := epochText(l); !strings.HasPrefix(got, "default/0 0 key_retired:5, default/50 1, ") || len(l.stats().GetEpochs()) != maxEpochs {
		t.Errorf("an old ticket: %s", got)
	}
	// The policy gets another keyring, whose numbers are low.
	for number := range uint64(maxEpochs + 2) {
		l.Ticket("other", number+1, 0)
	}
	for _, e := range l.stats().GetEpochs() {
		if e.GetKeyring() != "other" || e.GetEpoch() < 3 {
			t.Errorf("kept %v", e)
		}
	}
}
