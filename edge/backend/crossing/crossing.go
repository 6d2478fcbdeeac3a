// Package crossing carries exchanges between two loops: from the one of a client's
// connection to the one of a backend's. What happens in a round of one loop crosses
// as a whole, copied, by one posted call. Windows are kept: the Flow and the Front
// at the ends still count what they hand on and what was consumed.
package crossing

import (
	"slices"
	"sync/atomic"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// Place is a place for a request on a connection of another loop. One of its methods
// is called, once, on that loop.
type Place interface {
	// Begin begins an exchange: see exchange.Flow.
	Begin(client uint64, r *exchange.Request, front exchange.Front) exchange.Flow
	// Drop gives the place back unused.
	Drop()
}

// Lanes lead from each of some loops to each other one.
type Lanes map[way]*lane

type way struct{ from, to *loop.Loop }

// New makes the lanes between loops.
func New(loops []*loop.Loop) Lanes {
	lanes := Lanes{}
	for _, from := range loops {
		for _, to := range loops {
			if from != to {
				lanes[way{from, to}] = newLane(to)
			}
		}
	}
	return lanes
}

// Begin begins an exchange on loop far for a Front on loop near, from which it is
// called. r is copied. The place is used later, or dropped if the exchange is
// aborted before. client is what the place's Begin gets.
func (l Lanes) Begin(near, far *loop.Loop, place Place, client uint64, r *exchange.Request, front exchange.Front) exchange.Flow {
	c := &crossing{
		up: l[way{near, far}], down: l[way{far, near}],
		place: place, client: client, front: front, request: *r, sent: r.Length == 0,
	}
	c.request.Fields = slices.Clone(r.Fields)
	if !c.up.say(word{c: c, kind: begins}, nil) {
		// The loop has ended, and with it the connection.
		c.down.say(word{c: c, kind: failed, err: loop.ErrStopped}, nil)
	}
	return c
}

// crossing is an exchange between two loops. It is the Flow of the near one.
type crossing struct {
	up, down *lane

	// Of the near loop.
	front   exchange.Front
	sent    bool // the request has ended
	done    bool // the answer has
	over    bool // nothing is called any more
	dropped atomic.Bool

	// Of the far loop.
	place   Place
	client  uint64
	request exchange.Request
	flow    exchange.Flow
	farSent bool // the request has ended there, as farDone says of the answer
	farDone bool
	farOver bool
}

// Data implements exchange.Flow.
func (c *crossing) Data(p []byte, end bool) {
	if !c.over {
		c.up.say(word{c: c, kind: data, n: len(p), end: end}, p)
		c.sent = end
		c.over = c.sent && c.done
	}
}

// End implements exchange.Flow.
func (c *crossing) End(trailers exchange.Fields) {
	if !c.over {
		c.up.say(word{c: c, kind: ended, trailers: slices.Clone(trailers)}, nil)
		c.sent = true
		c.over = c.done
	}
}

// Consumed implements exchange.Flow.
func (c *crossing) Consumed(n int) {
	if !c.over {
		c.up.say(word{c: c, kind: consumed, n: n}, nil)
	}
}

// Abort implements exchange.Flow.
func (c *crossing) Abort(cause error) {
	if !c.over {
		c.over = true
		c.dropped.Store(true)
		c.up.say(word{c: c, kind: aborted, err: cause}, nil)
	}
}

// arriveFar takes a word of the near loop.
func (c *crossing) arriveFar(w *word, p []byte) {
	switch {
	case c.farOver:
		return
	case w.kind == begins && c.dropped.Load():
		c.farOver = true
		c.place.Drop()
		return
	}
	switch w.kind {
	case begins:
		c.farSent = c.request.Length == 0
		c.flow = c.place.Begin(c.client, &c.request, (*answer)(c))
	case data:
		c.farSent = w.end
		c.flow.Data(p, w.end)
	case ended:
		c.farSent = true
		c.flow.End(w.trailers)
	case consumed:
		c.flow.Consumed(w.n)
	case aborted:
		c.farOver = true
		c.flow.Abort(w.err)
	}
	c.farOver = c.farOver || c.farSent && c.farDone
}

// answer is a crossing as the Front of the far loop.
type answer crossing

// say tells the near loop. If that has ended, so has the client's connection.
func (a *answer) say(w word, p []byte) {
	if a.farOver {
		return
	}
	w.c = (*crossing)(a)
	if !a.down.say(w, p) {
		a.farOver = true
		a.flow.Abort(loop.ErrStopped)
	}
}

// Informational implements exchange.Front.
func (a *answer) Informational(r *exchange.Response) {
	a.say(word{kind: informational, response: *r}, nil)
}

// Response implements exchange.Front.
func (a *answer) Response(r *exchange.Response, end bool) {
	a.farDone = end
	a.say(word{kind: response, response: *r, end: end}, nil)
}

// Data implements exchange.Front.
func (a *answer) Data(p []byte, end bool) {
	a.farDone = end
	a.say(word{kind: data, n: len(p), end: end}, p)
}

// End implements exchange.Front.
func (a *answer) End(trailers exchange.Fields) {
	a.farDone = true
	a.say(word{kind: ended, trailers: trailers}, nil)
}

// Failed implements exchange.Front.
func (a *answer) Failed(err error) {
	a.say(word{kind: failed, err: err}, nil)
	a.farOver = true
}

// Sent implements exchange.Front.
func (a *answer) Sent(n int) { a.say(word{kind: sentOn, n: n}, nil) }

// arriveNear takes a word of the far loop.
func (c *crossing) arriveNear(w *word, p []byte) {
	if c.over {
		return
	}
	switch w.kind {
	case informational:
		c.front.Informational(&w.response)
	case response:
		c.answerEnds(w.end)
		c.front.Response(&w.response, w.end)
	case data:
		c.answerEnds(w.end)
		c.front.Data(p, w.end)
	case ended:
		c.answerEnds(true)
		c.front.End(w.trailers)
	case sentOn:
		c.front.Sent(w.n)
	case failed:
		c.over = true
		c.front.Failed(w.err)
	}
}

func (c *crossing) answerEnds(end bool) {
	c.done = end
	c.over = c.sent && c.done
}
