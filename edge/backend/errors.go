package backend

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/reseal/reseal/edge/conn"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Reasons of an Error, as they stand in access log and statistics.
const (
	ReasonNoEndpoint       = "no_endpoint"       // 503: the pool has no endpoint to use
	ReasonMisdirected      = "misdirected"       // 421: the server name may not be used
	ReasonConnectFailure   = "connect_failure"   // 502, 504: no TCP connection
	ReasonHandshakeFailure = "handshake_failure" // 502: TLS failed
	ReasonVerifyFailure    = "verify_failure"    // 502: the certificate was refused
	ReasonTimeoutHeader    = "timeout_header"    // 504: no response header in time
	ReasonTimeoutIdle      = "timeout_idle"      // 504: no byte of a body in time
	ReasonStaleConnection  = "stale_connection"  // 502: a reused connection had died
	ReasonReset            = "reset"             // 502: the connection ended early
	ReasonOverloaded       = "overloaded"        // 503: too many requests wait
	ReasonProtocolError    = "protocol_error"    // 502: the backend broke the protocol
	ReasonUnknownPool      = "unknown_pool"      // 503: no pool of that name
	ReasonBadRequest       = "bad_request"       // 400, 431: the request can't be sent on
	ReasonClientStalled    = "client_stalled"    // 408: the client sent no byte of its body in time
	ReasonClientShare      = "client_share"      // 503: others waited for what this client connection had too much of
	ReasonInternal         = "internal"          // 500: a bug of the edge
	ReasonLocalFailure     = "local_failure"     // 503: the edge itself lacks what a connection needs
)

// Error is a failure on the backend leg.
type Error struct {
	// Reason is one of the Reason constants.
	Reason string
	// Code is the HTTP status that answers the client.
	Code int
	// Err is the cause. May be nil.
	Err error

	// blame is whose fault it is.
	blame blame
}

// blame says who caused a failure on this leg. Only the endpoint's own failures
// count towards its ejection.
type blame int8

const (
	blameReason blame = iota // the reason says it
	blameEdge                // an error of the pool, but not of its endpoint
	blameNobody              // no error of the pool either: the client's doing, or a quiet stream
)

// blamed returns e with the blame on somebody.
func (e *Error) blamed(who blame) *Error {
	copied := *e
	copied.blame = who
	return &copied
}

// ofEndpoint reports whether an attempt failed because of its endpoint.
func ofEndpoint(err error) bool {
	e := errorOf(err)
	if e == nil || e.blame != blameReason {
		return false
	}
	switch e.Reason {
	case ReasonConnectFailure, ReasonHandshakeFailure, ReasonVerifyFailure, ReasonReset,
		ReasonTimeoutHeader, ReasonTimeoutIdle, ReasonProtocolError:
		return true
	}
	return false
}

// ofPool reports whether a request failed for a reason on this leg.
func ofPool(err error) bool {
	e := errorOf(err)
	return e != nil && e.blame != blameNobody
}

// blameOf says who caused a failure of a trip.
func blameOf(err error) resealv1.Failure_Blame {
	switch e := errorOf(err); {
	case ofEndpoint(err), e != nil && e.Reason == ReasonNoEndpoint, e != nil && e.Reason == ReasonStaleConnection:
		return resealv1.Failure_BLAME_BACKEND
	case e != nil && (e.Reason == ReasonClientStalled || e.Reason == ReasonBadRequest || e.Reason == ReasonMisdirected || e.Reason == ReasonClientShare):
		return resealv1.Failure_BLAME_CLIENT
	case ofPool(err):
		return resealv1.Failure_BLAME_EDGE
	}
	return resealv1.Failure_BLAME_UNSPECIFIED
}

