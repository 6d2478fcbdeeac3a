package tally

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// epochText is "keyring/number resumed reason:n ...", one for each epoch.
func epochText(l *Counters) string {
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
	if got := epochText(l); got != "/0 0 key_unknown:1, default/7 2, default/8 0 key_unknown:1" {
		t.Error(got)
	}
	if stats := New(nil).Pool("web").stats(); stats.GetEpochs() != nil {
		t.Error("a pool has epochs")
	}
}

// kept are the numbers that are counted separately.
func kept(l *Counters, keyring string) (numbers []uint64) {
	for _, e := range l.stats().GetEpochs() {
		if e.GetKeyring() == keyring {
			numbers = append(numbers, e.GetEpoch())
		}
	}
	return numbers
}

// Those whose last ticket was longest ago make room for others, whatever their
// numbers: a keyring that is made anew begins with 1.
func TestEpochsAreBounded(t *testing.T) {
	l := New(nil).Listener("web")
	for number := range uint64(3 * maxProven) {
		l.Ticket("default", number+1, 0)
		l.Ticket("default", 1, 0)
	}
	numbers := kept(l, "default")
	if len(numbers) != maxProven || numbers[0] != 1 || numbers[1] != 2*maxProven+2 || numbers[len(numbers)-1] != 3*maxProven {
		t.Errorf("kept %v", numbers)
	}
	for number := range uint64(5) {
		l.Ticket("default", number+1, 0)
	}
	if numbers := kept(l, "default"); !slices.Equal(numbers[:6], []uint64{1, 2, 3, 4, 5, 2*maxProven + 6}) {
		t.Errorf("kept %v", numbers)
	}
	l.Ticket("default", 0, resealv1.MissReason_MISS_REASON_KEY_UNKNOWN)
	for number := range uint64(maxProven) {
		l.Ticket("other", number+1, 0)
	}
	l.Ticket("other", 0, resealv1.MissReason_MISS_REASON_KEY_UNKNOWN)
	if left, numbers := kept(l, "default"), kept(l, "other"); len(left) > 0 || len(numbers) != maxProven {
		t.Errorf("kept %v, %v", left, numbers)
	}
}

// An hour between rotations makes more epochs in a week than are counted
// separately. What is given up counts as number 0, so that nothing is lost.
func TestEpochsAddUp(t *testing.T) {
	const unknown = resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
	l := New(nil).Listener("web")
	var offered uint64
	for round := range uint64(3) {
		for number := range uint64(100) {
			l.Ticket("default", number+1, 0)
			l.Ticket("default", 200+number, unknown)
			l.Ticket("default", 0, unknown)
			offered += 3
			var resumed, missed uint64
			for _, e := range l.stats().GetEpochs() {
				resumed += e.GetResumed()
				missed += e.GetMisses()["key_unknown"]
			}
			if resumed != offered/3 || missed != 2*offered/3 {
				t.Fatalf("round %d, number %d: %d resumed and %d missed of %d", round, number, resumed, missed, offered)
			}
		}
	}
	if got := epochText(l); !strings.HasPrefix(got, "/0 244 key_unknown:592, default/45 1,") {
		t.Error(got)
	}
}

// A number that no ticket has proved does not displace one that was. Anybody can
// name numbers.
func TestEpochsThatExistStay(t *testing.T) {
	const unknown, retired = resealv1.MissReason_MISS_REASON_KEY_UNKNOWN, resealv1.MissReason_MISS_REASON_KEY_RETIRED
	l := New(nil).Listener("web")
	for number := range uint64(2 * maxNamed) {
		l.Ticket("default", 1000+number, unknown)
	}
	for number := range uint64(maxProven) {
		l.Ticket("default", number+1, 0)
	}
	for number := range uint64(2 * maxNamed) {
		l.Ticket("default", 1000+number, unknown)
	}
	l.Ticket("default", 5, retired)
	numbers := kept(l, "default")
	if len(numbers) != maxProven+maxNamed || numbers[0] != 1 || numbers[maxProven-1] != maxProven {
		t.Errorf("kept %v", numbers)
	}
	if got := epochText(l); !strings.HasPrefix(got, "/0 0 key_unknown:24, default/1 1, ") || !strings.Contains(got, "default/5 1 key_retired:1") {
		t.Error(got)
	}
}

// However many epochs have opened, those that an edge does not know yet are told
// apart: it lags behind.
func TestEpochsThatAreUnknownShow(t *testing.T) {
	const unknown = resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
	l := New(nil).Listener("web")
	for number := range uint64(200) {
		l.Ticket("default", number+1, unknown)
		if got := epochText(l); !strings.HasSuffix(got, fmt.Sprintf(", default/%d 0 key_unknown:1", number+1)) && number > 0 {
			t.Fatalf("epoch %d: %s", number+1, got)
		}
		l.Ticket("default", number+1, 0)
		if got := epochText(l); !strings.HasSuffix(got, fmt.Sprintf("default/%d 1 key_unknown:1", number+1)) {
			t.Fatalf("epoch %d: %s", number+1, got)
		}
	}
}
