package backend

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// What is spoken on a connection, as a Call tells it.
const (
	protocolHTTP1 = "http/1.1"
	protocolHTTP2 = "h2"
	protocolTCP   = "tcp"
)

func (s *settings) speaksHTTP1Only() bool {
	return s.protocol == resealv1.BackendPool_PROTOCOL_HTTP1 || s.protocol == resealv1.BackendPool_PROTOCOL_TCP
}

// dial opens one connection for a set. It belongs to no request: whoever waits
// first gets it, and if nobody does it stays idle for the next.
func (e *endpoint) dial(set *connSet) {
	begin := time.Now()
	c, err := e.connect(e.pool.b.ctx, e.pool.state.Load(), set.key, true)
	var protocol string
	var h2 *h2Conn
	switch {
	case err != nil:
	case e.pool.b.ctx.Err() != nil:
		err = fail(ReasonOverloaded, errClosed)
	default:
		protocol, h2, err = e.speak(c)
	}
	if err != nil {
		if c != nil {
			c.close() // gives the slot back
		}
		e.dialFailed(set, begin, c != nil, err)
		return
	}
	e.dialled(set, c, h2, protocol)
}

// speak finds out what is spoken on c, and starts HTTP/2 if that is it.
func (e *endpoint) speak(c *conn) (protocol string, h2 *h2Conn, err error) {
	defer e.pool.b.caught("a dial", &err)
	protocol, err = e.protocolOf(c)
	if protocol == protocolHTTP2 {
		h2, err = e.startH2(c)
	}
	return protocol, h2, err
}

// startH2 starts HTTP/2 on c and waits until it can be used.
func (e *endpoint) startH2(c *conn) (*h2Conn, error) {
	state := e.pool.state.Load()
	h, err := newH2Conn(c)
	if err != nil {
		return nil, err
	}
	return h, h.awaitSettings(state.settings.handshakeTimeout)
}

// protocolOf returns what is spoken on c.
func (e *endpoint) protocolOf(c *conn) (string, error) {
	asked := e.settings().protocol
	switch {
	case asked == resealv1.BackendPool_PROTOCOL_TCP:
		return protocolTCP, nil
	case c.tc.ConnectionState().NegotiatedProtocol == protocolHTTP2:
		return protocolHTTP2, nil
	case asked == resealv1.BackendPool_PROTOCOL_HTTP2:
		return "", fail(ReasonProtocolError, errNotH2)
	}
	return protocolHTTP1, nil
}

// redialPause keeps calls that wait for a stream, and so don't end with a dial
// that fails, from dialling without a break.
const redialPause = 250 * time.Millisecond

// dialFailed tells the waiters. A connection that was opened gives its slot back
// when it is closed.
func (e *endpoint) dialFailed(set *connSet, begin time.Time, opened bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	settings := e.settings()
	set.dials--
	err = set.judge(settings, err)
	e.failWaiters(set, settings, begin, err)
	if !opened {
		e.freeSlot()
	}
	e.tidy(set)
}

// judge takes the blame for a handshake that failed from the endpoint where a
// client may have caused it: by the name that it chose, as long as the endpoint
// has never been reached under it, or by an Upgrade, for which h2 is not offered.
// endpoint.mu is held.
func (set *connSet) judge(settings *settings, err error) error {
	var e *Error
	if !errors.As(err, &e) || e.Reason != ReasonHandshakeFailure && e.Reason != ReasonVerifyFailure {
		return err
	}
	if set.protocol == "" && (settings.serverName == "" || set.key.http1) {
		return e.blamed(blameEdge)
	}
	return err
}

// dialled hands a new connection to the waiters.
func (e *endpoint) dialled(set *connSet, c *conn, h2 *h2Conn, protocol string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	settings := e.settings()
	set.dials--
	set.protocol = protocol
	switch protocol {
	case protocolHTTP2:
		set.h2 = append(set.h2, h2)
		h2.listed = true
		if c.closing.Load() {
			h2.unlist()
		}
		e.serve(set, settings)
		if e.retired || e.pool.b.ctx.Err() != nil {
			h2.retireLocked()
		}
	case protocolTCP:
		e.offerRaw(set, c)
	default:
		h1 := newH1Conn(c)
		if !e.offer(h1, settings) {
			c.close()
		}
	}
	e.dialMore(set, settings)
}

// offerRaw gives a connection to the first tunnel. Without one it is closed:
// servers that speak first would leave it in an unknown state.
func (e *endpoint) offerRaw(set *connSet, c *conn) {
	if len(set.waiters) == 0 {
		c.close()
		return
	}
	w := set.waiters[0]
	set.waiters = append(set.waiters[:0], set.waiters[1:]...)
	e.exit(w)
	c.count(gaugeActive)
	w.got <- grant{raw: c}
}

// failWaiters tells a failed dial to those who waited for it alone. Calls that
// may yet get a stream of an open h2 connection wait on, and whoever came after
// the dial began gets another one: what has failed may long be over, as when a
// backend restarts.
func (e *endpoint) failWaiters(set *connSet, settings *settings, begin time.Time, err error) {
	most := len(set.waiters)
	if e.manyDials(set, settings) {
		most = min(most, 1)
	}
	var left []*waiter
	for _, w := range set.waiters {
		hopes := len(set.h2) > 0 && !w.fresh && !settings.private()
		if most == 0 || hopes || w.since.After(begin) {
			left = append(left, w)
			continue
		}
		most--
		e.exit(w)
		w.got <- grant{err: err}
	}
	set.waiters = left
	if len(set.h2) > 0 {
		set.hold = time.Now().Add(redialPause)
	}
}

