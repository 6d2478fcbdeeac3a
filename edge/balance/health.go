package balance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// CheckLoop runs one for each endpoint, each at its own pace, until ctx ends. one
// runs CheckEndpoint, until its context ends.
func (b *Balancer) CheckLoop(ctx context.Context, one func(context.Context, *Endpoint)) {
	var all sync.WaitGroup
	defer all.Wait()
	running := map[*Endpoint]context.CancelFunc{}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		view := b.view.Load()
		members := map[*Endpoint]bool{}
		for _, m := range view.members {
			members[m.Endpoint] = true
			if running[m.Endpoint] == nil {
				own, cancel := context.WithCancel(ctx)
				running[m.Endpoint] = cancel
				all.Go(func() { one(own, m.Endpoint) })
			}
		}
		for e, cancel := range running {
			if !members[e] {
				cancel()
				delete(running, e)
			}
		}
		timer.Reset(min(max(view.rules.checkInterval, 10*time.Millisecond), time.Second))
	}
}

// CheckEndpoint checks one endpoint. The first check comes at a random moment of
// the interval, so that an edge does not check all at once. check reports why the
// endpoint failed it, if it did, and whether that says anything about the endpoint.
func (b *Balancer) CheckEndpoint(ctx context.Context, e *Endpoint, check func(context.Context) (failure error, counts bool)) {
	var asked *question
	var streak int // of answers to it; > 0 good, < 0 bad
	wait := time.Duration(rand.Int64N(int64(max(b.view.Load().rules.checkInterval, time.Millisecond))))
	timer := time.NewTimer(min(wait, time.Second))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		rules := b.view.Load().rules
		if !rules.Checks() {
			return
		}
		if asked != rules.question {
			asked, streak = rules.question, 0
		}
		failure, counts := check(ctx)
		if ctx.Err() != nil {
			return
		}
		if counts {
			streak = b.judge(e, asked, streak, failure)
		}
		timer.Reset(max(b.view.Load().rules.checkInterval, time.Millisecond))
	}
}

// question is what a health check asks. Rules that ask the same share it. A verdict
// counts only for the question that it answers: without a health check, or with
// another one, an endpoint starts as healthy.
type question struct {
	path, method, serverName, statuses string
}

func questionOf(check *resealv1.HealthCheck) *question {
	if check == nil {
		return nil
	}
	return &question{
		path: check.GetPath(), method: check.GetMethod(), serverName: check.GetServerName(),
		statuses: fmt.Sprint(check.GetExpectedStatuses()),
	}
}

// Unhealthy reports whether the endpoint fails the health check.
func (v *View) Unhealthy(e *Endpoint) bool {
	failed := e.sick.Load()
	return failed != nil && failed == v.rules.question
}

// judge counts checks in a row and turns the endpoint's health at the thresholds.
func (b *Balancer) judge(e *Endpoint, asked *question, streak int, failure error) int {
	if failure == nil {
		streak = max(streak, 0) + 1
	} else {
		streak = min(streak, 0) - 1
	}
	threshold := b.view.Load().rules.threshold
	log := b.cfg.Logger.With("pool", b.cfg.Pool, "endpoint", e.Address)
	switch {
	case streak >= max(threshold.up, 1) && e.sick.CompareAndSwap(asked, nil):
		log.Info("endpoint is healthy")
	case -streak >= max(threshold.down, 1) && e.sick.Swap(asked) != asked:
		log.Warn("endpoint is unhealthy", "error", failure)
	}
	return streak
}
