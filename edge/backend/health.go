package backend

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

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
	defer c.Close()
	if ctx.Err() != nil { // the edge stops
		return ctx.Err()
	}
	var resp *http.Response
	x := e.checkExchange(ctx, state, spec)
	a := &attempt{x: x, e: e}
	e.Begin()
	defer a.end(nil)
	protocol, err := e.protocolOf(c)
	switch protocol {
	case "":
		return err
	case protocolTCP:
		return nil
	case protocolHTTP2:
		var h *h2Conn
		if h, err = newH2Conn(c); err != nil {
			return err
		}
		h.streams = 1
		resp, err = h.roundTrip(ctx, a)
	default:
		resp, err = newH1Conn(c).roundTrip(ctx, a)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, cheapRest)
	if !expected(spec, resp.StatusCode) {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	return nil
}

func expected(spec *resealv1.HealthCheck, status int) bool {
	if len(spec.GetExpectedStatuses()) == 0 {
		return status >= 200 && status <= 399
	}
	return slices.Contains(spec.GetExpectedStatuses(), uint32(status))
}

// checkExchange is a health check's request. It is not a request of the pool's, so
// it is marked as counted.
func (e *endpoint) checkExchange(ctx context.Context, state *poolState, spec *resealv1.HealthCheck) *trip {
	target, err := url.ParseRequestURI(spec.GetPath())
	if err != nil {
		target = &url.URL{Path: "/"}
	}
	target.Scheme, target.Host = "https", spec.GetServerName()
	req := (&http.Request{
		Method: spec.GetMethod(), URL: target, Host: spec.GetServerName(),
		Header: http.Header{"User-Agent": {"reseal-health-check"}},
		Proto:  "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}).WithContext(ctx)
	x := &trip{
		p: e.pool, state: state, call: &exchange.Exchange{}, req: req, body: &requestBody{},
		begin: time.Now(), header: state.settings.checkTimeout,
	}
	x.finished.Store(true)
	return x
}
