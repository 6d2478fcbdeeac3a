package budget

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/reseal/reseal/controlplane/fleet"
)

func places(edges ...string) []uint64 {
	var all []uint64
	for _, edge := range edges {
		all = append(all, place(edge))
	}
	slices.Sort(all)
	return all
}

func TestDivide(t *testing.T) {
	for _, test := range []struct {
		budget uint32
		edges  int
		want   []uint32 // sorted
	}{
		{budget: 10, edges: 1, want: []uint32{10}},
		{budget: 10, edges: 2, want: []uint32{5, 5}},
		{budget: 10, edges: 3, want: []uint32{3, 3, 4}},
		{budget: 11, edges: 3, want: []uint32{3, 4, 4}},
		{budget: 3, edges: 3, want: []uint32{1, 1, 1}},
		{budget: 2, edges: 3, want: []uint32{1, 1, 1}},
		{budget: 1, edges: 2, want: []uint32{1, 1}},
		{budget: 1<<32 - 1, edges: 2, want: []uint32{1<<31 - 1, 1 << 31}},
		{budget: 5, edges: 0},
	} {
		var edges []string
		for i := range test.edges {
			edges = append(edges, fmt.Sprint("edge-", i))
		}
		c := divide(test.budget, places(edges...))
		var got []uint32
		for _, edge := range edges {
			got = append(got, c.share(place(edge)))
		}
		slices.Sort(got)
		if !slices.Equal(got, test.want) {
			t.Errorf("%d over %d edges: %v, want %v", test.budget, test.edges, got, test.want)
		}
	}
}

// Everybody has at least 1, no two differ by more than 1, nothing is left, and no more
// is given than there is unless there are more edges.
func TestDivideIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		budget := rapid.Uint32Range(1, 5000).Draw(t, "budget")
		edges := rapid.SliceOfNDistinct(rapid.StringMatching(`[a-z0-9-]{1,12}`), 1, 300, rapid.ID[string]).Draw(t, "edges")
		c := divide(budget, places(edges...))
		var sum, least, most uint32
		for i, edge := range edges {
			share := c.share(place(edge))
			sum, most = sum+share, max(most, share)
			if i == 0 || share < least {
				least = share
			}
		}
		if least < 1 || most-least > 1 || sum != max(budget, uint32(len(edges))) {
			t.Fatalf("%d over %d edges: %d in all, from %d to %d", budget, len(edges), sum, least, most)
		}
	})
}

// all is the pool that every edge has, some one that only those with a label have.
func pools(labels map[string]string) map[string]bool {
	return map[string]bool{"all": true, "some": labels == nil || labels["some"] == "yes"}
}

func members(ids ...string) []fleet.Member {
	var all []fleet.Member
	for _, id := range ids {
		all = append(all, fleet.Member{ID: id})
	}
	return all
}

var ten = []limited{{"all", 10}}

func (t *table) of(ids ...string) []uint32 {
	var shares []uint32
	for _, id := range ids {
		share, _ := t.share(id, limited{"all", 10})
		shares = append(shares, share)
	}
	return shares
}

func wantShares(t *testing.T, when string, got []uint32, want ...uint32) {
	t.Helper()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s: shares of %v, want %v", when, got, want)
	}
}

func TestComeAndGo(t *testing.T) {
	var table *table
	now := time.Now()
	var again time.Duration
	step := func(ids ...string) {
		table, again = table.next(now, members(ids...), ten, pools)
	}
	step("a", "b")
	wantShares(t, "two edges", table.of("a", "b"), 5, 5)
	if again != 0 {
		t.Errorf("nothing changes, but it is looked again after %s", again)
	}
	if _, known := table.share("c", ten[0]); known {
		t.Error("the share of an edge that is not there is known")
	}

	now = now.Add(time.Minute)
	step("a", "b", "c")
	wantShares(t, "one comes", table.of("c"), 1)
	old := table.of("a", "b")
	if old[0]+old[1] > 7 {
		t.Errorf("the others have %v yet", old)
	}
	if again != settle {
		t.Errorf("looked again after %s", again)
	}
	now = now.Add(settle)
	step("a", "b", "c")
	wantShares(t, "it is there", table.of("a", "b", "c"), 3, 3, 4)

	now = now.Add(time.Minute)
	step("a", "c")
	if sum := table.of("a", "c"); sum[0]+sum[1] > 7 {
		t.Errorf("one went a moment ago, and the others have %v", sum)
	}
	now = now.Add(settle - time.Millisecond)
	before := table
	step("a", "c")
	if table != before {
		t.Error("another table that tells the same")
	}
	now = now.Add(time.Millisecond)
	step("a", "c")
	wantShares(t, "one went", table.of("a", "c"), 5, 5)

	// One for another.
	now = now.Add(time.Minute)
	step("a", "d")
	wantShares(t, "another came", table.of("a", "d"), 5, 1)
	now = now.Add(settle)
	step("a", "d")
	wantShares(t, "another is there", table.of("a", "d"), 5, 5)

	now = now.Add(time.Minute)
	step()
	now = now.Add(time.Minute)
	step("e")
	wantShares(t, "the first one", table.of("e"), 10)
}

