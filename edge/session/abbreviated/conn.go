package abbreviated

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Conn is a TLS 1.2 connection that was resumed. It behaves as tls.Conn does:
// its methods may be called concurrently, Close interrupts Read and Write,
// reading goes on after a time-out, and io.EOF is the peer's close_notify, or its
// FIN between two records. A fatal alert is a tls.AlertError in the error's chain.
//
// Beside its keys an idle connection holds 1 KiB.
type Conn struct {
	conn net.Conn
	cfg  Config

	handshake sync.Mutex // held during the handshake; guards what follows
	failed    error
	state     tls.ConnectionState

	done    atomic.Bool // the handshake is complete
	greeted bool        // the ServerHello has come; guarded by in.mu

	in  input
	out output

	// calls counts Writes under way by twos; the lowest bit is Close.
	calls atomic.Int32
}

var _ net.Conn = (*Conn)(nil)

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.conn.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.conn.SetDeadline(t) }

// SetReadDeadline implements net.Conn. After a Read has timed out another one
// goes on where it stopped.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.conn.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn. After a Write has timed out nothing can
// be written any more.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.conn.SetWriteDeadline(t) }

// NetConn returns the connection beneath. To read or write there breaks TLS.
func (c *Conn) NetConn() net.Conn { return c.conn }

// ConnectionState describes the connection. DidResume is always true once the
// handshake is complete. Keying material can't be exported.
func (c *Conn) ConnectionState() tls.ConnectionState {
	c.handshake.Lock()
	defer c.handshake.Unlock()
	return c.state
}

// Handshake is HandshakeContext without a bound.
func (c *Conn) Handshake() error { return c.HandshakeContext(context.Background()) }

// HandshakeContext makes the handshake, once. When ctx ends before it does conn is
// closed and the error is ctx's. Other errors are ErrDeclined, ErrVersionChanged,
// one with a tls.AlertError in its chain when either side broke it off, what
// VerifyConnection returned, or one of the socket. After any of them nothing but
// the handshake's own messages has been sent, and conn is left open for the
// caller to close.
func (c *Conn) HandshakeContext(ctx context.Context) (err error) {
	if c.done.Load() {
		return nil
	}
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { c.conn.Close() })
		defer func() {
			if !stop() {
				err = ctx.Err()
			}
		}()
	}
	c.handshake.Lock()
	defer c.handshake.Unlock()
	if c.failed != nil || c.done.Load() {
		return c.failed
	}
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	c.failed = c.shake()
	c.forget()
	c.in.hand, c.in.useless = nil, 0
	if c.failed != nil {
		c.in.release()
		return c.failed
	}
	c.in.settle()
	c.state.HandshakeComplete = true
	c.done.Store(true)
	return nil
}

// forget wipes the master secret. handshake is held.
func (c *Conn) forget() {
	clear(c.cfg.Session.Secret)
	c.cfg = Config{}
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	if err := c.Handshake(); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	defer c.in.settle()
	for len(c.in.plain) == 0 {
		if err := c.advance(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.in.plain)
	c.in.plain = c.in.plain[n:]
	if len(c.in.plain) == 0 && c.in.waits(recordAlert) {
		// The end comes with the last bytes, so that nobody takes the connection
		// for a live one in between.
		if err := c.advance(); err != nil {
			return n, err
		}
	}
	return n, nil
}

// advance reads one record of a connection whose handshake is complete.
func (c *Conn) advance() error {
	record, err := c.next()
	if err != nil {
		return err
	}
	in := &c.in
	if len(in.hand) > 0 && record.kind != recordHandshake {
		return c.fail(alertUnexpectedMessage, errors.New("a handshake message is interrupted"))
	}
	switch record.kind {
	case recordApplicationData:
		if len(record.content) == 0 {
			return c.countUseless()
		}
		in.useless = 0
		in.plain = record.content
		return nil
	case recordAlert:
		return c.alerted(record.content)
	case recordHandshake:
		return c.requested(record.content)
	}
	return c.fail(alertUnexpectedMessage, errors.New("ChangeCipherSpec after the handshake"))
}

// requested answers HelloRequests, which ask for a renegotiation (RFC 5246
// section 7.4.1.1). No other handshake message may come.
func (c *Conn) requested(content []byte) error {
	if len(content) == 0 {
		return c.fail(alertUnexpectedMessage, errors.New("an empty handshake record"))
	}
	for _, b := range content {
		// A HelloRequest is a type of 0 and a length of 0.
		if b != 0 {
			return c.fail(alertUnexpectedMessage, errors.New("a handshake message after the handshake"))
		}
		c.in.hand = append(c.in.hand, b)
		if len(c.in.hand) < messageHeader {
			continue
		}
		c.in.hand = c.in.hand[:0]
		if err := c.countUseless(); err != nil {
			return err
		}
		c.out.refusals.Add(1)
	}
	c.flushAlerts()
	return nil
}

// Close implements net.Conn. It sends close_notify first, unless a Write is under
// way, which it interrupts.
func (c *Conn) Close() error {
	var calls int32
	for {
		calls = c.calls.Load()
		if calls&1 != 0 {
			return net.ErrClosed
		}
		if c.calls.CompareAndSwap(calls, calls|1) {
			break
		}
	}
	var notifyErr error
	if calls == 0 && c.done.Load() {
		if err := c.notify(); err != nil {
			notifyErr = fmt.Errorf("send close_notify: %w", err)
		}
	}
	if c.handshake.TryLock() { // otherwise a handshake is under way, which will
		if c.failed == nil && !c.done.Load() {
			c.failed = net.ErrClosed
		}
		c.forget()
		c.handshake.Unlock()
	}
	if err := c.conn.Close(); err != nil {
		return err
	}
	return notifyErr
}

var errEarly = errors.New("CloseWrite before the handshake is complete")

// CloseWrite sends close_notify, for which it waits at most 5 s. Reading goes on.
func (c *Conn) CloseWrite() error {
	if !c.done.Load() {
		return errEarly
	}
	return c.notify()
}
