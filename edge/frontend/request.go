package frontend

import (
	"errors"
	"math"
	"net/http"
	"strings"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/proto/rules"
)

// Causes of a request's end.
var (
	errAmbiguousPath  = errors.New("the path can be read in two ways that go to different routes")
	errRequestTimeout = errors.New("the route's request timeout has passed")
	errClientStalled  = errors.New("the client did not take the response for too long")
	errBodyStalled    = errors.New("the client did not send its body for too long")
	errTunnelIdle     = errors.New("no byte in either direction for too long")
	errAnswered       = errors.New("the answer was complete before the request")
	errRefused        = errors.New("the request was answered by the edge")
)

const (
	// lingerBytes and lingerTime bound what is read of a body after the answer, to
	// keep the connection.
	lingerBytes = 256 << 10
	lingerTime  = 50 * time.Millisecond
	// minBodyRate is what a client must send of a body of known length, in bytes per
	// second of our waiting for it, once timeouts.idle has passed. It is far below
	// what any network gives; without it, a byte now and then would hold a request
	// for ever. A body of unknown length may be a stream, on which only silence is
	// bounded.
	minBodyRate = 100
	// never is when nothing is due.
	never = time.Duration(math.MaxInt64)
)

// request is one request on its way, or a connection of protocol tls, which is a
// tunnel from the start. It is the exchange.Front of its exchange. All of it
// happens on one loop.
type request struct {
	client *clientConn
	stream stream
	state  *state
	flow   exchange.Flow // nil: there is none, or it is over

	head      exchange.Request // as it goes to the backend
	version   exchange.Version
	authority string // as it came
	host      string // likewise, as exchange.HostName returns it
	match     exchange.Match
	x         exchange.Exchange
	started   time.Time
	raw       bool // a connection of protocol tls
	tunnel    bool // bytes go both ways

	// The client's message.
	ended    bool          // it has come as a whole
	unwanted bool          // the rest of it is not read
	expects  bool          // the client waits for 100
	ahead    int           // bytes that the backend's leg has not got rid of
	came     time.Duration // when the client last sent something, or began to be waited for
	waited   time.Duration // for a body of known length, in all

	// The answer.
	answered  bool          // its head was sent
	complete  bool          // it was sent as a whole
	untaken   int           // bytes that the client has not taken
	took      time.Duration // when it last took some, or had none to take
	lingers   time.Duration // until when the body is still read after the answer, 0: it is not
	lingersTo int64         // until in is that much

	timeout time.Duration // when the route's request timeout passes, 0: never

	// What became of it.
	status int // 0: nothing was answered
	reason string
	err    error
	held   int64 // bytes of memory that it is reckoned to hold
	in     int64 // bytes of the body, or of a tunnel
	out    int64 // likewise, of the answer
	done   bool
}

// newRequest makes a request for a stream.
func (c *clientConn) newRequest(s stream) *request {
	q := c.lane.requests.take()
	c.requests++
	q.client, q.stream, q.state, q.started = c, s, c.slot.state.Load(), time.Now()
	q.x = exchange.Exchange{Client: c.id, First: c.requests == 1, Gone: c.gone, Source: c.source}
	q.came, q.took = c.now(), c.now()
	return q
}

// begin serves a request whose head has come; with end it has no body. The Fields
// of r are the request's from now on.
func (q *request) begin(r *exchange.Request, end bool) {
	q.take(r, end)
	q.held = requestBytes(r)
	switch {
	case q.client.refused || !q.client.slot.frontend.memory.take(q.held, forRequest):
		q.held, q.head.Fields = 0, nil
		q.deny(http.StatusServiceUnavailable, "memory_limit", nil)
		return
	case q.client.dismissed.Load():
		q.deny(http.StatusMisdirectedRequest, "client_certificate", nil) // try another connection (RFC 9110 section 15.5.20)
		return
	case !q.admit() || !q.route():
		return
	}
	q.x.Pool, q.x.ResponseHeaderTimeout = q.match.Pool, q.match.ResponseHeaderTimeout
	if q.state.AllowsHost(q.host) {
		q.x.ServerName = q.host
	}
	if q.match.RequestTimeout > 0 {
		q.timeout = q.client.now() + q.match.RequestTimeout
		q.client.remind(q.match.RequestTimeout)
	}
	if !end {
		q.client.remind(q.state.settings.idle)
	}
	q.prepare()
	q.flow = q.client.slot.frontend.cfg.Upstream.Start(q.client.lane.loop, &q.x, &q.head, q)
}

