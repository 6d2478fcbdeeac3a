package backend

import (
	"context"
	"errors"
	"time"

	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
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

// dial opens one connection for a set, on a loop. It belongs to no request: whoever
// waits first gets it, and if nobody does it stays idle for the next.
func (e *endpoint) dial(set *connSet, at *loop.Loop) {
	begin := time.Now()
	c, err := e.connect(e.pool.b.ctx, e.pool.state.Load(), set.key, true)
	if err != nil {
		e.dialFailed(set, begin, false, err)
		return
	}
	e.speak(c, at, func(s *soloConn, h *h2Conn, err error) {
		if err == nil && e.pool.b.ctx.Err() != nil {
			err = fail(ReasonOverloaded, errClosed)
		}
		if err == nil {
			e.dialled(set, s, h)
			return
		}
		e.dialFailed(set, begin, true, err)
		c.speaker.shut() // gives the slot back
	})
}

// speak brings a connection to a loop. ready is told there when it can serve, on a
// connection of one of both kinds, or why it can't.
func (e *endpoint) speak(c *pooled, at *loop.Loop, ready func(*soloConn, *h2Conn, error)) {
	protocol, err := e.protocolOf(c)
	if protocol == protocolHTTP2 {
		c.run(at, newH2Conn(c, func(h *h2Conn, err error) { ready(nil, h, err) }))
		return
	}
	var s *soloConn
	s = newSoloConn(c, protocol, func(broken error) {
		if err == nil && broken != nil {
			err = dialError(broken) // no loop could take it
		}
		ready(s, nil, err)
	})
	c.run(at, s)
}

// protocolOf returns what is spoken on c.
func (e *endpoint) protocolOf(c *pooled) (string, error) {
	asked := e.settings().protocol
	switch {
	case asked == resealv1.BackendPool_PROTOCOL_TCP:
		return protocolTCP, nil
	case c.Protocol == protocolHTTP2:
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
func (e *endpoint) dialled(set *connSet, s *soloConn, h2 *h2Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	settings := e.settings()
	set.dials--
	switch {
	case h2 != nil:
		set.protocol = protocolHTTP2
		set.h2 = append(set.h2, h2)
		h2.listed = true
		if h2.Closing() {
			h2.unlist()
		}
		e.serve(set, settings)
		if e.retired || e.surplus(settings) > 0 || e.pool.b.ctx.Err() != nil {
			h2.retireLocked()
		}
	default:
		set.protocol = protocolHTTP1
		if s.http == nil {
			set.protocol = protocolTCP
		}
		if !e.offer(s, settings) {
			e.discard(s)
		}
	}
	e.dialMore(set, settings)
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
		w.tell(grant{err: err})
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
