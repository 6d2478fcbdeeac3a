package tally

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// An edge that tells only what has changed is known as well as one that tells all.
func TestPartialReportsAddUp(t *testing.T) {
	words := newVocabularies()
	rapid.Check(t, func(t *rapid.T) {
		all := map[string]*resealv1.Stats{}
		var last, kept *report
		for i := range rapid.IntRange(1, 8).Draw(t, "reports") {
			changed := map[string]*resealv1.Stats{}
			for range rapid.IntRange(0, 3).Draw(t, "changes") {
				stats := drawStats(t)
				stats.Name = rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "name")
				changed[stats.GetName()], all[stats.GetName()] = stats, stats
			}
			message := &resealv1.ReportRequest{Edge: "e", Partial: i > 0, Pools: slices.Collect(maps.Values(changed))}
			last = reportOf(message, words, last, kept)
			if rapid.Bool().Draw(t, "kept") {
				kept = last
			}
			whole := reportOf(&resealv1.ReportRequest{Edge: "e", Pools: slices.Collect(maps.Values(all))}, words, nil, nil)
			if diff := cmp.Diff(statsOf(words, whole.pools), statsOf(words, last.pools), protocmp.Transform()); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}

func statsOf(words *vocabularies, all []*packed) []*resealv1.Stats {
	var stats []*resealv1.Stats
	for _, p := range all {
		stats = append(stats, words.unpack(p).stats())
	}
	return stats
}

// What a quiet edge says costs nothing that grows with time or with its pools.
func TestQuietEdgesCostNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		from := newTestStream("e")
		report := &resealv1.ReportRequest{Edge: "e", BootId: "b"}
		for i := range 200 {
			report.Pools = append(report.Pools, &resealv1.Stats{Name: fmt.Sprint("pool", i), Requests: 7})
		}
		take := func(message *resealv1.ReportRequest) {
			if err := s.takeMessage(from, message); err != nil {
				t.Fatal(err)
			}
			time.Sleep(4 * time.Second)
		}
		take(report)
		beat := &resealv1.ReportRequest{Edge: "e", BootId: "b", Partial: true}
		for range 500 {
			take(beat)
		}
		e := s.edges["e"]
		if len(e.newest.pools) != 200 || &e.newest.pools[0] != &e.history[0].pools[0] {
			t.Errorf("%d pools, or copies of them", len(e.newest.pools))
		}
		if len(e.history) != 2 || s.cells != 202+200/listCells {
			t.Errorf("%d reports of %d cells are kept", len(e.history), s.cells)
		}
		if allocated := testing.AllocsPerRun(100, func() { _ = s.takeMessage(from, beat) }); allocated > 8 {
			t.Errorf("a report in which nothing has changed allocates %.0f times", allocated)
		}
		// Windows begin where they should, though no report was kept from then.
		response := s.add([]question{{edge: "e", stream: from}}, "", time.Minute)
		edge := response.GetEdges()[0]
		if asked := time.Now().Add(-time.Minute); !edge.GetWindowStart().AsTime().Equal(asked) || edge.GetPools()[0].GetRequests() != 0 {
			t.Errorf("the window begins at %v, %v was asked for; %v", edge.GetWindowStart().AsTime(), asked, edge.GetPools()[0])
		}
	})
}

// A partial report says nothing without one that it builds on.
func TestPartialReportsNeedAWholeOne(t *testing.T) {
	for name, reports := range map[string][]*resealv1.ReportRequest{
		"the first":          {{Edge: "e", BootId: "b", Partial: true}},
		"of another process": {{Edge: "e", BootId: "b"}, {Edge: "e", BootId: "c", Partial: true}},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := startPlane(t).client("e").Report(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, report := range reports {
				if err := stream.Send(report); err != nil {
					t.Fatal(err)
				}
			}
			if err := end(stream); status.Code(err) != codes.InvalidArgument {
				t.Errorf("it ends with %v", err)
			}
		})
	}
}