func (q *request) take(r *exchange.Request, end bool) {
	q.head, q.ended, q.expects = *r, end, r.Continue
	q.authority, q.version = r.Authority, r.Version
}

// refuse answers a request that the protocol's machine has refused, of which r is
// what is known.
func (q *request) refuse(r *exchange.Request, end bool, status int, reason string, err error) {
	q.take(r, end)
	q.head.Fields = nil // may be large, and the client may not take the answer for a while
	q.deny(status, reason, err)
}

// deny counts and answers a request that fails on this leg.
func (q *request) deny(status int, reason string, err error) {
	q.client.slot.counters.Error(reason)
	q.err = err
	q.fail(status, reason)
}

// admit denies requests that go nowhere. That the host is valid the machines have
// seen to.
func (q *request) admit() bool {
	q.host, _ = exchange.HostName(q.authority)
	if q.authority == "" {
		q.host = q.client.sni // HTTP/1.0 needs no Host
	}
	if sni := q.client.sni; sni != "" && q.host != sni && !q.state.AllowsHost(q.host) {
		// The client reuses a connection for a host that this listener does not
		// serve (RFC 9113 section 9.1.1).
		q.deny(http.StatusMisdirectedRequest, "misdirected", nil)
		return false
	}
	return true
}

// route finds where the request goes, or denies it. A path that a backend may
// read as another one, which goes elsewhere, is denied: what is sent on is what
// came, so the backend would decide against the routes.
func (q *request) route() bool {
	path, _, _ := strings.Cut(q.head.Target, "?")
	plain, strict, err := rules.RoutePath(path)
	if err != nil {
		q.deny(http.StatusBadRequest, "bad_target", err)
		return false
	}
	var ok bool
	q.match, ok = q.state.Route(q.host, plain)
	if strict != plain && !q.match.EncodedSeparator {
		if other, found := q.state.Route(q.host, strict); found != ok || other.Route != q.match.Route {
			q.match = exchange.Match{}
			q.deny(http.StatusBadRequest, "bad_target", errAmbiguousPath)
			return false
		}
	}
	if !ok {
		q.match = exchange.Match{}
		q.deny(http.StatusNotFound, "no_route", nil)
	}
	return ok
}

// prepare makes of the head that came the one that goes to the backend.
func (q *request) prepare() {
	r, c := &q.head, q.client
	if r.Authority == "" {
		r.Authority = q.host
	}
	q.state.claims.filter(&r.Fields, c.source.Addr())
	if c.forwarded == nil {
		c.forwarded = newForwarded(c.source.Addr(), c.port)
	}
	c.forwarded.set(&r.Fields, r.Authority)
	c.certificate.set(&r.Fields, q.state.claims.forward)
	edit(&r.Fields, q.match.RequestHeaders)
	if host := r.Fields.Get("Host"); host != "" { // an edit's: the client's is no field
		r.Authority = host
		r.Fields.Del("Host")
	}
}

