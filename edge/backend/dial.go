package backend

import (
	"context"
	"errors"
	"time"

	"github.com/reseal/reseal/edge/conn"
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
			c.Close() // gives the slot back
		}
		e.dialFailed(set, begin, c != nil, err)
		return
	}
	e.dialled(set, c, h2, protocol)
}

// speak finds out what is spoken on c, and starts HTTP/2 if that is it.
func (e *endpoint) speak(c *pooled) (protocol string, h2 *h2Conn, err error) {
	defer e.pool.b.caught("a dial", &err)
	protocol, err = e.protocolOf(c)
	if protocol == protocolHTTP2 {
		h2, err = e.startH2(c)
	}
	return protocol, h2, err
}

// startH2 starts HTTP/2 on c and waits until it can be used.
func (e *endpoint) startH2(c *pooled) (*h2Conn, error) {
	state := e.pool.state.Load()
	h, err := newH2Conn(c)
	if err != nil {
		return nil, err
	}
	return h, h.awaitSettings(state.settings.handshakeTimeout)
}

// protocolOf returns what is spoken on c.
func (e *endpoint) protocolOf(c *pooled) (string, error) {
	asked := e.settings().protocol
	switch {
	case asked == resealv1.BackendPool_PROTOCOL_TCP:
		return protocolTCP, nil
	case c.TLS.ConnectionState().NegotiatedProtocol == protocolHTTP2:
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
func (e *endpoint) dialled(set *connSet, c *pooled, h2 *h2Conn, protocol string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	settings := e.settings()
	set.dials--
	set.protocol = protocol
	switch protocol {
	case protocolHTTP2:
		set.h2 = append(set.h2, h2)
		h2.listed = true
		if c.Closing() {
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
			c.Close()
		}
	}
	e.dialMore(set, settings)
}

// offerRaw gives a connection to the first tunnel. Without one it is closed:
// servers that speak first would leave it in an unknown state.
func (e *endpoint) offerRaw(set *connSet, c *pooled) {
	if len(set.waiters) == 0 {
		c.Close()
		return
	}
	w := set.waiters[0]
	set.waiters = append(set.waiters[:0], set.waiters[1:]...)
	e.exit(w)
	c.Count(conn.Active)
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

// connect opens a connection. slot says whether it counts in the endpoint's open
// connections.
func (e *endpoint) connect(ctx context.Context, state *poolState, key connKey, slot bool) (c *pooled, err error) {
	b, settings := e.pool.b, state.settings
	defer b.caught("a dial", &err)
	c = &pooled{e: e, key: key, slot: slot}
	dialer := conn.Dialer{Handshaker: b.cfg.Handshaker, Dial: b.cfg.Dial, Counters: e.pool.counters, Guard: guard{b}}
	target := conn.Target{
		Address: e.Address, Identity: state.sessionIdentity(e.Address, key), TLS: state.tls, ServerName: key.serverName,
		Terms: settings.terms, Renegotiates: settings.renegotiates,
		DialTimeout: settings.connectTimeout, HandshakeTimeout: settings.handshakeTimeout,
	}
	if key.http1 {
		target.ALPN = []string{protocolHTTP1}
	}
	if c.Conn, err = dialer.Connect(ctx, target, c); err != nil {
		return nil, connectError(err)
	}
	b.track(c) // from here on a shutdown may close it at any time
	e.pool.counters.Add(exchange.Opened.At(), 1)
	return c, nil
}

// connectError names what went wrong before a connection was there.
func connectError(err error) error {
	var failed *conn.Error
	if !errors.As(err, &failed) {
		return err
	}
	switch failed.Step {
	case conn.StepReserve: // it waited too long behind others
		return handshakeError(failed.Err).blamed(blameEdge)
	case conn.StepDial:
		return dialError(failed.Err)
	default:
		return handshakeError(failed.Err)
	}
}
