package exchange

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TLSConn is a TLS connection whose handshake is complete: a *tls.Conn, or what
// behaves like one.
type TLSConn interface {
	net.Conn
	// CloseWrite sends close_notify.
	CloseWrite() error
	ConnectionState() tls.ConnectionState
	// NetConn returns the connection beneath.
	NetConn() net.Conn
}

// Terms say how a handshake may be made.
type Terms struct {
	// Wait is how long another connection's session is waited for before one of
	// those that wait goes ahead without it. 0: nobody waits.
	Wait time.Duration
	// TicketWait is how long the queue for tickets that are taken once may get
	// before another full handshake adds one to those in use.
	TicketWait time.Duration
	// SessionIDsOff forbids resuming TLS 1.2 sessions by ID.
	SessionIDsOff bool
	// CryptoTLS keeps to crypto/tls: no session is offered by the client of the
	// abbreviated handshake alone, which can't renegotiate, and after which there
	// is no full handshake on the same connection.
	CryptoTLS bool
}

// Attempt is the right to make one handshake. One of its methods is called, once.
type Attempt interface {
	// Handshake makes a handshake on conn. A completed one is either resumed
	// (mechanism) or has a miss reason. An error that implements FullHandshaker
	// asks for one more try on a new connection.
	Handshake(ctx context.Context, conn net.Conn, cfg *tls.Config) (
		tc TLSConn, mechanism resealv1.Mechanism, miss resealv1.MissReason, err error)
	// Release gives the right back, because the dial failed.
	Release()
}

// FullHandshaker is the error of a handshake that failed while a session was
// offered. FullHandshake repeats it on a new connection without one. One of
// FullHandshake and Release is called, once.
type FullHandshaker interface {
	error
	FullHandshake(ctx context.Context, conn net.Conn) (
		tc TLSConn, mechanism resealv1.Mechanism, miss resealv1.MissReason, err error)
	// Release says that there will be none.
	Release()
	// Declined reports whether the server just did not want the session.
	Declined() bool
}
