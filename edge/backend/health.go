package backend

import (
	"context"
	"fmt"
	"slices"

	"github.com/reseal/reseal/edge/balance"
	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// checkLoop makes the health checks until ctx ends.
func (p *pool) checkLoop(ctx context.Context) {
	p.balancer.CheckLoop(ctx, func(ctx context.Context, at *balance.Endpoint) {
		p.b.loop(ctx, "health checks", func(ctx context.Context) {
			p.balancer.CheckEndpoint(ctx, at, func(ctx context.Context) (failure error, counts bool) {
				state := p.state.Load()
				e := state.endpoints[at.Address]
				if e == nil || e.Endpoint != at || state.settings.check == nil {
					return nil, false // it is no more
				}
				failure = e.check(ctx, state)
				return failure, reasonOf(failure) != ReasonLocalFailure
			})
		})
	})
}

// check makes one health check: a connection of its own, with the pool's
// sessions and ALPN, a request, and a clean close.
func (e *endpoint) check(ctx context.Context, state *poolState) error {
	spec := state.settings.check
	ctx, cancel := context.WithTimeout(ctx, state.settings.checkTimeout)
	defer cancel()
	c, err := e.connect(ctx, state, connKey{serverName: spec.GetServerName()}, false)
	if err != nil {
		return err
	}
	k := &check{c: c, spec: spec, done: make(chan error, 1)}
	e.Begin()
	defer e.End()
	e.speak(c, e.pool.b.cfg.Loops.Next(), k.ready)
	select {
	case err = <-k.done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.Do(c.speaker.shut)
	return err
}

// check is a health check under way: the Front of its request. It belongs to the
// connection's loop.
type check struct {
	c    *pooled
	spec *resealv1.HealthCheck
	flow exchange.Flow
	read int
	good error      // what comes of it if the answer ends
	done chan error // of capacity 1; nil is a good endpoint
}

// ready sends the request.
func (k *check) ready(s *soloConn, h *h2Conn, err error) {
	var on carrier = s
	if h != nil {
		on = h
		h.streams, h.live = 1, 1
	}
	switch {
	case err != nil:
		k.end(err)
		return
	case h == nil && s.http == nil:
		k.end(nil) // the handshake is all there is to check of a tunnel
		return
	}
	target := k.spec.GetPath()
	if !exchange.ValidOrigin(target) {
		target = "/"
	}
	k.flow = on.carry(k.c.Loop(), &exchange.Exchange{}, &exchange.Request{
		Method: k.spec.GetMethod(), Scheme: "https", Authority: k.spec.GetServerName(), Target: target,
		Fields:  exchange.Fields{{Name: "User-Agent", Value: "reseal-health-check"}},
		Version: exchange.HTTP11,
	}, k)
}

// end settles what comes of the check. Only the first word counts.
func (k *check) end(err error) {
	select {
	case k.done <- err:
	default:
	}
}

// Informational implements exchange.Front.
func (*check) Informational(*exchange.Response) {}

// Response implements exchange.Front.
func (k *check) Response(r *exchange.Response, end bool) {
	if !expected(k.spec, r.Status) {
		k.good = fmt.Errorf("status %d", r.Status)
	}
	if end {
		k.end(k.good)
	}
}

// Data implements exchange.Front. The rest of an answer is read, up to a point.
func (k *check) Data(p []byte, end bool) {
	if k.read += len(p); end || k.read > cheapRest {
		k.end(k.good)
		return
	}
	k.flow.Consumed(len(p))
}

// End implements exchange.Front.
func (k *check) End(exchange.Fields) { k.end(k.good) }

// Failed implements exchange.Front.
func (k *check) Failed(err error) { k.end(err) }

// Sent implements exchange.Front.
func (*check) Sent(int) {}

func expected(spec *resealv1.HealthCheck, status int) bool {
	if len(spec.GetExpectedStatuses()) == 0 {
		return status >= 200 && status <= 399
	}
	return slices.Contains(spec.GetExpectedStatuses(), uint32(status))
}
