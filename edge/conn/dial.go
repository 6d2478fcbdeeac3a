package conn

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"syscall"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Dialer opens connections. It is made anew as often as one likes.
type Dialer struct {
	// Handshaker makes the handshakes.
	Handshaker Handshaker
	// Dial opens TCP connections.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Counters count handshakes, and what becomes of connections.
	Counters exchange.Counters
	// Guard runs what connections do on their own.
	Guard Guard
}

// Handshaker makes client handshakes and keeps the sessions they give.
type Handshaker interface {
	// Reserve waits, before the dial, until a handshake of identity should be
	// made.
	Reserve(ctx context.Context, identity exchange.Identity, terms exchange.Terms) (exchange.Attempt, error)
	// Doubt notes that the server may have forgotten the sessions of identity.
	Doubt(identity exchange.Identity)
	// Unclean notes that a connection of identity ended without close_notify.
	Unclean(identity exchange.Identity)
}

// Guard runs what would otherwise end the process, or outlive it.
type Guard interface {
	// Spawn runs f on a goroutine that somebody waits for.
	Spawn(what string, f func())
	// Caught is deferred where a panic is to become an error.
	Caught(what string, err *error)
}

// Target is where a connection goes, and how.
type Target struct {
	// Address is host:port.
	Address string
	// Identity is what the TLS session may be resumed within.
	Identity exchange.Identity
	// TLS is the configuration without ServerName. It is cloned.
	TLS *tls.Config
	// ServerName is the SNI.
	ServerName string
	// ALPN replaces what TLS offers, if it is not nil.
	ALPN []string
	// Terms are those of the handshake.
	Terms exchange.Terms
	// Renegotiates is set when the peer may renegotiate, once.
	Renegotiates bool
	// DialTimeout bounds the TCP connect, HandshakeTimeout the wait for the turn of
	// a handshake, and each handshake.
	DialTimeout, HandshakeTimeout time.Duration
}

// Error is why no connection came about. Errors that are none are of Guard.Caught.
type Error struct {
	Step Step
	Err  error
}

// Step is how far it came.
type Step int8

// Steps.
const (
	StepReserve   Step = iota // waiting for the turn of the handshake
	StepDial                  // TCP
	StepHandshake             // TLS
)

// Error implements error.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Connect opens a TCP connection and makes the handshake, once more in full on
// another connection if an offered session broke it. The handshake waits for its
// turn before. owner is told of the connection's end, if there is no error.
func (d *Dialer) Connect(ctx context.Context, target Target, owner Owner) (c *Conn, err error) {
	defer d.Guard.Caught("a dial", &err)
	begin := time.Now()
	config := target.config()
	attempt, err := d.reserve(ctx, target)
	if err != nil {
		return nil, err
	}
	socket, err := d.open(ctx, target)
	if err != nil {
		attempt.Release()
		if failed := (*Error)(nil); errors.As(err, &failed) && !OwnFailure(err) && !errors.Is(err, context.Canceled) {
			// A server that refuses may be one that restarts and has forgotten its
			// sessions.
			d.Handshaker.Doubt(target.Identity)
		}
		return nil, err
	}
	c, err = d.shake(ctx, target, owner, socket, func(ctx context.Context, w net.Conn) (
		exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
		return attempt.Handshake(ctx, w, config)
	})
	if redo := (exchange.FullHandshaker)(nil); err != nil && errors.As(err, &redo) {
		if !worthRedoing(err) {
			redo.Release()
			return nil, err
		}
		if socket, err = d.open(ctx, target); err != nil {
			redo.Release()
			return nil, err
		}
		c, err = d.shake(ctx, target, owner, socket, func(ctx context.Context, w net.Conn) (
			exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
			return redo.FullHandshake(ctx, w)
		})
		if errors.As(err, &redo) {
			redo.Release() // it was offered one that had come meanwhile, in vain
		}
	}
	if err != nil {
		return nil, err
	}
	c.Took = time.Since(begin)
	return c, nil
}

// reserve waits for the turn of a handshake: while another one may bring a
// session it is cheaper to wait than to make a full one.
func (d *Dialer) reserve(ctx context.Context, target Target) (attempt exchange.Attempt, err error) {
	defer d.Guard.Caught("a dial", &err)
	terms := target.Terms
	if target.TLS.SessionTicketsDisabled {
		terms.Wait = 0
	}
	waiting, cancel := context.WithTimeout(ctx, target.HandshakeTimeout)
	defer cancel()
	if attempt, err = d.Handshaker.Reserve(waiting, target.Identity, terms); err != nil {
		return nil, &Error{StepReserve, err}
	}
	return attempt, nil
}

