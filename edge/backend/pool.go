package backend

import (
	"context"
	"crypto/tls"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// pool is one BackendPool with one Identity. What depends on the spec alone is
// in state and replaced as a whole; endpoints outlive it.
type pool struct {
	b        *Backend
	name     string
	counters exchange.Counters
	state    atomic.Pointer[poolState]
	before   []string // places of the pool that it took over from; guarded by Backend.updating

	mu        sync.Mutex // guards what follows, and changes of state
	endpoints map[string]*endpoint
	addresses []weighted // what DNS answered, or the spec's endpoints
	loops     context.Context
	stopLoops context.CancelFunc
	foreign   bool       // addresses are not of the state's look-up, which is under way
	ejectMu   sync.Mutex // one ejection at a time, so that one endpoint stays
	turns     sync.Mutex // guards member.turn
}

// poolState is immutable.
type poolState struct {
	spec     exchange.Pool // what it was made from
	tls      *tls.Config
	settings *settings
	members  []*member
	ring     *ring
	resolved chan struct{} // closed after the first look-up, or from the start
}

// member is an endpoint with its weight in one state.
type member struct {
	*endpoint
	weight int
	turn   int // round robin; guarded by pool.turns
}

type weighted struct {
	address string
	weight  int
}

func newPool(b *Backend, spec exchange.Pool) *pool {
	p := &pool{
		b: b, name: spec.Name, counters: b.cfg.Counters(spec.Name),
		endpoints: map[string]*endpoint{},
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.swap(spec)
	return p
}

// update takes over a spec with the same Identity. Afterwards the pool behaves
// as a new one would, but for what it knows of endpoints: connections, verdicts of
// the same health check, ejections.
func (p *pool) update(spec exchange.Pool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.state.Load().settings
	p.swap(spec)
	now := p.state.Load().settings
	p.readmit()
	for _, e := range p.endpoints {
		e.shrink()
	}
	if p.stopLoops != nil && loopsDiffer(old, now) {
		p.stopLoops()
		p.run()
	}
}

// looksUp reports whether the settings ask for the addresses of dns.
func (s *settings) looksUp(dns *resealv1.DNSEndpoints) bool {
	return s.dns != nil && dns != nil && s.dns.GetName() == dns.GetName() && s.dns.GetPort() == dns.GetPort()
}

// loopsDiffer reports whether the pool's goroutines must start anew.
func loopsDiffer(a, b *settings) bool {
	if (a.dns == nil) != (b.dns == nil) || (a.check == nil) != (b.check == nil) {
		return true
	}
	return a.dns != nil && (!a.looksUp(b.dns) || a.dnsRefresh != b.dnsRefresh) ||
		a.check != nil && a.checkInterval != b.checkInterval
}

// swap compiles spec into a new state. p.mu is held.
func (p *pool) swap(spec exchange.Pool) {
	s, old := newSettings(spec.Spec), p.state.Load()
	if old != nil && s.question != nil && old.settings.question != nil && *old.settings.question == *s.question {
		s.question = old.settings.question
	}
	resolved := make(chan struct{})
	switch {
	case s.dns == nil:
		close(resolved)
		p.addresses, p.foreign = nil, false
		for _, e := range spec.Spec.GetEndpoints() {
			p.addresses = append(p.addresses, weighted{e.GetAddress(), int(e.GetWeight())})
		}
	case old != nil && old.settings.looksUp(s.dns):
		resolved = old.resolved
	default:
		// The last addresses stay until the look-up is done, if they are of use.
		p.foreign = true
		if !slices.ContainsFunc(p.addresses, func(a weighted) bool { return a.weight > 0 }) {
			p.addresses = nil
		}
	}
	config := spec.TLS.Clone()
	config.SessionTicketsDisabled = config.SessionTicketsDisabled || s.sessionsOff
	// One record and one write per request: latency ramp-up is for browsers.
	config.DynamicRecordSizingDisabled = true
	p.apply(&poolState{spec: spec, tls: config, settings: s, resolved: resolved})
}

// apply makes endpoints for p.addresses and publishes the state. p.mu is held.
func (p *pool) apply(state *poolState) {
	keep := make(map[string]*endpoint, len(p.addresses))
	for _, a := range p.addresses {
		if keep[a.address] != nil {
			continue
		}
		e := p.endpoints[a.address]
		if e == nil {
			e = newEndpoint(p, a.address)
		}
		keep[a.address] = e
		state.members = append(state.members, &member{endpoint: e, weight: a.weight})
	}
	if state.settings.algorithm == resealv1.LoadBalancing_ALGORITHM_RING_HASH {
		state.ring = newRing(state.members)
	}
	p.state.Store(state)
	for address, e := range p.endpoints {
		if keep[address] == nil {
			e.retire()
		}
	}
	p.endpoints = keep
}

// readdress replaces the endpoints of a DNS pool. p.mu is held.
func (p *pool) readdress(addresses []weighted) {
	next := *p.state.Load()
	next.members, next.ring = nil, nil
	p.addresses = addresses
	p.apply(&next)
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
	ctx, s := p.loops, p.state.Load().settings
	p.b.spawn("sweeps", func() { p.b.loop(ctx, "sweeps", p.sweepLoop) })
	if s.dns != nil {
		p.b.spawn("look-ups", func() { p.b.loop(ctx, "look-ups", p.resolveLoop) })
	}
	if s.check != nil {
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
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.endpoints {
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
		for _, m := range p.state.Load().members {
			m.sweep(now)
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
	known := s.dns != nil
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
	case len(s.members) == 0:
		return p.before
	}
	var all []string
	for _, m := range s.members {
		all = append(all, m.address)
	}
	return all
}

// poolPlace stands for the endpoint's address in identities that all endpoints
// of a pool share.
func poolPlace(uid string) string { return "pool " + uid }
