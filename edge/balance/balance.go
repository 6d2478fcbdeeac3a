// Package balance chooses the endpoint of a request: it knows a pool's endpoints,
// which may come from DNS, their weights, load, health and ejections. Of
// connections and TLS it knows nothing; who has them tells it what became of
// requests and health checks.
package balance

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Config is what a Balancer needs. It is read once, by New. All is required.
type Config struct {
	// Pool is the pool's name, for the log.
	Pool string
	// Logger gets changes of health, ejections and look-ups that fail.
	Logger *slog.Logger
	// Resolve looks up the addresses of a name.
	Resolve func(ctx context.Context, name string) ([]netip.Addr, error)
	// Publish is called with each new view that a look-up brings about, as the
	// argument of Update is: by one goroutine at a time. It must not wait.
	Publish func(*View)
}

// Balancer holds the endpoints of a pool over all its configurations. Its methods
// are safe for concurrent use.
type Balancer struct {
	cfg  Config
	view atomic.Pointer[View]

	mu        sync.Mutex // guards what follows, and changes of view
	endpoints map[string]*Endpoint
	inherited map[string]Health // of endpoints that are not known yet, by address
	addresses []weighted        // what DNS answered, or the spec's endpoints
	foreign   bool              // addresses are not of the view's look-up, which is under way
	ejecting  sync.Mutex        // one ejection at a time, so that one endpoint stays
}

// Endpoint is one address of a pool, with its load and health. It outlives views:
// what follows from its state is read from the present one.
type Endpoint struct {
	// Address is host:port.
	Address string

	inFlight  atomic.Int64             // requests
	sick      atomic.Pointer[question] // the health check that it fails, if any
	failures  atomic.Int32             // of requests in a row
	ejectedAt atomic.Int64             // Unix ns; 0 is never
}

// Begin notes that a request, or a health check, goes to the endpoint.
func (e *Endpoint) Begin() { e.inFlight.Add(1) }

// End notes that the endpoint is no longer busy with it.
func (e *Endpoint) End() { e.inFlight.Add(-1) }

// InFlight is how many have begun and not ended.
func (e *Endpoint) InFlight() int64 { return e.inFlight.Load() }

// View is the endpoints of a pool under one configuration. It is immutable.
type View struct {
	balancer *Balancer
	rules    *Rules
	members  []*member
	ring     *ring
	resolved chan struct{} // closed after the first look-up, or from the start

	turns sync.Mutex // guards member.turn
}

// member is an endpoint with its weight in one view.
type member struct {
	*Endpoint
	weight int
	turn   int // round robin; guarded by View.turns
}

type weighted struct {
	address string
	weight  int
}

// New returns a Balancer without endpoints. Update is called next.
func New(cfg Config) *Balancer {
	return &Balancer{cfg: cfg, endpoints: map[string]*Endpoint{}}
}

// Update takes over a configuration. Afterwards the balancer behaves as a new one
// would, but for what it knows of endpoints: load, verdicts of the same health
// check, ejections. publish is given the view, as Config.Publish is.
func (b *Balancer) Update(rules *Rules, publish func(*View)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.view.Load()
	if old != nil && rules.question != nil && old.rules.question != nil && *old.rules.question == *rules.question {
		rules.question = old.rules.question
	}
	resolved := make(chan struct{})
	switch {
	case rules.dns == nil:
		close(resolved)
		b.addresses, b.foreign = nil, false
		for _, e := range rules.endpoints {
			b.addresses = append(b.addresses, weighted{e.GetAddress(), int(e.GetWeight())})
		}
	case old != nil && old.rules.looksUp(rules.dns):
		resolved = old.resolved
	default:
		// The last addresses stay until the look-up is done, if they are of use.
		b.foreign = true
		if !slices.ContainsFunc(b.addresses, func(a weighted) bool { return a.weight > 0 }) {
			b.addresses = nil
		}
	}
	b.apply(&View{balancer: b, rules: rules, resolved: resolved}, publish)
	b.readmit()
}

// apply fills in the endpoints at b.addresses and publishes the view. b.mu is held.
func (b *Balancer) apply(next *View, publish func(*View)) {
	keep := make(map[string]*Endpoint, len(b.addresses))
	for _, a := range b.addresses {
		if keep[a.address] != nil {
			continue
		}
		e := b.endpoints[a.address]
		if e == nil {
			e = &Endpoint{Address: a.address}
			b.restore(e, next.rules)
		}
		keep[a.address] = e
		next.members = append(next.members, &member{Endpoint: e, weight: a.weight})
	}
	if next.rules.algorithm == resealv1.LoadBalancing_ALGORITHM_RING_HASH {
		next.ring = newRing(next.members)
	}
	b.endpoints = keep
	b.view.Store(next)
	publish(next)
}

// readdress replaces the endpoints of a DNS pool. b.mu is held.
func (b *Balancer) readdress(addresses []weighted) {
	old := b.view.Load()
	b.addresses = addresses
	b.apply(&View{balancer: b, rules: old.rules, resolved: old.resolved}, b.cfg.Publish)
}

// Endpoints are all, also those that get no requests now.
func (v *View) Endpoints() []*Endpoint {
	all := make([]*Endpoint, len(v.members))
	for i, m := range v.members {
		all[i] = m.Endpoint
	}
	return all
}

// Empty reports whether there is no endpoint, as before the first look-up.
func (v *View) Empty() bool { return len(v.members) == 0 }

// Resolved is closed once the first look-up is done. A later view has what it
// found.
func (v *View) Resolved() <-chan struct{} { return v.resolved }
