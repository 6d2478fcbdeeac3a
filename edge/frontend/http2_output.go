package frontend

import (
	"slices"

	"github.com/reseal/reseal/edge/http2"
)

const (
	// outputPart is what a stream sends in its turn, in bytes, when several wait.
	outputPart = 16 << 10
	// evenTurn is after how many turns one goes to the stream that has waited longest,
	// whatever its urgency, so that nothing starves.
	evenTurn = 16
)

// http2Output decides which of the streams whose answers wait for the client is
// served next (RFC 9218 section 10). What need not wait doesn't come here.
type http2Output struct {
	full    bool // the connection takes no more for now
	stuck   bool // all that wait lack a window
	waiting []*http2Stream
	turn    uint64
	ordered uint64 // the turn of the last stream that was served in order
}

// add has a stream wait.
func (o *http2Output) add(s *http2Stream) {
	if !slices.Contains(o.waiting, s) {
		s.turn = o.turn
		o.waiting = append(o.waiting, s)
	}
	o.stuck = false
}

func (o *http2Output) remove(s *http2Stream) {
	if at := slices.Index(o.waiting, s); at >= 0 {
		o.waiting = slices.Delete(o.waiting, at, at+1)
	}
}

// next returns the stream whose turn it is, among those that may send, or nil. The
// most urgent go first. Among equals those take turns whose clients make use of
// parts of an answer, or have not said that they don't; the others are served whole
// and in the order of their requests, and have one turn together.
func (o *http2Output) next(machine *http2.Conn) *http2Stream {
	o.turn++
	var shared, inOrder, longest *http2Stream
	urgency := uint8(255)
	for _, s := range o.waiting {
		if machine.Writable(s.id) == 0 {
			continue
		}
		if longest == nil || s.turn < longest.turn {
			longest = s
		}
		if s.priority.Urgency > urgency {
			continue
		}
		if s.priority.Urgency < urgency {
			urgency, shared, inOrder = s.priority.Urgency, nil, nil
		}
		if s.prioritized && !s.priority.Incremental {
			if inOrder == nil || s.id < inOrder.id {
				inOrder = s
			}
		} else if shared == nil || s.turn < shared.turn {
			shared = s
		}
	}
	best := shared
	switch {
	case longest == nil:
		return nil
	case o.turn%evenTurn == 0:
		best = longest
	case inOrder != nil && (shared == nil || o.ordered <= shared.turn):
		best = inOrder
	}
	if best == inOrder {
		o.ordered = o.turn
	}
	best.turn = o.turn
	return best
}

// push sends of what waits as much as the client takes.
func (d *http2Driver) push() {
	o := &d.output
	for !o.full && !o.stuck && len(o.waiting) > 0 {
		if s := o.next(d.machine); s != nil {
			s.push()
		} else {
			o.stuck = true
		}
	}
}

// push sends a part of what waits.
func (s *http2Stream) push() {
	d := s.driver
	part := s.kept[s.at:]
	last := len(part) <= outputPart
	part = part[:min(len(part), outputPart)]
	out, n, err := d.machine.AppendData(d.client.lane.out[:0], s.id, part, last && s.ended && len(s.trailers) == 0)
	s.give(n)
	if s.at += n; err == nil && !s.waits() {
		d.output.remove(s)
		s.kept, s.at = nil, 0
		if s.ended && len(s.trailers) > 0 {
			out, err = s.appendEnd(out, s.trailers)
		}
	}
	d.write(out)
	if err != nil { // trailers that the client would not take
		d.machine.Reset(s.id, http2.InternalError)
		s.abandon(err)
		return
	}
	s.request.taken(n) // may be the end of it
}
