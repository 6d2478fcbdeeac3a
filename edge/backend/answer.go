package backend

import (
	"errors"

	"github.com/reseal/reseal/edge/exchange"
)

// answered is what has come of an answer.
type answered struct {
	begun   bool
	tunnel  bool
	ended   bool
	unknown bool // nobody knows how long the body is
	ahead   int  // bytes that the Front has and has not consumed
}

// told is a trip as the connection of its attempt sees it: the Front of what that
// carries.
type told trip

// Informational implements exchange.Front.
func (a *told) Informational(r *exchange.Response) {
	t := (*trip)(a)
	if r.Status == 100 {
		t.wanted()
	}
	if !t.over {
		t.front.Informational(r)
		t.await()
	}
}

// Response implements exchange.Front.
func (a *told) Response(r *exchange.Response, end bool) {
	t := (*trip)(a)
	t.touch()
	if t.r != nil {
		t.state.view.Answered(t.e.Endpoint, r.Status)
	}
	if end && t.upload.ended {
		t.flow = nil
	}
	if t.retriesStatus(r.Status) {
		return
	}
	t.answer = answered{begun: true, tunnel: r.Status == 101, ended: end, unknown: r.Length < 0}
	t.upload.settle()
	switch {
	case t.answer.tunnel && t.r != nil: // both directions begin anew
		t.upload.ended, t.upload.length = false, exchange.UnknownLength
	case t.upload.held:
		t.upload.held, t.upload.refused = false, true
		t.upload.gone = t.upload.total // what has come is thrown away
		t.sentLater()
	}
	if end {
		t.answerEnded()
	}
	t.front.Response(r, end)
	t.await()
}

// Data implements exchange.Front.
func (a *told) Data(p []byte, end bool) {
	t := (*trip)(a)
	t.touch()
	t.answer.ahead += len(p)
	if end {
		t.answerEnded()
	}
	t.front.Data(p, end)
	t.await()
}

// End implements exchange.Front.
func (a *told) End(trailers exchange.Fields) {
	t := (*trip)(a)
	t.answerEnded()
	t.front.End(trailers)
	t.await()
}

// answerEnded notes that the answer has ended. The trip is over if the request has
// ended, too, or if its body was not wanted.
func (t *trip) answerEnded() {
	t.answer.ended = true
	switch {
	case t.upload.refused:
		t.finish(nil)
	case t.upload.ended:
		t.flow = nil
		t.finish(nil)
	}
}

// Failed implements exchange.Front.
func (a *told) Failed(err error) {
	t := (*trip)(a)
	if !t.answer.begun {
		t.failed(err)
		return
	}
	t.flow = nil
	var lost *lostError
	switch {
	case t.answer.ended:
		t.finish(nil) // only the rest of the request, which nobody wants, did not go out
	case errors.As(err, &lost) && t.answer.tunnel:
		t.fail(resetError(lost, false).blamed(blameNobody)) // whose turn it was nobody knows
	case errors.As(err, &lost):
		t.fail(resetError(lost, t.upload.underWay()))
	default:
		t.fail(err)
	}
}

// Sent implements exchange.Front. Carriers may call it from within Data.
func (a *told) Sent(n int) {
	t := (*trip)(a)
	t.touch()
	t.upload.gone += n
	t.sentLater()
	t.await()
}

// Consumed implements exchange.Flow.
func (t *trip) Consumed(n int) {
	if t.over {
		return
	}
	if t.answer.ahead -= min(n, t.answer.ahead); t.answer.ahead == 0 {
		t.touch()
	}
	if t.flow != nil {
		t.flow.Consumed(n)
	}
	t.await()
}
