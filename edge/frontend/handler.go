package frontend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/proto/rules"
)

// handler serves the requests of a generation.
type handler struct{ generation *generation }

// Causes of a request's end that are not the client's.
var (
	errAmbiguousPath  = errors.New("the path can be read in two ways that go to different routes")
	errRequestTimeout = errors.New("the route's request timeout has passed")
	errClientStalled  = errors.New("the client did not take the response for too long")
	errBodyStalled    = errors.New("the client did not send its body for too long")
)

// request is one request on its way.
type request struct {
	handler *handler
	client  *clientConn
	state   *state
	w       http.ResponseWriter
	r       *http.Request
	control *http.ResponseController
	cancel  context.CancelCauseFunc
	ctx     context.Context

	started time.Time
	host    string // as exchange.HostName returns it
	target  string // in origin form, as it came
	upgrade string
	match   exchange.Match
	x       exchange.Exchange
	head    requestHead  // of HTTP/1.1
	body    *requestBody // nil without a body
	timer   *time.Timer  // of the route's request timeout, or nil

	// What became of it.
	status   int // 0: nothing was answered
	reason   string
	err      error
	held     int64 // bytes of memory that it is reckoned to hold
	received int64 // bytes after a switch of protocols
	sent     int64 // bytes of the response's body, or after a switch
	aborting bool

	// early guards w while the upstream may report 1xx responses.
	early     sync.Mutex
	answering bool
}

// ServeHTTP implements http.Handler.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	client := r.Context().Value(clientKey{}).(*clientConn)
	ctx, cancel := context.WithCancelCause(r.Context())
	q := &request{
		handler: h, client: client, state: h.generation.slot.state.Load(),
		w: w, r: r, control: http.NewResponseController(w), ctx: ctx, cancel: cancel, started: time.Now(),
	}
	if client.guard != nil {
		q.head = client.guard.serve()
		defer client.guard.served()
	}
	q.held = requestBytes(r)
	q.x = exchange.Exchange{Client: client.id, First: client.requests.Add(1) == 1, Gone: client.gone, Source: client.source, RequestNames: q.head.Names}
	defer func() {
		if bug := recover(); bug != nil {
			client.slot.panicked("a request", bug)
			q.panicked(fmt.Errorf("panic: %v", bug))
		}
		q.finish()
		if q.aborting {
			panic(http.ErrAbortHandler) // so that the client sees that the response is cut
		}
	}()
	q.serve()
}

// panicked answers a request whose serving has panicked.
func (q *request) panicked(err error) {
	q.early.Lock()
	q.answering = true
	q.early.Unlock()
	if q.status != 0 {
		q.abort(q.status, "internal", err)
		return
	}
	q.err = err
	clear(q.w.Header())
	q.fail(http.StatusInternalServerError, "internal")
}

// panicked counts and logs a panic while serving what.
func (s *slot) panicked(what string, bug any) {
	s.counters.Error("internal")
	s.frontend.cfg.Logger.Error("panic while serving "+what, "listener", s.name, "panic", fmt.Sprint(bug), "stack", string(debug.Stack()))
}

// serve answers the request.
func (q *request) serve() {
	if q.r.ContentLength != 0 {
		if q.r.ProtoMajor == 1 {
			_ = q.control.EnableFullDuplex() // HTTP/1.x always can
		}
		q.body = newRequestBody(q.r, q.handler.generation.settings.idle, q.bodyStalled, q.filterTrailer)
	}
	if q.client.refused || !q.handler.generation.slot.frontend.memory.take(q.held, forRequest) {
		q.held = 0
		q.r.Header = http.Header{}
		q.refuse(http.StatusServiceUnavailable, "memory_limit")
		return
	}
	if q.client.leaving.Load() {
		q.refuse(http.StatusMisdirectedRequest, "client_certificate") // try another connection (RFC 9110 section 15.5.20)
		return
	}
	if !q.admit() {
		return
	}
	match, ok := q.route()
	if !ok {
		return
	}
	q.match = match
	q.x.Pool, q.x.ResponseHeaderTimeout = match.Pool, match.ResponseHeaderTimeout
	if q.state.AllowsHost(q.host) {
		q.x.ServerName = q.host
	}
	if match.RequestTimeout > 0 {
		q.timer = time.AfterFunc(match.RequestTimeout, func() { q.cancel(errRequestTimeout) })
	}
	response, err := q.handler.generation.slot.frontend.cfg.Upstream.RoundTrip(q.outgoing(), &q.x)
	q.early.Lock()
	q.answering = true
	q.early.Unlock()
	if err != nil {
		q.upstreamFailed(err)
		return
	}
	// The upstream must not wait for the client's body when it is closed.
	defer response.Body.Close()
	defer q.endBody()
	switch {
	case response.StatusCode == http.StatusSwitchingProtocols:
		q.switchProtocols(response)
	case response.StatusCode < 200 || response.StatusCode > 999:
		q.fail(http.StatusBadGateway, "protocol_error")
	default:
		q.answer(response)
	}
}

