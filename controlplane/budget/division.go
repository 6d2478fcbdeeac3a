package budget

import (
	"cmp"
	"hash/fnv"
	"maps"
	"slices"
	"time"

	"github.com/reseal/reseal/controlplane/fleet"
)

// settle is how long a share that rises waits: longer than it takes, as a rule, until
// all replicas know of an edge that came and all edges have heard of shares that fall.
const settle = 3 * time.Second

// limited is a pool with what the fleet may have to each of its endpoints. While a
// change of that is on its way to the edges there are two of the pool.
type limited struct {
	pool   string
	budget uint32
}

// cut is how a budget is divided over edges: each has base, and those whose place comes
// before the limit one more. So whatever the fleet, a division is this small.
type cut struct {
	edges int
	base  uint32
	limit uint64
}

// place is where an edge stands among those that may have one more, the same on all
// replicas.
func place(edge string) uint64 {
	sum := fnv.New64a()
	_, _ = sum.Write([]byte(edge)) // never fails
	return sum.Sum64()
}

// divide divides a budget over the edges at places, which are sorted. None has less
// than 1.
func divide(budget uint32, places []uint64) cut {
	edges := uint32(len(places))
	if edges == 0 || budget < edges {
		return cut{edges: len(places), base: 1}
	}
	c := cut{edges: len(places), base: budget / edges}
	if rest := budget % edges; rest > 0 {
		c.limit = places[rest]
	}
	return c
}

func (c cut) share(at uint64) uint32 {
	if at < c.limit {
		return c.base + 1
	}
	return c.base
}

// division is how all budgets are divided, since a time.
type division struct {
	since time.Time
	cuts  map[limited]cut
}

// table tells the shares of edges. It is immutable.
type table struct {
	// window holds the division now and those that were in force within settle, the
	// oldest first. A share is the least that any of them gives: so what an edge gets
	// more by one it has only when the others have had time to hear of it, whichever of
	// them the replicas go by at the moment.
	window []division
	// came is when an edge was there first, zero if that was before this replica looked.
	came map[string]time.Time
}

// share is an edge's share of a budget. ok is false when it is not known.
func (t *table) share(edge string, of limited) (share uint32, ok bool) {
	came, lives := time.Time{}, false
	if t != nil {
		came, lives = t.came[edge]
	}
	if !lives {
		return 0, false
	}
	at := place(edge)
	for _, d := range t.window {
		c, divided := d.cuts[of]
		switch {
		case !divided || c.edges == 0:
			continue
		case d.since.Before(came):
			return 1, true // others had all of it then
		}
		if given := c.share(at); !ok || given < share {
			share, ok = given, true
		}
	}
	return share, ok
}

// next is the table after t, which may be nil. again is when to look again though
// nothing happens, 0 for never. pools are the names of those that edges with labels
// have, with any labels for nil.
func (t *table) next(now time.Time, members []fleet.Member, budgets []limited, pools func(labels map[string]string) map[string]bool) (made *table, again time.Duration) {
	made = &table{came: make(map[string]time.Time, len(members))}
	comes := false
	for _, m := range members {
		came := now
		if t == nil {
			came = time.Time{}
		} else if before, lived := t.came[m.ID]; lived {
			came = before
		} else {
			comes = true
		}
		made.came[m.ID] = came
	}
	if t != nil {
		made.window = slices.Clone(t.window)
	}
	cuts := cutsOf(members, budgets, pools)
	// One for another makes no other cuts, but the one that came has to wait as well.
	if last := len(made.window) - 1; last < 0 || comes || !maps.Equal(made.window[last].cuts, cuts) {
		made.window = append(made.window, division{now, cuts})
	}
	for len(made.window) > 1 && now.Sub(made.window[1].since) >= settle {
		made.window = made.window[1:]
	}
	if len(made.window) > 1 {
		again = made.window[1].since.Add(settle).Sub(now)
	}
	if t.tells(made) {
		return t, again
	}
	return made, again
}

// tells says whether t tells the same shares as another one.
func (t *table) tells(other *table) bool {
	return t != nil && maps.Equal(t.came, other.came) &&
		slices.EqualFunc(t.window, other.window, func(a, b division) bool { return a.since.Equal(b.since) })
}

// cutsOf divides budgets over members as they are now.
func cutsOf(members []fleet.Member, budgets []limited, pools func(labels map[string]string) map[string]bool) map[limited]cut {
	type placed struct {
		at   uint64
		kind int
	}
	kinds := map[string]int{} // of labels, by their text
	var has []map[string]bool // the pools of a kind
	all := make([]placed, 0, len(members))
	for _, m := range members {
		key := m.Key()
		kind, known := kinds[key]
		if !known {
			kind = len(has)
			kinds[key] = kind
			has = append(has, pools(m.Selectable()))
		}
		all = append(all, placed{place(m.ID), kind})
	}
	slices.SortFunc(all, func(a, b placed) int { return cmp.Compare(a.at, b.at) })
	// Most pools are those of the same edges.
	found := map[string][]uint64{}
	cuts := make(map[limited]cut, len(budgets))
	for _, b := range budgets {
		which := make([]byte, len(has)) // by kind, 1: it has the pool
		for kind := range has {
			if has[kind][b.pool] {
				which[kind] = 1
			}
		}
		places, known := found[string(which)]
		if !known {
			for _, p := range all {
				if which[p.kind] == 1 {
					places = append(places, p.at)
				}
			}
			found[string(which)] = places
		}
		cuts[b] = divide(b.budget, places)
	}
	return cuts
}
