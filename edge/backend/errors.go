package backend

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
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
	ReasonBadRequest       = "bad_request"       // 400: the request can't be sent on
)

// Error is a failure on the backend leg.
type Error struct {
	// Reason is one of the Reason constants.
	Reason string
	// Code is the HTTP status that answers the client.
	Code int
	// Err is the cause. May be nil.
	Err error
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
	errClosed       = errors.New("the edge is shutting down")
	errBodyClosed   = errors.New("response body closed")
	errHeaderTooBig = errors.New("response header is larger than 1 MiB")
	errNotHTTP      = errors.New("the backend's answer is not HTTP/1")
	errUnsolicited  = errors.New("the backend sent data that answers no request")
	errIdle         = errors.New("no byte for the idle time-out")
	errHeaderLate   = errors.New("no response header in time")
	errNoSettings   = errors.New("the endpoint sent no HTTP/2 SETTINGS")
	errNotH2        = errors.New("the endpoint did not agree to h2 by ALPN")
	errQueueFull    = errors.New("connections.maxPending requests wait already")
	errQueueLate    = errors.New("no connection became free in time")
	errEndless1xx   = errors.New("more than 100 informational responses")
	errNoUpgrade    = errors.New("the backend switched protocols unasked")
	errShortBody    = errors.New("the request body is shorter than its Content-Length")
	errLongBody     = errors.New("the request body is longer than its Content-Length")
	errTunnelsOnly  = errors.New("the pool's protocol is tcp, which carries no requests")
	errNoTunnel     = errors.New("the pool's protocol is not tcp")
	errUpgradeH2    = errors.New("the pool's protocol is http2, which has no Upgrade")
)

func fail(reason string, err error) *Error {
	return &Error{Reason: reason, Code: statusOf(reason), Err: err}
}

func statusOf(reason string) int {
	switch reason {
	case ReasonNoEndpoint, ReasonOverloaded, ReasonUnknownPool:
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
	e := fail(ReasonConnectFailure, err)
	var netErr net.Error
	if errors.Is(err, context.DeadlineExceeded) || errors.As(err, &netErr) && netErr.Timeout() {
		e.Code = http.StatusGatewayTimeout
	}
	return e
}

// verifyError marks what the pool's own verification refused.
type verifyError struct{ error }

func (e verifyError) Unwrap() error { return e.error }

// handshakeError names what went wrong in TLS.
func handshakeError(err error) *Error {
	var verification *tls.CertificateVerificationError
	var hostname x509.HostnameError
	var own verifyError
	if errors.As(err, &verification) || errors.As(err, &hostname) || errors.As(err, &own) {
		return fail(ReasonVerifyFailure, err)
	}
	return fail(ReasonHandshakeFailure, err)
}

// reasonOf returns the reason of an error on this leg, "" for anything else,
// as a client that went away.
func reasonOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}