// errorOf finds an Error of this leg in err, or returns nil.
func errorOf(err error) *Error {
	if err == nil {
		return nil // most often
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return nil
}

// idleError ends a stream on which no byte moves. Quiet is one that nobody owes a
// byte: a tunnel, or an answer without a length.
func idleError(quiet bool) *Error {
	e := fail(ReasonTimeoutIdle, errIdle)
	if quiet {
		e = e.blamed(blameNobody)
	}
	return e
}

// resetError is an exchange that its endpoint cut. During an upload it may not have
// wanted the body.
func resetError(err error, uploading bool) *Error {
	if e := refusedRenegotiation(err); e != nil {
		return e
	}
	e := fail(ReasonReset, err)
	if uploading {
		e = e.blamed(blameEdge)
	}
	return e
}

// clientError is a failure of the client's own.
type clientError struct{ error }

func (e clientError) Unwrap() error { return e.error }

// stalledUpload ends a request whose client does not send its body.
func stalledUpload() *Error { return fail(ReasonClientStalled, errIdle).blamed(blameNobody) }

// refused is a request that the endpoint can't be sent.
func refused(status int, err error) *Error {
	return (&Error{Reason: ReasonBadRequest, Code: status, Err: err}).blamed(blameNobody)
}

// Error implements error.
func (e *Error) Error() string {
	if e.Err == nil {
		return e.Reason
	}
	return fmt.Sprintf("%s: %v", e.Reason, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// HTTPStatus returns the status that answers the client, and the reason.
func (e *Error) HTTPStatus() (code int, reason string) { return e.Code, e.Reason }

// Causes inside the package. They never reach a caller bare.
var (
	errClosed      = errors.New("the edge is shutting down")
	errRepeated    = errors.New("the request is sent to another endpoint")
	errPeerEnded   = errors.New("the backend has ended the connection")
	errUnsolicited = errors.New("the backend sent data that answers no request")
	errIdle        = errors.New("no byte for the idle time-out")
	errHeaderLate  = errors.New("no response header in time")
	errNoSettings  = errors.New("the endpoint sent no HTTP/2 SETTINGS")
	errNotH2       = errors.New("the endpoint did not agree to h2 by ALPN")
	errQueueFull   = errors.New("connections.maxPending requests wait already")
	errClientShare = errors.New("the client held more connections than its share of connections.maxPerEndpoint, and kept this one waiting")
	errQueueShare  = errors.New("connections.maxPending requests wait already, most of them of this client connection")
	errQueueLate   = errors.New("no connection became free in time")
	errTunnelsOnly = errors.New("the pool's protocol is tcp, which carries no requests")
	errNoTunnel    = errors.New("the pool's protocol is not tcp")
)

func fail(reason string, err error) *Error {
	return &Error{Reason: reason, Code: statusOf(reason), Err: err}
}

func statusOf(reason string) int {
	switch reason {
	case ReasonInternal:
		return http.StatusInternalServerError
	case ReasonClientStalled:
		return http.StatusRequestTimeout
	case ReasonNoEndpoint, ReasonOverloaded, ReasonUnknownPool, ReasonLocalFailure, ReasonClientShare:
		return http.StatusServiceUnavailable
	case ReasonMisdirected:
		return http.StatusMisdirectedRequest
	case ReasonTimeoutHeader, ReasonTimeoutIdle:
		return http.StatusGatewayTimeout
	case ReasonBadRequest:
		return http.StatusBadRequest
	default:
		return http.StatusBadGateway
	}
}

// dialError names what went wrong in TCP connect.
func dialError(err error) *Error {
	if conn.OwnFailure(err) {
		return fail(ReasonLocalFailure, err)
	}
	if errors.Is(err, context.Canceled) {
		return fail(ReasonOverloaded, errClosed)
	}
	e := fail(ReasonConnectFailure, err)
	var netErr net.Error
	if errors.Is(err, context.DeadlineExceeded) || errors.As(err, &netErr) && netErr.Timeout() {
		e.Code = http.StatusGatewayTimeout
	}
	return e
}

// handshakeError names what went wrong in TLS.
func handshakeError(err error) *Error {
	if own := (*Error)(nil); errors.As(err, &own) && own.Reason == ReasonInternal {
		return own
	}
	if conn.Refused(err) {
		return fail(ReasonVerifyFailure, conn.Explained(err))
	}
	return fail(ReasonHandshakeFailure, err)
}

// reasonOf returns the reason of an error on this leg, "" for anything else,
// as a client that went away.
func reasonOf(err error) string {
	if e := errorOf(err); e != nil {
		return e.Reason
	}
	return ""
}

// refusedRenegotiation is the error of an exchange that ended because its endpoint
// asked to renegotiate, or nil. Which requests make it ask is the client's choice,
// so the endpoint is not blamed; nor would another attempt do better.
func refusedRenegotiation(err error) *Error {
	var lost *lostError
	if errors.As(err, &lost) && !lost.written {
		return nil // it asked before it knew the request
	}
	for _, cause := range []error{conn.ErrRenegotiation, conn.ErrRenegotiatedAgain} {
		if errors.Is(err, cause) {
			return fail(ReasonProtocolError, cause).blamed(blameEdge)
		}
	}
	return nil
}
