package balance

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// ResolveLoop keeps the endpoints of a DNS pool up to date. A look-up that
// fails or finds nothing changes nothing, and is repeated sooner while the pool
// has no endpoint at all.
func (b *Balancer) ResolveLoop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		wait := b.view.Load().rules.dnsRefresh
		if !b.resolve(ctx) && b.view.Load().Empty() {
			wait = min(wait, time.Second)
		}
		timer.Reset(wait)
	}
}

// maxEndpoints bounds the endpoints of a pool.
const maxEndpoints = 1000

// resolve looks the name up once.
func (b *Balancer) resolve(ctx context.Context) bool {
	dns := b.view.Load().rules.dns
	if dns == nil {
		return false
	}
	bounded, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	found, err := b.cfg.Resolve(bounded, dns.GetName())
	if ctx.Err() != nil {
		return false
	}
	ok := err == nil && len(found) > 0
	if !ok {
		b.cfg.Logger.Warn("look-up failed, its last addresses stay", "pool", b.cfg.Pool, "name", dns.GetName(), "error", err)
	}
	b.resolvedTo(dns, endpointsOf(found, uint16(dns.GetPort())), ok)
	return ok
}

// resolvedTo takes over the answer of a look-up, unless the pool asks for
// something else by now. After one that failed the last addresses stay, if they
// are an answer to the same question.
func (b *Balancer) resolvedTo(dns *resealv1.DNSEndpoints, addresses []weighted, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	view := b.view.Load()
	if !view.rules.looksUp(dns) {
		return
	}
	switch {
	case ok && !slices.Equal(addresses, b.addresses):
		b.readdress(addresses)
	case !ok && b.foreign && len(b.addresses) > 0:
		b.readdress(nil)
	}
	b.foreign = false
	select {
	case <-view.resolved:
	default:
		close(view.resolved)
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
