package loop

import "net/netip"

// bias is how many handshakes that are likely to be resumptions go before one that
// is not, while both wait.
const bias = 4

// turns decides whose handshake goes on. It knows no time and no goroutines: the
// Handshakes around it guard it, and start those that next returns.
//
// A handshake has the right to compute, or rests while it waits for its client.
// Those that were begun go on before others begin: their clients hold memory, and
// little is left to be done for them.
type turns struct {
	computing, maxComputing int
	begun, maxBegun         int
	waiting, maxWaiting     int

	again  []*turn // were begun and want to compute again
	likely queues
	full   queues
	inARow int // likely ones, since the last full one
}

// turn is one handshake.
type turn struct {
	source netip.Addr
	likely bool          // it will be a resumption
	goes   chan struct{} // holds a token when it may compute, or is refused
	bad    bool          // it is refused; set before goes
	pool   *Handshakes
}

// queues are those that wait, in one queue per source; sources take turns.
type queues struct {
	bySource map[netip.Addr]*queue
	order    []*queue
}

type queue struct {
	source netip.Addr
	turns  []*turn
}

func (t *turns) class(of *turn) *queues {
	if of.likely {
		return &t.likely
	}
	return &t.full
}

// enter queues a handshake. When too many wait, the newest of the source with the
// most is refused and returned: it may be this one.
func (t *turns) enter(newcomer *turn) (refused *turn) {
	t.class(newcomer).push(newcomer)
	if t.waiting++; t.waiting <= t.maxWaiting {
		return nil
	}
	t.waiting--
	in := t.class(newcomer)
	longest := in.bySource[newcomer.source]
	for _, class := range []*queues{&t.full, &t.likely} {
		if other := class.longest(); other != nil && len(other.turns) > len(longest.turns) {
			longest, in = other, class
		}
	}
	return in.dropNewest(longest)
}

// next returns a handshake that may compute now, or nil.
func (t *turns) next() *turn {
	if t.computing >= t.maxComputing {
		return nil
	}
	if len(t.again) > 0 {
		first := t.again[0]
		t.again = t.again[1:]
		t.computing++
		return first
	}
	if t.begun >= t.maxBegun || t.waiting == 0 {
		return nil
	}
	from := &t.likely
	if len(from.order) == 0 || len(t.full.order) > 0 && t.inARow >= bias {
		from, t.inARow = &t.full, 0
	} else {
		t.inARow++
	}
	t.waiting--
	t.begun++
	t.computing++
	return from.pop()
}

// rest gives the right to compute back until resume.
func (t *turns) rest() { t.computing-- }

// resume asks for the right to compute again.
func (t *turns) resume(turn *turn) { t.again = append(t.again, turn) }

// done ends a handshake that computes.
func (t *turns) done() {
	t.computing--
	t.begun--
}

func (q *queues) push(t *turn) {
	of := q.bySource[t.source]
	if of == nil {
		of = &queue{source: t.source}
		if q.bySource == nil {
			q.bySource = map[netip.Addr]*queue{}
		}
		q.bySource[t.source] = of
		q.order = append(q.order, of)
	}
	of.turns = append(of.turns, t)
}

// pop takes the oldest of the source whose turn it is.
func (q *queues) pop() *turn {
	of := q.order[0]
	q.order = q.order[1:]
	first := of.turns[0]
	of.turns = of.turns[1:]
	if len(of.turns) > 0 {
		q.order = append(q.order, of)
	} else {
		delete(q.bySource, of.source)
	}
	return first
}

func (q *queues) longest() (longest *queue) {
	for _, of := range q.order {
		if longest == nil || len(of.turns) > len(longest.turns) {
			longest = of
		}
	}
	return longest
}

func (q *queues) dropNewest(of *queue) *turn {
	last := len(of.turns) - 1
	newest := of.turns[last]
	of.turns = of.turns[:last]
	if last == 0 {
		delete(q.bySource, of.source)
		for i, other := range q.order {
			if other == of {
				q.order = append(q.order[:i], q.order[i+1:]...)
				break
			}
		}
	}
	return newest
}
