package frontend

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// statusClientClosed is logged for requests that the client gave up. It is never
// sent. nginx made the number common.
const statusClientClosed = 499

// known is an error that says what the client is told.
type known interface {
	HTTPStatus() (code int, reason string)
}

// blame is what an error of the upstream amounts to.
func blame(err error) (status int, reason string) {
	var says known
	if errors.As(err, &says) {
		return says.HTTPStatus()
	}
	return http.StatusBadGateway, "upstream_error"
}

// Informational implements exchange.Front.
func (q *request) Informational(r *exchange.Response) {
	switch {
	case q.answered || r.Status == http.StatusSwitchingProtocols:
	case r.Status == http.StatusContinue && !q.expects:
	default:
		q.expects = q.expects && r.Status != http.StatusContinue // told once
		q.stream.informational(r)
	}
}

// Response implements exchange.Front.
func (q *request) Response(r *exchange.Response, end bool) {
	switch {
	case q.raw:
		q.tunnel, q.answered = true, true
		q.came, q.took = q.client.now(), q.client.now()
		_ = q.stream.respond(r, false) // says nothing, and so can't fail
		return
	case r.Status == http.StatusSwitchingProtocols:
		if q.head.Protocol == "" || !strings.EqualFold(q.head.Protocol, r.Protocol) {
			q.stop(http.StatusBadGateway, "protocol_error", fmt.Errorf("the backend switches to %q", r.Protocol))
			return
		}
		q.tunnel, q.ended, q.timeout = true, false, 0
		q.came, q.took = q.client.now(), q.client.now()
		q.client.remind(q.state.settings.idle)
	case r.Status < 200:
		q.stop(http.StatusBadGateway, "protocol_error", fmt.Errorf("the final status is %d", r.Status))
		return
	}
	edit(&r.Fields, q.match.ResponseHeaders)
	if err := q.respond(r, end); err != nil {
		q.stop(http.StatusBadGateway, "protocol_error", err)
	}
}

// respond sends the head of an answer. Its errors say that it can't be written as
// it is.
func (q *request) respond(r *exchange.Response, end bool) error {
	if !r.Fields.Has("Date") && !q.tunnel {
		r.Fields.Add("Date", q.client.lane.today(time.Now())) // RFC 9110 section 6.6.1
	}
	if err := q.stream.respond(r, end); err != nil {
		q.ended, q.tunnel = q.ended || q.tunnel, false
		return err
	}
	q.status, q.answered = r.Status, true
	if !q.tunnel {
		q.client.slot.counters.Add(exchange.Waits.At(exchange.Wait(time.Since(q.started))), 1)
	}
	if end {
		q.endAnswer()
	}
	return nil
}

// Data implements exchange.Front.
func (q *request) Data(p []byte, end bool) {
	if q.untaken == 0 {
		q.took = q.client.now()
	}
	if end && q.ended {
		q.flow = nil // the exchange is over
	}
	q.out += int64(len(p))
	q.untaken += len(p)
	if err := q.stream.data(p, end); err != nil {
		q.misfit(err)
		return
	}
	if q.untaken > 0 {
		q.client.remind(q.state.settings.idle)
	}
	if end {
		q.endAnswer()
	}
}

// misfit ends a request whose answer the stream does not take on.
func (q *request) misfit(err error) {
	status, reason := http.StatusBadGateway, "protocol_error"
	var says known
	if errors.As(err, &says) {
		status, reason = says.HTTPStatus()
		q.client.slot.counters.Error(reason)
	}
	q.stop(status, reason, err)
}

// End implements exchange.Front.
func (q *request) End(trailers exchange.Fields) {
	if err := q.stream.end(trailers); err != nil {
		q.misfit(err)
		return
	}
	q.endAnswer()
}