// Pools of some edges are divided over those, and one whose labels are not known counts
// in all.
func TestDivideByLabels(t *testing.T) {
	yes := map[string]string{"some": "yes"}
	all := []fleet.Member{{ID: "a", Labels: yes}, {ID: "b", Labels: map[string]string{"some": "no"}}, {ID: "c"}, {ID: "d", Vague: true}}
	table, _ := (*table)(nil).next(time.Now(), all, []limited{{"all", 8}, {"some", 8}, {"some", 80}}, pools)
	for _, test := range []struct {
		of   limited
		want uint32
	}{{limited{"all", 8}, 2}, {limited{"some", 8}, 4}, {limited{"some", 80}, 40}} {
		if got, ok := table.share("a", test.of); !ok || got != test.want {
			t.Errorf("a has %d of %v, want %d", got, test.of, test.want)
		}
	}
	if _, ok := table.share("a", limited{"some", 9}); ok {
		t.Error("a share of what was not divided is known")
	}
}

// Replicas hear of the same fleet at different times, and edges of their shares later
// still. As long as all of that takes less than settle, what edges go by never adds up to
// more than the budget and one for each edge that came within settle.
func TestNeverMoreThanThereIs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		budget := rapid.Uint32Range(1, 60).Draw(t, "budget")
		of := limited{"all", budget}
		type replica struct {
			table *table
			seen  int // how far of the history
		}
		replicas := []*replica{{}, {}, {}}
		told := map[string]uint32{} // to edges
		const tick = 100 * time.Millisecond
		const lag = 20 // ticks, that news takes at most to each edge
		history := [][]string{{"e0", "e1", "e2"}}
		came := map[string]int{} // at which tick
		start := time.Now()
		number := 3
		for at := 1; at < 150; at++ {
			now := slices.Clone(history[at-1])
			switch rapid.IntRange(0, 30).Draw(t, "event") {
			case 0:
				id := fmt.Sprint("e", number)
				number++
				came[id] = at
				now = append(now, id)
			case 1:
				if len(now) > 1 {
					now = slices.Delete(now, 0, 1)
				}
			}
			history = append(history, now)
			for _, r := range replicas {
				r.seen = max(r.seen, at-rapid.IntRange(1, lag).Draw(t, "lag"))
				r.table, _ = r.table.next(start.Add(time.Duration(at)*tick), members(history[r.seen]...), []limited{of}, pools)
			}
			var sum, fresh uint32
			for _, id := range now {
				if share, ok := replicas[place(id)%3].table.share(id, of); ok {
					told[id] = share
				} else if told[id] == 0 {
					told[id] = 1 // by its own choice
				}
				sum += told[id]
				if since, ok := came[id]; ok && at-since <= lag+int(settle/tick) {
					fresh++
				}
			}
			if sum > max(budget, uint32(len(now)))+fresh {
				t.Fatalf("at tick %d %d edges have %d of %d, %d of them new", at, len(now), sum, budget, fresh)
			}
		}
	})
}

func BenchmarkNext(b *testing.B) {
	var ids []string
	for i := range 10_000 {
		ids = append(ids, fmt.Sprint("edge-", i))
	}
	all := members(ids...)
	var budgets []limited
	for i := range 200 {
		budgets = append(budgets, limited{fmt.Sprint("pool-", i), 100_000})
	}
	has := map[string]bool{}
	for _, of := range budgets {
		has[of.pool] = true
	}
	var t *table
	for b.Loop() {
		t, _ = t.next(time.Now(), all, budgets, func(map[string]string) map[string]bool { return has })
	}
}
