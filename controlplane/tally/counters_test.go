package tally

import (
	"cmp"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func drawStats(t *rapid.T) *resealv1.Stats {
	count := func(name string) uint64 { return rapid.Uint64Range(0, 1000).Draw(t, name) }
	counts := func(name string, keys ...string) map[string]uint64 {
		drawn := map[string]uint64{}
		for _, key := range keys {
			if n := count(name + key); n%3 > 0 {
				drawn[key] = n
			}
		}
		return drawn
	}
	return &resealv1.Stats{
		Name:     "app",
		Requests: count("requests"),
		Errors:   counts("error", "reset", "timeout_header", "strange"),
		Handshakes: &resealv1.Handshakes{
			Full: count("full"), ResumedSessionId: count("id"), ResumedTicket: count("ticket"), ResumedPsk: count("psk"), Failed: count("failed"),
		},
		Misses:      counts("miss", "no_session", "expired"),
		Connections: &resealv1.ConnectionStats{Opened: count("opened"), Reused: count("reused"), Active: int64(count("active")), Idle: int64(count("idle")), Share: int64(count("share"))},
		Closes:      counts("close", "timeout", "close_notify_both"),
		ClosesBy:    counts("by", "us", "peer"),
	}
}

func TestRoundTrip(t *testing.T) {
	words := newVocabularies()
	rapid.Check(t, func(t *rapid.T) {
		stats := drawStats(t)
		for i := range rapid.Uint64Range(0, 3).Draw(t, "epochs") {
			keyring := rapid.SampledFrom([]string{"", "default", "other"}).Draw(t, "keyring")
			stats.Epochs = append(stats.Epochs, epochStats(keyring, i, 1+rapid.Uint64().Draw(t, "resumed")/2, map[string]uint64{"expired": 3}))
		}
		slices.SortFunc(stats.Epochs, func(a, b *resealv1.EpochStats) int { return cmp.Compare(a.GetKeyring(), b.GetKeyring()) })
		one := packedOf(stats, words)
		counted := words.unpack(one)
		if diff := gocmp.Diff(stats, words.unpack(one).stats(), protocmp.Transform()); diff != "" {
			t.Fatal(diff)
		}
		if again := packedOf(counted.stats(), words); !again.equal(one) {
			t.Fatalf("%q is packed as %q again", one.data, again.data)
		}
		// Sums of packed counters are those of plain ones.
		two := packedOf(drawStats(t), words)
		other := words.unpack(two)
		total := totals{}
		total.addPacked(words, []*packed{one, two}, everything)
		if diff := gocmp.Diff(counted.add(other).stats(), total["app"].stats(), protocmp.Transform()); diff != "" {
			t.Fatal(diff)
		}
	})
}

// What was counted after a moment is the difference, whatever the moment.
func TestAddThenSince(t *testing.T) {
	words := newVocabularies()
	rapid.Check(t, func(t *rapid.T) {
		base, grown := countersOf(drawStats(t), words), countersOf(drawStats(t), words)
		later := base.add(grown)
		got := later.since(base)
		grown.active, grown.idle, grown.budget = later.active, later.idle, later.budget // gauges are as of now
		if diff := gocmp.Diff(got.stats(), grown.stats(), protocmp.Transform()); diff != "" {
			t.Fatalf("%v after %v is %v, want %v", later, base, got, grown)
		}
		if later.plain[requests] > 0 {
			// A counter below its base began again at 0.
			restarted := *later
			restarted.plain[requests] = later.plain[requests] - 1
			if got := restarted.since(later); got != &restarted {
				t.Fatalf("restarted counters: %v", got)
			}
		}
	})
}

// What an edge of many pools reports is kept in little space.
func TestPackedCountersAreSmall(t *testing.T) {
	stats := &resealv1.Stats{
		Name: "web", Requests: 1_000_000, Errors: map[string]uint64{"connect": 3, "timeout": 7},
		Handshakes:  &resealv1.Handshakes{Full: 15, ResumedSessionId: 300, ResumedTicket: 4000, ResumedPsk: 20_000, Failed: 3},
		Misses:      map[string]uint64{"not_offered": 9000, "expired": 20},
		Connections: &resealv1.ConnectionStats{Opened: 24_315, Reused: 975_000, Active: 4, Idle: 12},
		Closes:      map[string]uint64{"close_notify_both": 24_000, "reset_by_peer": 11},
		ClosesBy:    map[string]uint64{"us": 20_000, "peer": 4011},
	}
	words := newVocabularies()
	if p := packedOf(stats, words); len(p.data) > 56 {
		t.Errorf("a pool takes %d bytes", len(p.data))
	}
	for number := range uint64(maxEpochs) {
		stats.Epochs = append(stats.Epochs, epochStats("default", 500+number, 1000, map[string]uint64{"expired": 5}))
	}
	if p := packedOf(stats, words); len(p.data) > 56+9*maxEpochs {
		t.Errorf("a listener with all epochs takes %d bytes", len(p.data))
	}
}