// connect makes the tunnel of a connection of protocol tls.
func (q *request) connect() {
	q.raw = true
	var ok bool
	if q.match, ok = q.state.Route(q.client.sni, ""); !ok {
		q.match = exchange.Match{}
		q.client.slot.counters.Error("no_route")
		q.stop(http.StatusNotFound, "no_route", nil)
		return
	}
	q.x.Pool = q.match.Pool
	if q.client.sni != "" && q.state.AllowsHost(q.client.sni) {
		q.x.ServerName = q.client.sni
	}
	q.flow = q.client.slot.frontend.cfg.Upstream.Tunnel(q.client.lane.loop, &q.x, q)
}

// body takes a part of the body, or of what the client sends through a tunnel.
func (q *request) body(p []byte, end bool) {
	if q.done || q.unwanted {
		return
	}
	now := q.client.now()
	if q.ahead == 0 {
		q.waited += now - q.came
	}
	q.came = now
	q.in += int64(len(p))
	switch {
	case q.lingers > 0 && q.in > q.lingersTo:
		q.giveUp()
		return
	case q.flow == nil:
		q.stream.accept(len(p)) // nobody wants it
	default:
		q.ahead += len(p)
		q.flow.Data(p, end)
	}
	if end {
		q.endBody()
	}
}

// bodyEnd takes the end of the client's message, or of its direction of a tunnel.
func (q *request) bodyEnd(trailers exchange.Fields) {
	if q.ended || q.done {
		return
	}
	if q.flow != nil && (q.head.Length != 0 || q.tunnel) {
		q.state.claims.filter(&trailers, q.client.source.Addr())
		q.flow.End(trailers)
	}
	q.endBody()
}

func (q *request) endBody() {
	q.ended, q.came = true, q.client.now()
	if q.complete {
		q.flow = nil
	}
	q.settle()
}

// taken says that the client has taken n bytes of the answer.
func (q *request) taken(n int) {
	q.untaken -= n
	q.took = q.client.now()
	if q.flow != nil {
		q.flow.Consumed(n)
	}
	q.settle()
}

// gone ends a request whose client has reset its stream, or left.
func (q *request) gone(err error) {
	if q.done {
		return
	}
	status, reason := statusClientClosed, "client_abort"
	switch {
	case q.client.bug != nil:
		status, reason, err = http.StatusInternalServerError, "internal", q.client.bug
	case q.client.aborted.Load():
		status, reason = http.StatusServiceUnavailable, "drain_timeout"
	case q.client.stalled:
		reason, err = "client_stalled", errClientStalled
	}
	q.lose(err)
	if !q.complete || q.untaken > 0 { // else it has all that it wanted
		q.became(status, reason, err)
	}
	q.finish()
}

// look ends the request when the client, or the request as a whole, takes too long,
// and returns when to look again.
func (q *request) look(now time.Duration) (next time.Duration) {
	next = never
	due := func(at time.Duration) bool {
		if at > now {
			next = min(next, at-now)
		}
		return at <= now
	}
	idle := q.state.settings.idle
	switch {
	case q.lingers > 0:
		if due(q.lingers) {
			q.giveUp()
		}
	case q.untaken > 0 && due(q.took+idle):
		q.stop(statusClientClosed, "client_stalled", errClientStalled)
	case q.tunnel:
		if due(max(q.came, q.took) + idle) {
			q.stop(q.status, "timeout_idle", errTunnelIdle)
		}
	case q.timeout > 0 && due(q.timeout):
		q.stop(http.StatusGatewayTimeout, "timeout_request", errRequestTimeout)
	case q.ended || q.ahead > 0 || q.raw: // it is not the client who is waited for
	case due(q.bodyDue(idle)):
		q.unwanted = true
		q.stop(http.StatusRequestTimeout, "timeout_body", errBodyStalled)
	}
	return next
}

// bodyDue is when the client has sent nothing, or too little, for too long.
func (q *request) bodyDue(idle time.Duration) time.Duration {
	silent := q.came + idle
	if q.head.Length <= 0 {
		return silent
	}
	most := idle + time.Duration(q.in)*time.Second/minBodyRate
	return min(silent, q.came+most-q.waited)
}
