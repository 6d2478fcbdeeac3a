// Package exchange holds the words in which the two legs, the plan and what
// stands beside them speak to each other: what is served, what an exchange is,
// what is counted. It also holds the rules of HTTP that both legs go by, so that
// what one of them checks is what the other sends. It imports nothing of edge.
package exchange

import (
	"io"
	"net/netip"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Exchange is one request, or one connection of protocol tls, as the two legs
// tell each other about it.
type Exchange struct {
	// Set by the frontend.

	// Pool is the pool's name.
	Pool string
	// ServerName is the request's host (the SNI for protocol tls) as HostName
	// returns it, if the listener allows that host: the SNI to use when the pool
	// fixes none. "": the client may not choose one, and is refused with 421.
	ServerName string
	// Client is unique per client connection.
	Client uint64
	// First is true for the first request of a client connection.
	First bool
	// Gone is closed when the client's connection is.
	Gone <-chan struct{}
	// Source is the client's address.
	Source netip.AddrPort
	// ResponseHeaderTimeout replaces the pool's. 0: the pool's.
	ResponseHeaderTimeout time.Duration

	// Set by the backend, even when it fails.

	// Endpoint is the address that was used last.
	Endpoint string
	// Protocol is what was spoken to it: "http/1.1", "h2" or "tcp".
	Protocol string
	// Reused is true when the connection had served a request before.
	Reused bool
	// Resumed is true when the connection's TLS session was a resumed one.
	Resumed bool
	// Miss is why it was not.
	Miss resealv1.MissReason
	// TLSVersion is a tls.Version constant, 0 without a connection.
	TLSVersion uint16
	// Attempts counts how often the request was tried.
	Attempts int
	// Connect is how long dial and handshake took, if the request waited for a
	// new connection; 0 for a reused one.
	Connect time.Duration
	// Status is the status that answers an error, 0 without one.
	Status int
	// Reason is the reason of an error, as in the access log.
	Reason string
	// Blame is who caused an error.
	Blame resealv1.Failure_Blame
}

// Tunnel is a connection that carries bytes. Close ends both directions.
type Tunnel interface {
	io.ReadWriteCloser
	// CloseWrite says, by close_notify, that no more bytes will be sent; Read goes
	// on.
	CloseWrite() error
}
