package share

import (
	"crypto/sha256"
	"fmt"
	"testing"
	"time"
)

func offerOf(i int) [sha256.Size]byte { return sha256.Sum256(fmt.Append(nil, i)) }

// TestRogueOrigin: an edge that sends offers without end shuts out itself alone, and
// is taken again once what it sent is forgotten.
func TestRogueOrigin(t *testing.T) {
	r := &replays{origins: map[string]*seen{}}
	now := time.Now()
	refused := 0
	for i := range 2 * maxReplays {
		if r.take("rogue", offerOf(i), now) != nil {
			refused++
		}
	}
	if refused != maxReplays {
		t.Errorf("%d offers of the rogue are refused, want %d", refused, maxReplays)
	}
	if err := r.take("good", offerOf(0), now); err != nil {
		t.Errorf("another edge: %v", err)
	}
	for _, later := range []time.Duration{0, maxSkew, replayWindow - time.Second, replayWindow + time.Second} {
		if r.take("good", offerOf(0), now.Add(later)) == nil {
			t.Errorf("a replay is taken after %v", later)
		}
	}
	if err := r.take("rogue", offerOf(-1), now.Add(2*replayWindow)); err != nil {
		t.Errorf("later: %v", err)
	}
}
