package backend

import (
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// patience is how long a trip waits for what. Times are those of the loop's clock.
type patience struct {
	watch  *watch
	header time.Duration // for the head of the answer, from the end of the request
	body   time.Duration // for a byte, while somebody waits for one; 0: without end
	queue  time.Duration // for a connection
	queued time.Duration // when the wait for a connection began
	asked  time.Duration // when the request had gone out; 0: it has not
	moved  time.Duration // when a byte moved
}

// watch is a timer for a trip. Loops keep those that are not in use.
type watch struct {
	station *station
	timer   *loop.Timer
	trip    *trip // nil: it is not in use
	at      time.Duration
}

// station is what the backend keeps on a loop.
type station struct {
	loop    *loop.Loop
	scratch []byte // for what is about to be written
	free    []*watch
}

// maxScratch bounds what a loop keeps for what is about to be written, in bytes.
const maxScratch = 256 << 10

// keep takes back scratch, which has grown maybe.
func (s *station) keep(scratch []byte) {
	if cap(scratch) <= maxScratch {
		s.scratch = scratch[:0]
	}
}

// station is what the backend keeps on a loop of Config.Loops.
func (b *Backend) station(l *loop.Loop) *station { return b.stations[l] }

func (s *station) watch(t *trip) *watch {
	var w *watch
	if last := len(s.free) - 1; last >= 0 {
		w, s.free = s.free[last], s.free[:last]
	} else {
		w = &watch{station: s}
		w.timer = s.loop.Timer(w.look)
	}
	w.trip = t
	return w
}

func (p *patience) start(t *trip) {
	s := t.state.settings
	p.header, p.body, p.queue = s.headerTimeout, s.bodyTimeout, s.queueTimeout()
	p.watch = t.b.station(t.loop).watch(t)
}

// stop gives the watch back.
func (p *patience) stop() {
	if w := p.watch; w != nil {
		p.watch, w.trip = nil, nil
		w.station.free = append(w.station.free, w)
	}
}

// touch notes that a byte has moved.
func (t *trip) touch() { t.moved = t.loop.Now() }

// end is what becomes of a trip that has waited too long.
type end int8

const (
	never    end = iota
	noGrant      // no connection became free
	goAhead      // the body is sent though nobody has asked for it
	noAnswer     // no head of an answer came
	noByte       // no byte moved
)

// due is when the trip's patience ends, and what ends then.
func (t *trip) due() (at time.Duration, what end) {
	u, a := &t.upload, &t.answer
	switch {
	case t.over:
		return 0, never
	case t.waiting:
		return t.queued + t.queue, noGrant
	case t.flow == nil:
		return 0, never // its client is waited for, by the frontend
	case u.held:
		return u.hold, goAhead
	case !a.begun && u.out():
		return t.asked + t.header, noAnswer
	case t.body <= 0:
		return 0, never
	case a.begun && !a.tunnel && (u.out() || u.refused) && (a.ended || a.ahead > 0):
		return 0, never // the client takes its time
	}
	return t.moved + t.body, noByte
}

// await has the trip looked at when its patience ends. It is called when what the
// trip waits for may have changed.
func (t *trip) await() {
	w := t.watch
	if w == nil {
		return
	}
	if t.asked == 0 && t.upload.out() {
		t.asked = t.loop.Now()
	}
	due, what := t.due()
	if what == never || w.timer.Pending() && w.at <= due {
		return // it is looked at in time
	}
	w.at = due
	w.timer.Set(due - t.loop.Now())
}

// look ends the trip's wait if it is time.
func (w *watch) look() {
	if t := w.trip; t != nil {
		t.guarded(t.look)
	}
}

func (t *trip) look() {
	due, what := t.due()
	if what != never && t.loop.Now() >= due {
		t.tooLong(what)
	}
	t.await()
}

func (t *trip) tooLong(what end) {
	switch what {
	case noGrant:
		t.e.leave(t.key, &t.waiter)
		t.attempt(grant{err: fail(ReasonOverloaded, errQueueLate)})
	case goAhead:
		t.wanted()
		t.front.Informational(&exchange.Response{Status: 100, Version: exchange.HTTP11})
	case noAnswer:
		t.fail(fail(ReasonTimeoutHeader, errHeaderLate))
	case noByte:
		waits := t.upload.waitsForClient()
		switch {
		case t.answer.begun:
			t.fail(idleError(waits || t.answer.unknown))
		case waits:
			t.fail(stalledUpload())
		default:
			t.fail(idleError(false))
		}
	}
}
