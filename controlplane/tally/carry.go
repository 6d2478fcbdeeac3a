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
func (e *edge) carry(words *vocabularies, before, now *report) {
	if before == nil {
		return
	}
	again := before.bootID == now.bootID
	e.before.pools.carry(words, before.pools, now.pools, e.absent.pools, again)
	e.before.listeners.carry(words, before.listeners, now.listeners, e.absent.listeners, again)
}

// carry adds the counters of before that those of now don't continue. again says that
// both are of one process.
func (t totals) carry(words *vocabularies, before, now []*packed, missing totals, again bool) {
	if again && slices.Equal(before, now) {
		return
	}
	for _, p := range before {
		next := byName(now, p.name.Value())
		if again && next == p {
			continue
		}
		switch c := words.unpack(p).lasting(); {
		case !again || next != nil && words.unpack(next).below(c):
			t.add(c)
		case next == nil:
			missing[c.name] = c
		}
	}
	for name, c := range missing {
		next := byName(now, name)
		if !again || next != nil && words.unpack(next).below(c) {
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
	still.active, still.idle, still.budget, still.epochs = 0, 0, 0, nil
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

// addReport adds the newest report of an edge, but for epochs. Its gauges count while
// the edge is present.
func (c carried) addReport(words *vocabularies, newest *report, present bool) {
	what := lasting
	if present {
		what = withGauges
	}
	c.pools.addPacked(words, newest.pools, what)
	c.listeners.addPacked(words, newest.listeners, what)
}
