package backend

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/balance"
	"github.com/reseal/reseal/edge/conn"
	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// tunnelConn is a connection of a tcp pool. Such connections are never reused.
type tunnelConn struct {
	c     *pooled
	x     *trip
	e     *endpoint
	dog   *watchdog
	cause atomic.Pointer[error]
	once  sync.Once
}

// tunnel opens a connection, on another endpoint if one fails.
func (p *pool) tunnel(ctx context.Context, call *exchange.Exchange) (exchange.Tunnel, error) {
	x := &trip{p: p, call: call, begin: time.Now()}
	t, err := x.openTunnel(ctx)
	if err != nil {
		x.finish(err)
		return nil, told(call, err)
	}
	return t, nil
}

func (x *trip) openTunnel(ctx context.Context) (exchange.Tunnel, error) {
	state, err := x.p.awaitMembers(ctx)
	if err != nil {
		return nil, err
	}
	if x.key.serverName, err = state.serverName(x.call); err != nil {
		return nil, err
	}
	if state.settings.protocol != resealv1.BackendPool_PROTOCOL_TCP {
		return nil, fail(ReasonProtocolError, errNoTunnel)
	}
	x.state = state
	var tried []*balance.Endpoint
	for further := state.settings.retries; ; further-- {
		e := state.pick(x.call, nil, tried)
		if e == nil {
			return nil, fail(ReasonNoEndpoint, nil)
		}
		x.call.Attempts++
		t, err := x.tryTunnel(ctx, e)
		if err == nil {
			return t, nil
		}
		if further <= 0 || ctx.Err() != nil || !state.settings.retryConnect || !neverConnected(err) {
			return nil, err
		}
		tried = append(tried, e.Endpoint)
	}
}

// neverConnected reports whether no connection was made.
func neverConnected(err error) bool {
	switch reasonOf(err) {
	case ReasonConnectFailure, ReasonHandshakeFailure, ReasonVerifyFailure, ReasonLocalFailure:
		return true
	}
	return false
}

func (x *trip) tryTunnel(ctx context.Context, e *endpoint) (exchange.Tunnel, error) {
	a := &attempt{x: x, e: e}
	e.Begin()
	begin := time.Now()
	g, err := e.acquire(ctx, x.key, &waiter{call: x.call, raw: true})
	if err != nil {
		x.call.Endpoint, x.call.Connect = e.Address, time.Since(begin)
		a.end(err)
		return nil, err
	}
	g.raw.fill(x.call, protocolTCP, false)
	x.call.Connect = g.raw.Took
	e.Succeeded()
	t := &tunnelConn{c: g.raw, x: x, e: e}
	t.dog = newWatchdog(x.state.settings.bodyTimeout, func() { t.end(idleError(true)) })
	t.dog.wait(1)
	g.raw.Hook(conn.Hooks{Broken: func() { t.end(fail(ReasonReset, errClosed)) }})
	return t, nil
}

// Read implements io.Reader. io.EOF is the peer's close_notify or FIN.
func (t *tunnelConn) Read(p []byte) (int, error) {
	n, err := t.c.Read(p)
	t.dog.touch()
	return n, t.explain(err)
}

// Write implements io.Writer.
func (t *tunnelConn) Write(p []byte) (int, error) {
	n, err := t.c.Write(p)
	t.dog.touch()
	return n, t.explain(err)
}

// explain puts the cause in place of what it led to.
func (t *tunnelConn) explain(err error) error {
	if cause := t.cause.Load(); err != nil && cause != nil {
		return *cause
	}
	return err
}

// CloseWrite sends close_notify; reading goes on (RFC 8446 section 6.1).
func (t *tunnelConn) CloseWrite() error { return t.c.TLS.CloseWrite() }

// Close ends the tunnel.
func (t *tunnelConn) Close() error {
	t.end(errBodyClosed)
	return nil
}

func (t *tunnelConn) end(cause error) {
	t.once.Do(func() {
		t.cause.Store(&cause)
		t.dog.stop()
		t.e.End()
		t.x.finish(cause)
		t.c.Close()
	})
}