// admit refuses requests that go nowhere.
func (q *request) admit() bool {
	if q.head.refused != 0 {
		q.refuseUnread()
		return false
	}
	var ok bool
	q.host, ok = exchange.HostName(q.r.Host)
	if q.r.Host == "" && !q.r.ProtoAtLeast(1, 1) {
		q.host = q.client.sni // HTTP/1.0 needs no Host
	}
	_, _, q.target = exchange.SplitTarget(q.r.RequestURI)
	switch {
	case q.r.Method == http.MethodConnect:
		q.refuse(http.StatusMethodNotAllowed, "method_not_allowed")
	case headerBytes(q.r) > q.handler.generation.settings.maxHeaderBytes:
		q.refuseHeader("header_too_large")
	case headerFields(q.r) > q.handler.generation.settings.maxHeaderFields:
		q.refuseHeader("too_many_fields")
	case !q.oneLength():
		q.refuse(http.StatusBadRequest, "bad_request")
	case !ok || !q.oneHost():
		q.refuse(http.StatusBadRequest, "bad_host")
	case q.r.URL.Opaque != "" || q.r.URL.User != nil: // RFC 9110 section 4.2.4
		q.refuse(http.StatusBadRequest, "bad_target")
	case q.client.sni != "" && q.host != q.client.sni && !q.state.AllowsHost(q.host):
		// The client reuses a connection for a host that this listener does not
		// serve (RFC 9113 section 9.1.1).
		q.refuse(http.StatusMisdirectedRequest, "misdirected")
	default:
		return true
	}
	return false
}

// route finds where the request goes, or refuses it. A path that a backend may
// read as another one, which goes elsewhere, is refused: what is sent on is what
// came, so the backend would decide against the routes.
func (q *request) route() (exchange.Match, bool) {
	path, _, _ := strings.Cut(q.target, "?")
	plain, strict, err := rules.RoutePath(path)
	if err != nil {
		q.err = err
		q.refuse(http.StatusBadRequest, "bad_target")
		return exchange.Match{}, false
	}
	match, ok := q.state.Route(q.host, plain)
	if strict != plain && !match.EncodedSeparator {
		if other, found := q.state.Route(q.host, strict); found != ok || other.Route != match.Route {
			q.err = errAmbiguousPath
			q.refuse(http.StatusBadRequest, "bad_target")
			return exchange.Match{}, false
		}
	}
	if !ok {
		q.refuse(http.StatusNotFound, "no_route")
	}
	return match, ok
}

// refuseUnread answers a request whose head nobody has parsed: what stands in r
// is a substitute. It is the last one of its connection.
func (q *request) refuseUnread() {
	q.r.Method, q.r.Host, q.r.URL, q.r.Proto = "", "", &url.URL{}, ""
	q.err = q.head.err
	closeAfterAnswer(q.w)
	q.refuse(q.head.refused, q.head.reason)
}

// oneLength reports whether an HTTP/2 request says its length in one way, if at
// all: net/http takes what it can't parse for 0. Of HTTP/1.1 the guard has made
// sure.
func (q *request) oneLength() bool {
	lengths := q.r.Header["Content-Length"]
	if q.r.ProtoMajor == 1 || len(lengths) == 0 {
		return true
	}
	_, err := strconv.ParseUint(lengths[0], 10, 63)
	return len(lengths) == 1 && err == nil
}

