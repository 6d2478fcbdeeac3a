package backend

import (
	"context"
	"crypto/tls"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/balance"
	"github.com/reseal/reseal/edge/exchange"
)

// pool is one BackendPool with one Identity. What depends on the spec alone is
// in state and replaced as a whole; endpoints outlive it.
type pool struct {
	b        *Backend
	name     string
	counters exchange.Counters
	state    atomic.Pointer[poolState]
	before   []string // places of the pool that it took over from; guarded by Backend.updating
	share    int      // of maxPerFleet, 0: there is no such limit; likewise

	balancer *balance.Balancer

	mu        sync.Mutex // guards what follows
	loops     context.Context
	stopLoops context.CancelFunc
}

// poolState is immutable.
type poolState struct {
	spec      exchange.Pool // what it was made from
	tls       *tls.Config
	settings  *settings
	rules     *balance.Rules
	view      *balance.View
	endpoints map[string]*endpoint // those of view, by address
}

func newPool(b *Backend, spec exchange.Pool) *pool {
	p := &pool{b: b, name: spec.Name, counters: b.cfg.Counters(spec.Name)}
	p.balancer = balance.New(balance.Config{
		Pool: p.name, Logger: b.cfg.Logger,
		Resolve: func(ctx context.Context, name string) ([]netip.Addr, error) { return b.cfg.Resolve(ctx, name) },
		Publish: func(view *balance.View) { p.publish(*p.state.Load(), view) },
	})
	p.swap(spec)
	return p
}

// update takes over a spec with the same Identity. Afterwards the pool behaves
// as a new one would, but for what it knows of endpoints: connections, verdicts of
// the same health check, ejections. Backend.updating is held.
func (p *pool) update(spec exchange.Pool) {
	old := p.state.Load().rules
	p.swap(spec)
	now := p.state.Load()
	for _, e := range now.endpoints {
		e.fit()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopLoops != nil && old.LoopsDiffer(now.rules) {
		p.stopLoops()
		p.run()
	}
}

// swap compiles spec into a new state.
func (p *pool) swap(spec exchange.Pool) {
	next := poolState{spec: spec, tls: spec.TLS.Clone(), settings: newSettings(spec.Spec), rules: balance.NewRules(spec.Spec)}
	p.entitle(next.settings)
	next.tls.SessionTicketsDisabled = next.tls.SessionTicketsDisabled || next.settings.sessionsOff
	// One record and one write per request: latency ramp-up is for browsers.
	next.tls.DynamicRecordSizingDisabled = true
	p.balancer.Update(next.rules, func(view *balance.View) { p.publish(next, view) })
}

// publish makes view that of the pool's state. The balancer calls it, once at a
// time.
func (p *pool) publish(next poolState, view *balance.View) {
	var before map[string]*endpoint
	if old := p.state.Load(); old != nil {
		before = old.endpoints
	}
	next.view, next.endpoints = view, map[string]*endpoint{}
	for _, at := range view.Endpoints() {
		e := before[at.Address]
		if e == nil {
			e = newEndpoint(p, at)
		}
		next.endpoints[at.Address] = e
	}
	p.state.Store(&next)
	for address, e := range before {
		if next.endpoints[address] == nil {
			e.retire()
		}
	}
}

// pick chooses the endpoint of a request, or returns nil.
func (s *poolState) pick(call *exchange.Exchange, r *exchange.Request, tried []*balance.Endpoint) *endpoint {
	if at := s.view.Pick(call, r, tried); at != nil {
		return s.endpoints[at.Address]
	}
	return nil
}

// awaitMembers returns the pool's state, and waits for the first look-up of a
// DNS pool if it has no endpoint yet.
func (p *pool) awaitMembers(ctx context.Context) (*poolState, error) {
	state := p.state.Load()
	if !state.view.Empty() {
		return state, nil
	}
	timer := time.NewTimer(max(state.settings.connectTimeout, 10*time.Millisecond))
	defer timer.Stop()
	select {
	case <-state.view.Resolved():
	case <-timer.C:
	case <-ctx.Done():
		return nil, fail(ReasonOverloaded, errClosed)
	}
	state = p.state.Load()
	if state.view.Empty() {
		return nil, fail(ReasonNoEndpoint, nil)
	}
	return state, nil
}

func (p *pool) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopLoops == nil {
		p.run()
	}
}

