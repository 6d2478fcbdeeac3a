package backend

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// resolveLoop keeps the endpoints of a DNS pool up to date. A look-up that
// fails or finds nothing changes nothing, and is repeated sooner while the pool
// has no endpoint at all.
func (p *pool) resolveLoop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		wait := p.state.Load().settings.dnsRefresh
		if !p.resolve(ctx) && len(p.state.Load().members) == 0 {
			wait = min(wait, time.Second)
		}
		timer.Reset(wait)
	}
}

// maxEndpoints bounds the endpoints of a pool.
const maxEndpoints = 1000

// resolve looks the name up once.
func (p *pool) resolve(ctx context.Context) bool {
	dns := p.state.Load().settings.dns
	if dns == nil {
		return false
	}
	bounded, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	found, err := p.b.cfg.Resolve(bounded, dns.GetName())
	if ctx.Err() != nil {
		return false
	}
	ok := err == nil && len(found) > 0
	if !ok {
		p.b.cfg.Logger.Warn("look-up failed, its last addresses stay", "pool", p.name, "name", dns.GetName(), "error", err)
	}
	p.resolvedTo(dns, endpointsOf(found, uint16(dns.GetPort())), ok)
	return ok
}

// resolvedTo takes over the answer of a look-up, unless the pool asks for
// something else by now. After one that failed the last addresses stay, if they
// are an answer to the same question.
func (p *pool) resolvedTo(dns *resealv1.DNSEndpoints, addresses []weighted, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	state := p.state.Load()
	if !state.settings.looksUp(dns) {
		return
	}
	switch {
	case ok && !slices.Equal(addresses, p.addresses):
		p.readdress(addresses)
	case !ok && p.foreign && len(p.addresses) > 0:
		p.readdress(nil)
	}
	p.foreign = false
	select {
	case <-state.resolved:
	default:
		close(state.resolved)
	}
}

func endpointsOf(found []netip.Addr, port uint16) []weighted {
	var addresses []weighted
	for _, a := range found {
		addresses = append(addresses, weighted{netip.AddrPortFrom(a.Unmap(), port).String(), 1})
	}
	slices.SortFunc(addresses, func(a, b weighted) int {
		return strings.Compare(a.address, b.address)
	})
	addresses = slices.Compact(addresses)
	return addresses[:min(len(addresses), maxEndpoints)]
}

// awaitMembers returns the pool's state, and waits for the first look-up of a
// DNS pool if it has no endpoint yet.
func (p *pool) awaitMembers(ctx context.Context) (*poolState, error) {
	state := p.state.Load()
	if len(state.members) > 0 {
		return state, nil
	}
	timer := time.NewTimer(max(state.settings.connectTimeout, 10*time.Millisecond))
	defer timer.Stop()
	select {
	case <-state.resolved:
	case <-timer.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	state = p.state.Load()
	if len(state.members) == 0 {
		return nil, fail(ReasonNoEndpoint, nil)
	}
	return state, nil
}
