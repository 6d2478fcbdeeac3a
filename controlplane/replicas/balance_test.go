package replicas

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestSurplus(t *testing.T) {
	for _, test := range []struct {
		own    int
		others []int
		want   int
	}{
		{own: 100},
		{own: 0, others: []int{100}},
		{own: 1, others: []int{0}},
		{own: 2, others: []int{0}, want: 1},
		{own: 2, others: []int{1}},
		{own: 2, others: []int{0, 1}, want: 1},
		{own: 2, others: []int{2, 1}},
		{own: 3, others: []int{0, 0}, want: 1},
		{own: 105, others: []int{95}},
		{own: 120, others: []int{80}, want: 1},
		{own: 300, others: []int{300, 0}, want: 3},
		{own: 6000, others: []int{0}, want: 50},
	} {
		if got := surplus(test.own, test.others); got != test.want {
			t.Errorf("%d, others %v: %d, want %d", test.own, test.others, got, test.want)
		}
	}
}

// TestSettles: whatever edges begin with, they are spread after some minutes, never
// many move in one, and then none do.
func TestSettles(t *testing.T) {
	for _, begin := range [][]int{{300, 300, 0}, {0, 0, 5}, {1000, 10, 500, 3}, {7}, {1, 1, 1}} {
		counts := slices.Clone(begin)
		for look := range 200 {
			next := slices.Clone(counts)
			for i, own := range counts {
				others := slices.Delete(slices.Clone(counts), i, i+1)
				n := surplus(own, others)
				if n > max(own/10, 1) {
					t.Fatalf("%v: %d of %d at once", begin, n, own)
				}
				if n > 0 && look > 150 {
					t.Errorf("%v: they still move from %v", begin, counts)
				}
				for range n {
					next[i]--
					next[slices.Index(counts, slices.Min(counts))]++
				}
			}
			counts = next
		}
		if low, high := slices.Min(counts), slices.Max(counts); high-low > max(high/3, 1) {
			t.Errorf("%v settle as %v", begin, counts)
		}
	}
}

// TestMoveOut: a replica that stops has its edges go soon, and does not wait for
// those that can't, or when nobody takes them.
func TestMoveOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, test := range []struct {
			name        string
			edges       int
			alone, stay bool
			most        time.Duration
		}{
			{name: "few", edges: 3, most: 200 * time.Millisecond},
			{name: "many", edges: 10_000, most: moveOut},
			{name: "that stay", edges: 100, stay: true, most: time.Second},
			{name: "alone", edges: 100, alone: true},
		} {
			edges := test.edges
			g := newGroup(t, &strings.Builder{})
			g.config.Edges = func() int { return edges }
			g.config.Logger = slog.New(slog.DiscardHandler)
			if !test.alone {
				g.take(said(t, record{ID: "b", Address: "127.0.0.1:2"}))
			}
			begun, most := time.Now(), 0
			g.moveOut(t.Context(), func(_ context.Context, n int, _ *resealv1.Move) int {
				most = max(most, n)
				if !test.stay {
					edges -= n
				}
				return n
			})
			if took := time.Since(begun); took > test.most || !test.stay && !test.alone && edges > 0 {
				t.Errorf("%s: %d are left after %s", test.name, edges, took)
			}
			if most > max(test.edges/30, moveOutRate/10) {
				t.Errorf("%s: %d at once", test.name, most)
			}
		}
	})
}