// connect opens a TCP connection and makes the handshake, once more in full on
// another connection if an offered session broke it. slot says whether it counts
// in the endpoint's open connections.
func (e *endpoint) connect(ctx context.Context, state *poolState, key connKey, slot bool) (c *conn, err error) {
	defer e.pool.b.caught("a dial", &err)
	begin := time.Now()
	config := e.clientConfig(state, key)
	identity := state.sessionIdentity(e.Address, key)
	attempt, err := e.reserve(ctx, state, identity)
	if err != nil {
		return nil, err
	}
	socket, err := e.openSocket(ctx, state.settings)
	if err != nil {
		attempt.Release()
		if ofEndpoint(err) {
			// A server that refuses may be one that restarts and has forgotten its
			// sessions.
			e.pool.b.cfg.Handshaker.Doubt(identity)
		}
		return nil, err
	}
	c, err = e.shake(ctx, state, socket, func(ctx context.Context, w *wire) (
		exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
		return attempt.Handshake(ctx, w, config)
	})
	if redo := (exchange.FullHandshaker)(nil); err != nil && errors.As(err, &redo) {
		if !worthRedoing(err) {
			redo.Release()
			return nil, err
		}
		if socket, err = e.openSocket(ctx, state.settings); err != nil {
			redo.Release()
			return nil, err
		}
		c, err = e.shake(ctx, state, socket, func(ctx context.Context, w *wire) (
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
	c.key, c.identity, c.connect, c.slot = key, identity, time.Since(begin), slot
	e.pool.b.track(c) // from here on a shutdown may close it at any time
	e.pool.counters.Add(exchange.Opened.At(), 1)
	return c, nil
}

// reserve waits for the turn of a handshake: while another one may bring a
// session it is cheaper to wait than to make a full one.
func (e *endpoint) reserve(ctx context.Context, state *poolState, identity exchange.Identity) (attempt exchange.Attempt, err error) {
	defer e.pool.b.caught("a dial", &err)
	terms := state.settings.terms
	if state.tls.SessionTicketsDisabled {
		terms.Wait = 0
	}
	waiting, cancel := context.WithTimeout(ctx, state.settings.handshakeTimeout)
	defer cancel()
	attempt, err = e.pool.b.cfg.Handshaker.Reserve(waiting, identity, terms)
	if err != nil { // it waited too long behind others
		return nil, handshakeError(err).blamed(blameEdge)
	}
	return attempt, nil
}

// openSocket opens a TCP connection.
func (e *endpoint) openSocket(ctx context.Context, settings *settings) (socket net.Conn, err error) {
	defer e.pool.b.caught("a dial", &err)
	dialing, cancel := context.WithTimeout(ctx, settings.connectTimeout)
	defer cancel()
	socket, err = e.pool.b.cfg.Dial(dialing, "tcp", e.Address)
	if err != nil {
		return nil, dialError(err)
	}
	return socket, nil
}

// worthRedoing reports whether a handshake without a session may do better.
func worthRedoing(err error) bool {
	var failure *Error
	var netErr net.Error
	if errors.As(err, &failure) && failure.Reason == ReasonVerifyFailure {
		return false
	}
	return !(errors.As(err, &netErr) && netErr.Timeout()) && !errors.Is(err, context.DeadlineExceeded) &&
		!errors.Is(err, context.Canceled)
}

type handshake func(context.Context, *wire) (exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error)

// shake makes one handshake, which is counted.
func (e *endpoint) shake(ctx context.Context, state *poolState, socket net.Conn, do handshake) (*conn, error) {
	settings := state.settings
	w := &wire{Conn: socket}
	shaking, cancel := untilEnded(ctx, settings.handshakeTimeout, settings.closeTimeout)
	defer cancel()
	begin := time.Now()
	tc, mechanism, miss, err := e.caughtShake(shaking, w, do)
	took := time.Since(begin)
	if err != nil {
		if redo := (exchange.FullHandshaker)(nil); !errors.As(err, &redo) || !redo.Declined() {
			e.pool.counters.HandshakeFailed(took)
		}
		w.lingerClose(e.pool.b, settings.closeTimeout)
		return nil, handshakeError(err)
	}
	tls := tc.ConnectionState()
	e.pool.counters.Handshake(mechanism, miss, tls.Version, took)
	c := &conn{
		e: e, tc: tc, wire: w, created: begin,
		resumed: tls.DidResume, version: tls.Version, ended: make(chan struct{}),
	}
	if settings.renegotiates {
		// Another handshake writes into it. It is empty where a session without
		// extended master secret was resumed.
		c.finished = append([]byte{}, tls.TLSUnique...)
	}
	return c, nil
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

func (e *endpoint) caughtShake(ctx context.Context, w *wire, do handshake) (
	tc exchange.TLSConn, mechanism resealv1.Mechanism, miss resealv1.MissReason, err error) {
	defer e.pool.b.caught("a handshake", &err)
	return do(ctx, w)
}

// clientConfig is the pool's TLS configuration for one name.
func (e *endpoint) clientConfig(state *poolState, key connKey) *tls.Config {
	config := state.tls.Clone()
	config.ServerName = key.serverName
	if key.http1 {
		config.NextProtos = []string{protocolHTTP1}
	}
	if verify := config.VerifyConnection; verify != nil {
		config.VerifyConnection = func(cs tls.ConnectionState) error {
			cs.ServerName = key.serverName // crypto/tls tells names only, not addresses
			if err := verify(cs); err != nil {
				return verifyError{err}
			}
			return nil
		}
	}
	return config
}