// endAnswer follows the end of the answer, or of the backend's direction of a tunnel.
func (q *request) endAnswer() {
	q.complete = true
	if q.ended {
		q.flow = nil
	}
	switch {
	case q.ended || q.tunnel || q.done:
		q.settle()
	case q.unwanted:
		q.giveUp()
	default:
		q.lingers, q.lingersTo = q.client.now()+lingerTime, q.in+lingerBytes
		q.client.remind(lingerTime)
	}
}

// Sent implements exchange.Front.
func (q *request) Sent(n int) {
	if q.done {
		return
	}
	if q.ahead -= n; q.ahead == 0 {
		q.came = q.client.now() // from now on the client is waited for
	}
	q.stream.accept(n)
}

// Failed implements exchange.Front.
func (q *request) Failed(err error) {
	q.flow = nil
	status, reason := blame(err)
	if q.tunnel && reason == "upstream_error" {
		reason = "reset"
	}
	if reason == "internal" {
		q.client.slot.counters.Error(reason)
	}
	q.stop(status, reason, err)
}

// stop ends a request that can't go on: with an answer if none has begun, and
// otherwise so that the client sees that it is cut.
func (q *request) stop(status int, reason string, err error) {
	if q.done {
		return
	}
	q.lose(err)
	if !q.answered && !q.raw && status != statusClientClosed {
		q.err = err
		q.fail(status, reason)
		return
	}
	q.became(status, reason, err)
	q.cut()
}

// cut ends a request so that the client sees that it has no answer, or no end of one.
func (q *request) cut() {
	q.stream.cut()
	q.finish()
	q.stream.over()
}

// lose gives up what is under way behind.
func (q *request) lose(err error) {
	if flow := q.flow; flow != nil {
		q.flow = nil
		if err == nil {
			err = errRefused
		}
		flow.Abort(err)
	}
}

// became notes why the request ended early. A status that the client was told
// stays, but for one who did not wait for the end.
func (q *request) became(status int, reason string, err error) {
	if !q.tunnel && (q.status == 0 || status == statusClientClosed) {
		q.status = status
	}
	q.reason, q.err = reason, err
}

// fail answers with an error. The body is short, plain text.
func (q *request) fail(status int, reason string) {
	q.reason = reason
	text := fmt.Sprintf("%d %s: %s\n", status, http.StatusText(status), reason)
	r := exchange.Response{Status: status, Length: int64(len(text)), Version: exchange.HTTP11, Fields: exchange.Fields{
		{Name: "Content-Type", Value: "text/plain; charset=utf-8"},
		{Name: "Cache-Control", Value: "no-store"},
		{Name: ReasonHeader, Value: reason},
	}}
	bare := q.head.Method == http.MethodHead
	switch err := q.respond(&r, bare); {
	case err != nil:
		q.became(status, reason, err)
		q.cut()
	case !bare:
		q.Data([]byte(text), true)
	}
}

// settle ends the request once both messages have ended and the client has taken
// all of the answer.
func (q *request) settle() {
	if !q.ended || !q.complete || q.untaken > 0 || q.done {
		return
	}
	q.finish()
	q.stream.over()
	if q.reason == "" && !q.unwanted {
		requests := &q.client.lane.requests
		*q = request{}
		requests.keep(q)
	}
}

// giveUp does without the rest of the body, after the answer.
func (q *request) giveUp() {
	q.lose(errAnswered)
	q.unwanted, q.ended, q.lingers = true, true, 0
	q.settle()
}

// finish counts and logs the request and lets go of it.
func (q *request) finish() {
	q.done = true
	slot := q.client.slot
	slot.frontend.memory.give(q.held)
	duration := time.Since(q.started)
	slot.counters.Add(exchange.Answers.At(q.status), 1)
	slot.counters.Request(!q.x.First, duration)
	if !q.answered && !q.raw { // in vain
		slot.counters.Add(exchange.Waits.At(exchange.Wait(duration)), 1)
	}
	q.log(duration)
	q.tell(duration)
}
