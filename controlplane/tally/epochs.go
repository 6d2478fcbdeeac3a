package tally

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxEpochs bounds the epochs of a listener that a report is believed.
const maxEpochs = 32

// resumedKey stands in place of a miss reason.
const resumedKey = "resumed"

// epochKey is the key of a share of handshakes: keyring, epoch, and their miss
// reason or resumedKey.
func epochKey(keyring string, number uint64, outcome string) string {
	return fmt.Sprintf("%s/%d/%s", keyring, number, outcome)
}

func splitEpochKey(key string) (keyring string, number uint64, outcome string) {
	end := strings.LastIndexByte(key, '/')
	middle := strings.LastIndexByte(key[:end], '/')
	number, _ = strconv.ParseUint(key[middle+1:end], 10, 64) // epochKey wrote it
	return key[:middle], number, key[end+1:]
}

// epochShares copies what an edge reports of tickets' epochs, within bounds,
// sorted by key.
func epochShares(epochs []*resealv1.EpochStats, words *vocabulary) []share {
	var shares []share
	for _, epoch := range epochs[:min(len(epochs), maxEpochs)] {
		if len(epoch.GetKeyring()) > maxName {
			continue
		}
		put := func(outcome string, count uint64) {
			if count > 0 {
				shares = append(shares, share{epochKey(epoch.GetKeyring(), epoch.GetEpoch(), outcome), count})
			}
		}
		put(resumedKey, epoch.GetResumed())
		for _, miss := range words.shares(epoch.GetMisses()) {
			put(miss.key, miss.count)
		}
	}
	slices.SortStableFunc(shares, func(a, b share) int { return cmp.Compare(a.key, b.key) })
	return slices.CompactFunc(shares, func(a, b share) bool { return a.key == b.key })
}

// toEpochs is the reverse: sorted by keyring and number.
func toEpochs(shares []share) []*resealv1.EpochStats {
	var epochs []*resealv1.EpochStats
	for _, s := range shares {
		keyring, number, outcome := splitEpochKey(s.key)
		// Those of one epoch stand together.
		if last := len(epochs) - 1; last < 0 || epochs[last].Keyring != keyring || epochs[last].Epoch != number {
			epochs = append(epochs, &resealv1.EpochStats{Keyring: keyring, Epoch: number, Misses: map[string]uint64{}})
		}
		if epoch := epochs[len(epochs)-1]; outcome == resumedKey {
			epoch.Resumed = s.count
		} else {
			epoch.Misses[outcome] = s.count
		}
	}
	slices.SortFunc(epochs, func(a, b *resealv1.EpochStats) int {
		return cmp.Or(cmp.Compare(a.GetKeyring(), b.GetKeyring()), cmp.Compare(a.GetEpoch(), b.GetEpoch()))
	})
	return epochs
}
