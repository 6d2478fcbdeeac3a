package backend

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// checkLoop checks all endpoints, each at its own pace, until ctx ends.
func (p *pool) checkLoop(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	running := map[*endpoint]context.CancelFunc{}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		state := p.state.Load()
		members := map[*endpoint]bool{}
		for _, m := range state.members {
			members[m.endpoint] = true
			if running[m.endpoint] == nil {
				one, cancel := context.WithCancel(ctx)
				running[m.endpoint] = cancel
				all.Go(func() { p.b.loop(one, "health checks", m.endpoint.checkLoop) })
			}
		}
		for e, cancel := range running {
			if !members[e] {
				cancel()
				delete(running, e)
			}
		}
		timer.Reset(min(max(state.settings.checkInterval, 10*time.Millisecond), time.Second))
	}
}

// checkLoop checks one endpoint. The first check comes at a random moment of the
// interval, so that an edge does not check all at once.
func (e *endpoint) checkLoop(ctx context.Context) {
	var asked *checkQuestion
	var streak int // of answers to it; > 0 good, < 0 bad
	wait := time.Duration(rand.Int64N(int64(max(e.settings().checkInterval, time.Millisecond))))
	timer := time.NewTimer(min(wait, time.Second))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		state := e.pool.state.Load()
		if state.settings.check == nil {
			return
		}
		if asked != state.settings.question {
			asked, streak = state.settings.question, 0
		}
		err := e.check(ctx, state)
		if ctx.Err() != nil {
			return
		}
		if reasonOf(err) != ReasonLocalFailure {
			streak = e.judge(asked, streak, err)
		}
		timer.Reset(max(e.settings().checkInterval, time.Millisecond))
	}
}

// checkQuestion is what a health check asks. Settings that ask the same share it.
// A verdict counts only for the question that it answers: without a health check,
// or with another one, an endpoint starts as healthy.
type checkQuestion struct {
	path, method, serverName, statuses string
}

func questionOf(check *resealv1.HealthCheck) *checkQuestion {
	if check == nil {
		return nil
	}
	return &checkQuestion{
		path: check.GetPath(), method: check.GetMethod(), serverName: check.GetServerName(),
		statuses: fmt.Sprint(check.GetExpectedStatuses()),
	}
}

// unhealthy reports whether the endpoint fails the health check of s.
func (e *endpoint) unhealthy(s *settings) bool {
	failed := e.sick.Load()
	return failed != nil && failed == s.question
}

// judge counts checks in a row and turns the endpoint's health at the
// thresholds.
func (e *endpoint) judge(asked *checkQuestion, streak int, err error) int {
	if err == nil {
		streak = max(streak, 0) + 1
	} else {
		streak = min(streak, 0) - 1
	}
	threshold := e.settings().checkThreshold
	log := e.pool.b.cfg.Logger.With("pool", e.pool.name, "endpoint", e.address)
	switch {
	case streak >= max(threshold.up, 1) && e.sick.CompareAndSwap(asked, nil):
		log.Info("endpoint is healthy")
	case -streak >= max(threshold.down, 1) && e.sick.Swap(asked) != asked:
		log.Warn("endpoint is unhealthy", "error", err)
	}
	return streak
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
	defer c.close()
	if ctx.Err() != nil { // the edge stops
		return ctx.Err()
	}
	var resp *http.Response
	x := e.checkExchange(ctx, state, spec)
	a := &attempt{x: x, e: e}
	e.inFlight.Add(1)
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