// oneHost reports whether an HTTP/2 request names one host: net/http routes by
// :authority and leaves a host field as it came, which must say the same (RFC
// 9113 section 8.3.1). HTTP/1.1 can't get here with two: net/http refuses two
// Host fields, and the authority of an absolute-form target replaces the field
// (RFC 9112 section 3.2.2).
func (q *request) oneHost() bool {
	for _, host := range q.r.Header["Host"] {
		if !exchange.SameAuthority(host, q.r.Host) {
			return false
		}
	}
	return true
}

// refuseHeader refuses a header that is too large and lets go of it, since the
// client may not take the answer for a while.
func (q *request) refuseHeader(reason string) {
	q.r.Header = http.Header{}
	q.refuse(http.StatusRequestHeaderFieldsTooLarge, reason)
}

// outgoing is the request as it goes to the backend.
func (q *request) outgoing() *http.Request {
	q.upgrade = upgradeOf(q.r)
	header := requestHeader(q.r, q.upgrade)
	q.filterClaims(header)
	host := q.r.Host
	if host == "" {
		host = q.host
	}
	setForwarded(header, q.client.source, host, q.client.port)
	q.client.certificate.set(header, q.state.claims.forward)
	edit(header, q.match.RequestHeaders)

	out := q.r.WithContext(httptrace.WithClientTrace(q.ctx, &httptrace.ClientTrace{Got1xxResponse: q.interim}))
	out.Header = header
	out.URL = &url.URL{
		Scheme: "https", Host: q.r.Host, Path: q.r.URL.Path, RawPath: q.r.URL.RawPath,
		RawQuery: q.r.URL.RawQuery, ForceQuery: q.r.URL.ForceQuery,
	}
	if out.URL.Path == "" {
		out.URL.Path = "/"
	}
	out.Host = host
	if host := header.Get("Host"); host != "" { // an edit's: requestHeader leaves the client's out
		out.Host = host
		header.Del("Host")
	}
	out.RequestURI = q.target // byte for byte
	out.TLS, out.Close, out.TransferEncoding = nil, false, nil
	out.Body = nil
	if q.r.ContentLength != 0 {
		q.filterTrailer(q.r.Trailer) // what is announced
		out.Body = q.body
	}
	return out
}

// filterClaims removes what the client may not say about itself.
func (q *request) filterClaims(fields http.Header) {
	q.state.claims.filter(fields, q.client.source.Addr())
}

func (q *request) filterTrailer(trailer http.Header) {
	exchange.FilterTrailer(trailer)
	q.filterClaims(trailer)
}

// interim passes a 1xx response on. 100 is net/http's, which sends it when the
// upstream begins to read the body.
func (q *request) interim(code int, header textproto.MIMEHeader) error {
	q.early.Lock()
	defer q.early.Unlock()
	if q.answering || code <= http.StatusSwitchingProtocols || code >= 200 || !q.r.ProtoAtLeast(1, 1) {
		return nil
	}
	fields := http.Header(header).Clone()
	removeHopByHop(fields)
	copyHeader(q.w.Header(), fields)
	q.w.WriteHeader(code)
	clear(q.w.Header())
	return nil
}

// bodyStalled ends the request of a client that does not send its body.
func (q *request) bodyStalled() {
	q.cancel(errBodyStalled)
	_ = q.control.SetReadDeadline(q.started) // in the past: ends the read
}

// endBody ends the upstream's reading of the client's body.
func (q *request) endBody() {
	if q.status != http.StatusSwitchingProtocols {
		q.body.finish(q.w, q.control, q.r.ProtoMajor == 1, q.aborting)
	}
}

// finish counts and logs the request and lets go of it.
func (q *request) finish() {
	q.early.Lock()
	q.answering = true // even when the upstream panicked
	q.early.Unlock()
	if q.timer != nil {
		q.timer.Stop()
	}
	q.cancel(nil)
	q.endBody()
	if q.body.isShort() && q.client.h2 != nil {
		q.client.h2.fault()
	}
	q.handler.generation.slot.frontend.memory.give(q.held)
	duration := time.Since(q.started)
	q.handler.generation.slot.answered(q.status, !q.x.First, duration)
	q.log(duration)
}
