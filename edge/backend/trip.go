package backend

import (
	"errors"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/balance"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// trip is one request to a pool, or one tunnel, over all its attempts: the exchange's
// Flow. It belongs to the loop of the client.
//
// The request is there as a whole, as far as it has come, until the answer begins
// (upload.go): an attempt can send it again. What an attempt is told by its
// connection comes to the trip as an answer (answer.go), which goes on to the Front.
// How long it waits for what stands in patience.go.
type trip struct {
	b     *Backend
	p     *pool // nil if there is none of that name
	state *poolState
	loop  *loop.Loop
	call  *exchange.Exchange
	r     *exchange.Request // nil for a tunnel of a tcp pool
	front exchange.Front
	key   connKey
	begin time.Time

	over    bool // nothing more is to be done
	silent  bool // nothing more is to be told
	upload  upload
	answer  answered
	tell    func() // tells the Front what was sent; made once
	telling bool
	patience

	// Of all attempts.
	tried   []*balance.Endpoint
	further int  // attempts that may follow
	unread  int  // attempts of which the backend has processed nothing
	fresh   bool // only a connection that has served nothing

	// Of the last attempt.
	e             *endpoint // busy with it; nil: none is
	waiter        waiter
	waiting       bool
	from          time.Time
	flow          exchange.Flow // nil while there is none, and when it is over
	attempted     *balance.Endpoint
	reused, stale bool
}

// Start begins a request to the call's pool. It is called on the loop that the
// exchange belongs to; what is what stands at exchange.Flow. The request is as it
// goes out: Target in origin form, Host left out of its fields. Without an authority
// the SNI takes its place. What goes wrong is an *Error, or the client's own.
func (b *Backend) Start(l *loop.Loop, x *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow {
	t := &trip{b: b, loop: l, call: x, r: r, front: front, begin: time.Now()}
	t.upload.begin(r)
	t.prepare()
	return t
}

// Tunnel opens a connection to an endpoint of the call's pool, whose protocol is
// tcp, and carries bytes, once the Front has been told 101. It ends by itself when
// no byte went in either direction for timeouts.idle.
func (b *Backend) Tunnel(l *loop.Loop, x *exchange.Exchange, front exchange.Front) exchange.Flow {
	t := &trip{b: b, loop: l, call: x, front: front, begin: time.Now()}
	t.upload.length = exchange.UnknownLength
	t.prepare()
	return t
}

// prepare finds the pool, and waits for the first look-up of one without endpoints.
func (t *trip) prepare() {
	p, err := t.b.pool(t.call.Pool)
	if err != nil {
		t.fail(err)
		return
	}
	t.p = p
	if state := p.state.Load(); !state.view.Empty() {
		t.settle(state)
		return
	}
	t.b.spawn("the wait for a look-up", func() {
		state, err := p.awaitMembers(t.b.ctx)
		t.post(func() {
			if err != nil {
				t.fail(err)
				return
			}
			t.settle(state)
		})
	})
}

// settle checks the request, settles what all attempts share, and begins.
func (t *trip) settle(state *poolState) {
	s := state.settings
	t.state, t.further = state, s.retries
	tcp := s.protocol == resealv1.BackendPool_PROTOCOL_TCP
	var err error
	switch t.key.serverName, err = state.serverName(t.call); {
	case t.r != nil && tcp:
		err = fail(ReasonProtocolError, errTunnelsOnly)
	case t.r == nil && !tcp && err == nil:
		err = fail(ReasonProtocolError, errNoTunnel)
	}
	if err != nil {
		t.fail(err)
		return
	}
	t.patience.start(t)
	if t.r != nil {
		if t.r.Authority == "" { // HTTP/1.0 has none, HTTP/1.1 must
			t.r.Authority = t.key.serverName
		}
		t.key.http1 = t.r.Protocol != "" && s.protocol == resealv1.BackendPool_PROTOCOL_AUTO
		if t.call.ResponseHeaderTimeout > 0 {
			t.header = t.call.ResponseHeaderTimeout
		}
	}
	if t.upload.gathers() {
		return // until it has come as a whole
	}
	t.try()
}

// post has f run on the trip's loop, if the trip is not over by then. A bug costs the
// trip.
func (t *trip) post(f func()) { t.loop.Post(func() { t.guarded(f) }) }

func (t *trip) guarded(f func()) {
	if t.over {
		return
	}
	if err := t.b.guarded("an exchange", f); err != nil {
		t.fail(err)
	}
}

// try makes an attempt.
func (t *trip) try() {
	e := t.state.pick(t.call, t.r, t.tried)
	if e == nil {
		t.fail(fail(ReasonNoEndpoint, nil))
		return
	}
	t.call.Attempts++
	if t.e, t.from = e, t.begin; t.call.Attempts > 1 {
		t.from = time.Now()
	}
	e.Begin()
	t.waiter = waiter{
		call: t.call, fresh: t.fresh, raw: t.r == nil, private: t.r != nil && logsInConnection(t.r.Fields), loop: t.loop, by: t,
	}
	g, now := e.acquire(t.key, &t.waiter)
	if now {
		t.attempt(g)
		return
	}
	t.waiting, t.queued = true, t.loop.Now()
	t.await()
}

// granted implements claimant.
func (t *trip) granted(g grant) { t.guarded(func() { t.attempt(g) }) }

// attempt begins an attempt on a connection.
func (t *trip) attempt(g grant) {
	t.waiting = false
	t.reused, t.stale = g.reused, g.stale
	if g.on == nil {
		t.call.Endpoint, t.call.Connect = t.e.Address, time.Since(t.from)
		t.failed(g.err)
		return
	}
	g.fill(t.call)
	if !g.reused {
		t.call.Connect = min(g.on.Took, time.Since(t.from))
	}
	if g.err != nil {
		t.failed(g.err)
		return
	}
	if t.r == nil {
		t.e.Succeeded()
	}
	t.upload.attempt(t.loop.Now())
	t.asked = 0
	t.touch()
	t.flow = g.carry(t.loop, t.call, t.outgoing(), (*told)(t))
	t.send()
	t.await()
}

// tunnelled is what carriers are told of a tunnel.
var tunnelled exchange.Request

func (t *trip) outgoing() *exchange.Request {
	if t.r == nil {
		return &tunnelled
	}
	return t.r
}

// failed is the end of an attempt that brought no answer. It makes another one or
// gives up.
func (t *trip) failed(err error) {
	t.flow = nil
	if e := refusedRenegotiation(err); e != nil {
		err = e
	}
	var lost *lostError
	if errors.As(err, &lost) && !t.stale && !lost.unread && !t.upload.underWay() {
		t.endAttempt(fail(ReasonReset, err))
	} else {
		t.endAttempt(err)
	}
	if t.unread < maxUnread && t.turnedAway(lost) {
		t.unread++
		t.fresh = t.fresh || !lost.lives
		t.try()
		return
	}
	again, died := t.again(err, lost)
	if !again || t.further <= 0 {
		t.fail(t.final(err, lost))
		return
	}
	t.further--
	// A connection that died says little about its endpoint, so the next try may go
	// there, but not on another old connection of HTTP/1.
	if died {
		t.fresh = t.fresh || !lost.lives
	} else {
		t.tried = append(t.tried, t.attempted)
	}
	t.try()
}

// maxUnread bounds how often a request is sent again because no backend had begun
// to process it, in addition to retries.attempts.
const maxUnread = 10

// turnedAway reports whether a failed attempt is one of which the backend has
// certainly processed nothing, so that any request may be sent again: HTTP/2 says
// so by GOAWAY or REFUSED_STREAM (RFC 9113 section 8.7), and a connection that
// had died before it got a byte need not say it.
func (t *trip) turnedAway(lost *lostError) bool {
	return lost != nil && !lost.written && (lost.unread || t.stale) && t.upload.whole()
}

// again reports whether a failed attempt allows another one, and whether its
// connection had died.
func (t *trip) again(err error, lost *lostError) (again, died bool) {
	s := t.state.settings
	switch {
	case lost == nil:
		return neverConnected(err) && s.retryConnect && t.upload.whole(), false
	case !t.stale && lost.written:
		return false, false
	}
	return s.retryStale && t.upload.whole() && (!lost.written || t.repeatable()), true
}

// neverConnected reports whether no connection was made.
func neverConnected(err error) bool {
	switch reasonOf(err) {
	case ReasonConnectFailure, ReasonHandshakeFailure, ReasonVerifyFailure, ReasonLocalFailure:
		return true
	}
	return false
}

// repeatable reports whether the request may be sent twice: it is idempotent
// (RFC 9110 section 9.2.2), and its body is absent or is there as a whole.
func (t *trip) repeatable() bool {
	if t.r == nil {
		return false
	}
	switch t.r.Method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return t.upload.whole()
	}
	return false
}

// retriesStatus reports whether the answer's status asks for another attempt, which
// then has begun.
func (t *trip) retriesStatus(status int) bool {
	if t.further <= 0 || !slices.Contains(t.state.settings.retryStatuses, status) || !t.repeatable() {
		return false
	}
	t.further--
	t.endAttempt(nil)
	t.tried = append(t.tried, t.attempted)
	if flow := t.flow; flow != nil {
		t.flow = nil
		flow.Abort(errRepeated)
	}
	t.try()
	return true
}

// final turns the error of the last attempt into the client's.
func (t *trip) final(err error, lost *lostError) error {
	switch {
	case lost != nil && t.stale:
		return fail(ReasonStaleConnection, lost.err)
	case lost != nil:
		return fail(ReasonReset, lost.err)
	}
	return err
}

// endAttempt notes that an endpoint is no longer busy with the request, and what that
// says about the endpoint.
func (t *trip) endAttempt(err error) {
	e := t.e
	if e == nil {
		return
	}
	t.e, t.attempted = nil, e.Endpoint
	e.End()
	if ofEndpoint(err) {
		e.pool.balancer.Failed(e.Endpoint)
	}
}

// fail ends the trip. The Front is told later, since the trip may have been called by
// its owner.
func (t *trip) fail(err error) {
	if t.over {
		return
	}
	if e := (*Error)(nil); errors.As(err, &e) {
		t.call.Status, t.call.Reason = e.HTTPStatus()
		t.call.Blame = blameOf(err)
	}
	t.finish(err)
	t.loop.Post(func() {
		if !t.silent {
			t.front.Failed(err)
		}
	})
}

// finish ends the trip and counts it. err is what failed on this leg, if anything.
func (t *trip) finish(err error) {
	if t.over {
		return
	}
	t.over = true
	t.patience.stop()
	if t.waiting {
		t.waiting = false
		t.e.leave(t.key, &t.waiter)
	}
	if flow := t.flow; flow != nil {
		t.flow = nil
		flow.Abort(err)
	}
	t.endAttempt(err)
	if t.p == nil {
		return
	}
	t.p.counters.Request(t.reused, time.Since(t.begin))
	if ofPool(err) {
		t.p.counters.Error(reasonOf(err))
	}
}

// Abort implements exchange.Flow.
func (t *trip) Abort(cause error) {
	t.silent = true
	t.finish(cause)
}
