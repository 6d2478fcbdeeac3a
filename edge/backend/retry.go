package backend

import (
	"errors"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/balance"
	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// trip is one request to a pool, over all its attempts.
type trip struct {
	p        *pool
	state    *poolState
	call     *exchange.Exchange
	req      *http.Request
	body     *requestBody
	key      connKey
	header   time.Duration // the time-out for the response header
	begin    time.Time
	reused   bool // of the last attempt, as what follows
	stale    bool
	finished atomic.Bool
}

// finish counts the request, once. err is what failed on this leg, if anything.
func (x *trip) finish(err error) {
	if !x.finished.CompareAndSwap(false, true) {
		return
	}
	x.p.counters.Request(x.reused, time.Since(x.begin))
	if ofPool(err) {
		x.p.counters.Error(reasonOf(err))
	}
}

// attempt is one try at one endpoint.
type attempt struct {
	x     *trip
	e     *endpoint
	over  atomic.Bool
	parts atomic.Int32 // of two: the transfer is over, the response is accepted
	err   error        // how the transfer ended
}

// done notes that the transfer of an attempt that got a response is over. Only
// the first end counts.
func (a *attempt) done(err error) {
	if a.end(err) {
		a.err = err
		a.part()
	}
}

// part finishes the request once its transfer is over and its response has
// gone to the caller. An attempt that is repeated is never accepted.
func (a *attempt) part() {
	if a.parts.Add(1) == 2 {
		a.x.finish(a.err)
	}
}

// end notes that the endpoint is no longer busy with the attempt, and what
// that says about the endpoint. It returns false if that is known already.
func (a *attempt) end(err error) bool {
	if !a.over.CompareAndSwap(false, true) {
		return false
	}
	a.e.End()
	if ofEndpoint(err) {
		a.e.pool.balancer.Failed(a.e.Endpoint)
	}
	return true
}

// answered notes a response's status.
func (a *attempt) answered(status int) {
	a.x.state.view.Answered(a.e.Endpoint, status)
}

// lostError is a connection that ended before a byte of the response came.
type lostError struct {
	err     error
	written bool // a byte of the request may have gone out
	lives   bool // only the request was turned away: the connection may live on
	unread  bool // the peer said that it has not processed the request
	upload  bool // the client's body was still being sent, which the endpoint may not have wanted
}

func (e *lostError) Error() string { return e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

func (p *pool) roundTrip(req *http.Request, call *exchange.Exchange) (*http.Response, error) {
	x := &trip{p: p, call: call, req: req, begin: time.Now()}
	resp, err := x.run()
	if err != nil {
		x.finish(err)
		return nil, told(call, err)
	}
	return resp, nil
}

// prepare checks the request and settles what all attempts share.
func (x *trip) prepare() error {
	state, err := x.p.awaitMembers(x.req.Context())
	if err != nil {
		return err
	}
	x.state = state
	if state.settings.protocol == resealv1.BackendPool_PROTOCOL_TCP {
		return fail(ReasonProtocolError, errTunnelsOnly)
	}
	if x.key.serverName, err = state.serverName(x.call); err != nil {
		return err
	}
	if x.req.Host == "" { // HTTP/1.0 has none, HTTP/1.1 must
		x.req = x.req.WithContext(x.req.Context())
		x.req.Host = x.key.serverName
	}
	if err := checkRequest(x.req); err != nil {
		return fail(ReasonBadRequest, err)
	}
	x.key.http1 = wantsUpgrade(x.req) != "" && state.settings.protocol == resealv1.BackendPool_PROTOCOL_AUTO
	x.header = state.settings.headerTimeout
	if x.call.ResponseHeaderTimeout > 0 {
		x.header = x.call.ResponseHeaderTimeout
	}
	x.body, err = newRequestBody(x.req)
	if err != nil && x.req.Context().Err() != nil {
		return x.req.Context().Err()
	}
	return err
}

// run tries until an attempt succeeds or must not be repeated.
func (x *trip) run() (*http.Response, error) {
	if err := x.prepare(); err != nil {
		closeBody(x.req.Body)
		return nil, err
	}
	done := false
	defer func() {
		if !done {
			x.body.discard()
		}
	}()
	var tried []*balance.Endpoint
	fresh, unread := false, 0
	for further := x.state.settings.retries; ; further-- {
		e := x.state.pick(x.call, x.req, tried)
		if e == nil {
			return nil, fail(ReasonNoEndpoint, nil)
		}
		x.call.Attempts++
		resp, a, err := x.try(e, fresh)
		if unread < maxUnread && x.turnedAway(err) {
			unread++
			further++ // this one doesn't count
			fresh = fresh || !lives(err)
			continue
		}
		again, died := x.again(resp, err)
		if again && further > 0 && x.req.Context().Err() == nil {
			if resp != nil {
				resp.Body.Close()
			}
			// A connection that died says little about its endpoint, so the
			// next try may go there, but not on another old connection of
			// HTTP/1.
			if !died {
				tried = append(tried, e.Endpoint)
			}
			fresh = fresh || died && !lives(err)
			continue
		}
		if err != nil {
			return nil, x.final(err)
		}
		done = true
		x.body.settle()
		a.part()
		return resp, nil
	}
}

// maxUnread bounds how often a request is sent again because no backend had begun
// to process it, in addition to retries.attempts.
const maxUnread = 10

// turnedAway reports whether a failed attempt is one of which the backend has
// certainly processed nothing, so that any request may be sent again: HTTP/2 says
// so by GOAWAY or REFUSED_STREAM (RFC 9113 section 8.7), and a connection that
// had died before it got a byte need not say it.
func (x *trip) turnedAway(err error) bool {
	var lost *lostError
	return errors.As(err, &lost) && !lost.written && (lost.unread || x.stale) &&
		x.body.replayable() && x.req.Context().Err() == nil
}

// lives reports whether only the request was turned away.
func lives(err error) bool {
	var lost *lostError
	return errors.As(err, &lost) && lost.lives
}

// again reports whether the outcome of an attempt allows another one, and
// whether its connection had died.
func (x *trip) again(resp *http.Response, err error) (again, died bool) {
	s := x.state.settings
	if err == nil {
		return slices.Contains(s.retryStatuses, resp.StatusCode) && x.repeatable(), false
	}
	var lost *lostError
	if errors.As(err, &lost) {
		if !x.stale && lost.written {
			return false, false
		}
		return s.retryStale && x.body.replayable() && (!lost.written || x.repeatable()), true
	}
	return neverConnected(err) && s.retryConnect && x.body.replayable(), false
}

// repeatable reports whether the request may be sent twice: it is idempotent
// (RFC 9110 section 9.2.2), and its body is absent or can be read again.
func (x *trip) repeatable() bool {
	switch x.req.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return x.body.replayable()
	}
	return false
}

// final turns an attempt's error into the caller's.
func (x *trip) final(err error) error {
	var lost *lostError
	switch {
	case x.req.Context().Err() != nil && reasonOf(err) == "":
		return x.req.Context().Err()
	case errors.As(err, &lost) && x.stale:
		return fail(ReasonStaleConnection, lost.err)
	case errors.As(err, &lost):
		return fail(ReasonReset, lost.err)
	}
	return err
}

// try makes one attempt at e.
func (x *trip) try(e *endpoint, fresh bool) (*http.Response, *attempt, error) {
	a := &attempt{x: x, e: e}
	e.Begin()
	ctx := x.req.Context()
	begin := time.Now()
	g, err := e.acquire(ctx, x.key, &waiter{call: x.call, fresh: fresh, private: logsInConnection(x.req.Header)})
	if err != nil {
		x.call.Endpoint, x.call.Connect = e.Address, time.Since(begin)
		x.reused, x.stale = false, false
		a.end(err)
		return nil, a, err
	}
	x.reused, x.stale = g.reused, g.stale
	var resp *http.Response
	if g.h2 != nil {
		g.h2.fill(x.call, protocolHTTP2, g.reused)
		resp, err = g.h2.roundTrip(ctx, a)
	} else {
		g.h1.fill(x.call, protocolHTTP1, g.reused)
		resp, err = g.h1.roundTrip(ctx, a)
	}
	if err != nil {
		if e := refusedRenegotiation(err); e != nil {
			err = e
		}
		var lost *lostError
		if errors.As(err, &lost) && !g.stale && !lost.unread && !lost.upload {
			a.end(fail(ReasonReset, err))
		} else {
			a.end(err)
		}
		return nil, a, err
	}
	if !g.reused {
		x.call.Connect = min(g.connectTime(), time.Since(begin))
	}
	a.answered(resp.StatusCode)
	return resp, a, nil
}

func (g grant) connectTime() time.Duration {
	if g.h2 != nil {
		return g.h2.Took
	}
	return g.h1.Took
}
