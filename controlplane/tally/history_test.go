package tally

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// What an edge says can't make the control plane's metrics grow without end.
func TestHostileReports(t *testing.T) {
	words := newVocabularies()
	hostile := &resealv1.ReportRequest{Edge: "a"}
	for i := range 2 * maxPerReport {
		hostile.Pools = append(hostile.Pools, &resealv1.Stats{Name: fmt.Sprint("p", i)})
	}
	misses := map[string]uint64{"expired": 7, "": 1, strings.Repeat("x", 1000): 1, "zero": 0}
	for i := range 1000 {
		misses[fmt.Sprint("word", i)] = 1
	}
	hostile.Pools = append([]*resealv1.Stats{
		{Name: "app", Misses: misses, Connections: &resealv1.ConnectionStats{Active: -5}},
		{Name: "app", Requests: 9}, {Name: ""}, {Name: strings.Repeat("n", maxName+1)},
	}, hostile.Pools...)
	got := reportOf(hostile, words, nil, nil)
	if len(got.pools) > maxPerReport {
		t.Errorf("%d pools are kept", len(got.pools))
	}
	app := words.unpack(byName(got.pools, "app")).stats()
	if app.GetRequests() != 0 || app.GetConnections().GetActive() != 0 {
		t.Errorf("kept %v", app)
	}
	var total uint64
	for _, count := range app.GetMisses() {
		total += count
	}
	if len(app.GetMisses()) != maxWords+2 || total != 1009 || app.GetMisses()["expired"] != 7 || app.GetMisses()[otherWord] != 1002-maxWords {
		t.Errorf("%d misses in %d keys, other %d", total, len(app.GetMisses()), app.GetMisses()[otherWord])
	}
	if _, ok := app.GetMisses()["zero"]; ok {
		t.Error("a zero takes a key")
	}
}

// Restarts again and again don't make a history without end.
func TestHistoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		from := newTestStream("a")
		for i := range 5 * maxReports {
			report := &resealv1.ReportRequest{Edge: "a", BootId: fmt.Sprint(i), Pools: []*resealv1.Stats{{Name: "app", Requests: uint64(i)}}}
			if err := s.takeMessage(from, report); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(s.edges["a"].history); n > maxReports {
			t.Errorf("%d reports are kept", n)
		}
		if s.cells != 2*len(s.edges["a"].history) {
			t.Errorf("%d cells for %d reports", s.cells, len(s.edges["a"].history))
		}
	})
}
