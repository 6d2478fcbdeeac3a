package tally

import "slices"

// maxCarried bounds the names that are carried for edges that are forgotten.
const maxCarried = 2 * maxPerReport

// carried are counters that no newest report holds any more: those of earlier
// processes of an edge, and of edges that are forgotten. With them the totals of the
// fleet never fall while the control plane runs.
type carried struct{ pools, listeners totals }

// absent are counters that the newest report of a process lacks, though an earlier one
// had them. They may come back.
type absent = carried

func newCarried() carried { return carried{totals{}, totals{}} }

// take notes what is lost when now takes the place of before.
func (e *edge) carry(before, now *report) {
	if before == nil {
		return
	}
	again := before.bootID == now.bootID
	e.before.pools.carry(before.pools, now.pools, e.absent.pools, again)
	e.before.listeners.carry(before.listeners, now.listeners, e.absent.listeners, again)
}

// carry adds the counters of before that those of now don't continue. again says that
// both are of one process.
func (t totals) carry(before, now []*counters, missing totals, again bool) {
	if again && slices.Equal(before, now) {
		return
	}
	for _, c := range before {
		switch next := byName(now, c.name); {
		case !again || next != nil && next.below(c):
			t.add(c.lasting())
		case next == nil:
			missing[c.name] = c.lasting()
		}
	}
	for name, c := range missing {
		next := byName(now, name)
		if !again || next != nil && next.below(c) {
			t.add(c)
		}
		if !again || next != nil {
			delete(missing, name)
		}
	}
}

// lasting are counters without what is true of a moment only.
func (c *counters) lasting() *counters {
	still := *c
	still.active, still.idle, still.epochs = 0, 0, nil
	return &still
}

// addLasting adds what an edge has counted for ever.
func (t totals) addLasting(from totals) {
	for _, c := range from {
		if t[c.name] != nil || len(t) < maxCarried {
			t.add(c)
		}
	}
}

// addPast adds what an edge counted that its newest report does not hold.
func (e *edge) addPast(sum carried) {
	for _, from := range []carried{e.before, e.absent} {
		sum.pools.addLasting(from.pools)
		sum.listeners.addLasting(from.listeners)
	}
}

// addReport adds the newest report of an edge. Its gauges count while the edge is
// present.
func (c carried) addReport(newest *report, present bool) {
	for to, from := range map[*totals][]*counters{&c.pools: newest.pools, &c.listeners: newest.listeners} {
		for _, counted := range from {
			if !present {
				counted = counted.lasting()
			}
			to.add(counted)
		}
	}
}