// run starts the pool's goroutines. p.mu is held.
func (p *pool) run() {
	p.loops, p.stopLoops = context.WithCancel(p.b.ctx)
	ctx, rules := p.loops, p.state.Load().rules
	p.b.spawn("sweeps", func() { p.b.loop(ctx, "sweeps", p.sweepLoop) })
	if rules.LooksUp() {
		p.b.spawn("look-ups", func() { p.b.loop(ctx, "look-ups", p.balancer.ResolveLoop) })
	}
	if rules.Checks() {
		p.b.spawn("health checks", func() { p.b.loop(ctx, "health checks", p.checkLoop) })
	}
}

func (p *pool) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopLoops != nil {
		p.stopLoops()
	}
}

// retire ends the pool's connections once they are not in use.
func (p *pool) retire() {
	p.setShare(0)
	for _, e := range p.state.Load().endpoints {
		e.retire()
	}
}

// sweepLoop closes connections that are idle for too long or too old.
func (p *pool) sweepLoop(ctx context.Context) {
	timer := time.NewTimer(p.sweepInterval())
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := time.Now()
		for _, e := range p.state.Load().endpoints {
			e.sweep(now)
		}
		timer.Reset(p.sweepInterval())
	}
}

// sweepInterval is short against the shortest bound that a sweep enforces.
func (p *pool) sweepInterval() time.Duration {
	s := p.state.Load().settings
	shortest := s.idleTimeout
	if s.maxLifetime > 0 {
		shortest = min(shortest, s.maxLifetime)
	}
	return min(max(shortest/8, 5*time.Millisecond), time.Second)
}

// serverName returns the SNI of a call, lower case as plans and listeners
// give it.
func (s *poolState) serverName(call *exchange.Exchange) (string, error) {
	if s.settings.serverName != "" {
		return s.settings.serverName, nil
	}
	if call.ServerName == "" {
		return "", fail(ReasonMisdirected, nil)
	}
	return call.ServerName, nil
}

// sessionIdentity is what a TLS session may be reused within.
func (s *poolState) sessionIdentity(address string, key connKey) exchange.Identity {
	if s.settings.poolScope {
		address = poolPlace(s.spec.UID)
	}
	return exchange.IdentityParts{
		Group: s.spec.Identity, Place: address, ServerName: key.serverName, HTTP1: key.http1,
	}.Identity()
}

// SessionConfig is the TLS configuration of the handshakes that give sessions of
// identity, to check one that another edge gave. It is nil when no connection of
// pool has that identity.
func SessionConfig(pool exchange.Pool, identity exchange.Identity) *tls.Config {
	parts, ok := identity.Parts()
	if !ok || parts.Group != pool.Identity {
		return nil
	}
	s := newSettings(pool.Spec)
	known := pool.Spec.GetDns() != nil
	if s.poolScope {
		known = parts.Place == poolPlace(pool.UID)
	}
	for _, endpoint := range pool.Spec.GetEndpoints() {
		known = known || !s.poolScope && endpoint.GetAddress() == parts.Place
	}
	name := parts.ServerName
	named := name != "" && (s.serverName == "" || name == s.serverName || name == s.check.GetServerName())
	if !known || !named || s.sessionsOff {
		return nil
	}
	config := pool.TLS.Clone()
	config.ServerName = name
	if parts.HTTP1 {
		config.NextProtos = []string{protocolHTTP1}
	}
	return config
}

// places are those of the pool's session identities. Before the first
// look-up of a DNS pool they are those of the pool that it took over from.
// Backend.updating is held.
func (p *pool) places() []string {
	s := p.state.Load()
	switch {
	case s.settings.poolScope:
		return []string{poolPlace(s.spec.UID)}
	case s.view.Empty():
		return p.before
	}
	var all []string
	for _, at := range s.view.Endpoints() {
		all = append(all, at.Address)
	}
	return all
}

// poolPlace stands for the endpoint's address in identities that all endpoints
// of a pool share.
func poolPlace(uid string) string { return "pool " + uid }