// open opens a TCP connection.
func (d *Dialer) open(ctx context.Context, target Target) (socket net.Conn, err error) {
	defer d.Guard.Caught("a dial", &err)
	dialing, cancel := context.WithTimeout(ctx, target.DialTimeout)
	defer cancel()
	if socket, err = d.Dial(dialing, "tcp", target.Address); err != nil {
		return nil, &Error{StepDial, err}
	}
	return socket, nil
}

// worthRedoing reports whether a handshake without a session may do better.
func worthRedoing(err error) bool {
	var netErr net.Error
	if Refused(err) {
		return false
	}
	return !(errors.As(err, &netErr) && netErr.Timeout()) && !errors.Is(err, context.DeadlineExceeded) &&
		!errors.Is(err, context.Canceled)
}

type handshake func(context.Context, net.Conn) (exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error)

// shake makes one handshake, which is counted.
func (d *Dialer) shake(ctx context.Context, target Target, owner Owner, raw net.Conn, do handshake) (*Conn, error) {
	c := &Conn{dialer: *d, owner: owner, Created: time.Now(), identity: target.Identity}
	beneath := c.wrap(raw, target.Renegotiates)
	shaking, cancel := untilEnded(ctx, target.HandshakeTimeout, owner.CloseTimeout())
	defer cancel()
	tc, mechanism, miss, err := d.caught(shaking, beneath, do)
	took := time.Since(c.Created)
	if err != nil {
		if redo := (exchange.FullHandshaker)(nil); !errors.As(err, &redo) || !redo.Declined() {
			d.Counters.HandshakeFailed(took)
		}
		lingerClose(raw, d.Guard, owner.CloseTimeout())
		return nil, &Error{StepHandshake, err}
	}
	tls := tc.ConnectionState()
	d.Counters.Handshake(mechanism, miss, tls.Version, took)
	c.tls, c.Resumed, c.Version, c.Protocol = tc, tls.DidResume, tls.Version, tls.NegotiatedProtocol
	if !c.Resumed {
		c.Miss = miss
	}
	if target.Renegotiates {
		// Another handshake writes into TLSUnique. It is empty where a session without
		// extended master secret was resumed.
		c.whole = &whole{TLSConn: tc, c: c, finished: append([]byte{}, tls.TLSUnique...), ended: make(chan loop.Ending, 1)}
		c.wire = loop.NewWire(c.whole)
	}
	return c, nil
}

// wrap returns what TLS runs over: a wire of the loop, or a socket of ours.
func (c *Conn) wrap(raw net.Conn, renegotiates bool) net.Conn {
	if _, bare := raw.(*net.TCPConn); !bare || renegotiates {
		c.socket = &socket{Conn: raw, c: c}
		raw = c.socket
	}
	if renegotiates {
		return raw
	}
	c.wire = loop.NewWire(raw)
	return c.wire
}

// untilEnded bounds a handshake by limit and by ctx's deadline. When ctx is
// cancelled, as at the edge's stop, the handshake may take grace to its end: then
// the connection ends with close_notify, where it would otherwise break off.
func untilEnded(ctx context.Context, limit, grace time.Duration) (context.Context, context.CancelFunc) {
	end := time.Now().Add(limit)
	if own, ok := ctx.Deadline(); ok && own.Before(end) {
		end = own
	}
	shaking, cancel := context.WithDeadline(context.WithoutCancel(ctx), end)
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(grace, cancel)
		context.AfterFunc(shaking, func() { timer.Stop() })
	})
	return shaking, func() {
		stop()
		cancel()
	}
}

func (d *Dialer) caught(ctx context.Context, w net.Conn, do handshake) (
	tc exchange.TLSConn, mechanism resealv1.Mechanism, miss resealv1.MissReason, err error) {
	defer d.Guard.Caught("a handshake", &err)
	return do(ctx, w)
}

// config is the TLS configuration for the target's name.
func (t Target) config() *tls.Config {
	config := t.TLS.Clone()
	config.ServerName = t.ServerName
	if t.ALPN != nil {
		config.NextProtos = t.ALPN
	}
	if verify := config.VerifyConnection; verify != nil {
		config.VerifyConnection = func(cs tls.ConnectionState) error {
			cs.ServerName = t.ServerName // crypto/tls tells names only, not addresses
			if err := verify(cs); err != nil {
				return verifyError{err}
			}
			return nil
		}
	}
	return config
}

// ownFailures are what a dial fails with when the edge lacks something.
var ownFailures = []error{
	syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EADDRNOTAVAIL, syscall.EAGAIN,
}

// OwnFailure reports whether a dial failed because the edge itself lacks what a
// connection needs.
func OwnFailure(err error) bool {
	return slices.ContainsFunc(ownFailures, func(own error) bool { return errors.Is(err, own) })
}
