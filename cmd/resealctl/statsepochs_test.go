package main

import (
	"slices"
	"strings"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Numbers that clients made up don't push what is in use out of sight, and good
// resumptions show even when their epoch is not listed.
func TestEpochLines(t *testing.T) {
	unknown := map[string]uint64{"key_unknown": 1}
	var epochs []*resealv1.EpochStats
	for number := range uint64(9) {
		epochs = append(epochs, &resealv1.EpochStats{Keyring: "default", Epoch: number, Misses: unknown})
	}
	epochs[0].Keyring, epochs[0].Resumed = "", 3 // of epochs that are no longer listed
	for number := uint64(3); number <= 5; number++ {
		epochs[number].Resumed, epochs[number].Misses = number, nil
	}
	epochs[2].Misses = map[string]uint64{"expired": 1}
	want := []string{
		"tickets of epoch 5 (default): 5 of 5 resumed (100%)",
		"tickets of epoch 4 (default): 4 of 4 resumed (100%)",
		"tickets of epoch 3 (default): 3 of 3 resumed (100%)",
		"tickets of epoch 2 (default): 0 of 1 resumed (0%); expired 1",
		"tickets of 4 other epochs: 0 of 4 resumed (0%); key_unknown 4",
		"other tickets: 3 of 4 resumed (75%); key_unknown 1",
	}
	if got := epochLines(epochs); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
