package tally

import (
	"testing"

	"github.com/google/go-cmp/cmp"
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
		Connections: &resealv1.ConnectionStats{Opened: count("opened"), Reused: count("reused"), Active: int64(count("active")), Idle: int64(count("idle"))},
		Closes:      counts("close", "timeout", "close_notify_both"),
		ClosesBy:    counts("by", "us", "peer"),
	}
}

func TestRoundTrip(t *testing.T) {
	words := newVocabularies()
	rapid.Check(t, func(t *rapid.T) {
		stats := drawStats(t)
		if diff := cmp.Diff(stats, fromStats(stats, words).stats(), protocmp.Transform()); diff != "" {
			t.Fatal(diff)
		}
	})
}

// What was counted after a moment is the difference, whatever the moment.
func TestAddThenSince(t *testing.T) {
	words := newVocabularies()
	rapid.Check(t, func(t *rapid.T) {
		base, grown := fromStats(drawStats(t), words), fromStats(drawStats(t), words)
		later := base.add(grown)
		got := later.since(base)
		grown.active, grown.idle = later.active, later.idle // gauges are as of now
		if !got.equal(grown) {
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
