package rules

import (
	"slices"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Configuration checks what holds between the resources of a whole configuration:
// names that refer to nothing, protocols that do not fit, listeners that edges
// can't serve side by side, and keyrings that retire keys before the tickets under
// them end. It does not look at write-only values, which may be sealed. It reports
// at most 100 violations per resource.
func Configuration(s *resealv1.Snapshot) []*resealv1.Violation {
	return between(s, false)
}

// Selection is Configuration for what one edge holds: the Listeners and Keyrings
// that its labels select, and what these need. Routes may name further Listeners,
// and policies Keyrings that other edges have. All Listeners are of this edge, so
// none may share an address.
func Selection(s *resealv1.Snapshot) []*resealv1.Violation {
	return between(s, true)
}

func between(s *resealv1.Snapshot, selection bool) []*resealv1.Violation {
	var violations []*resealv1.Violation
	taken := newAddresses(selection)
	for _, resource := range s.All() {
		if resource.Kind() == "" {
			continue
		}
		c := &references{checker: checker{ref: resource.Ref()}, snapshot: s, selection: selection}
		switch spec := resource.SpecMessage().Interface().(type) {
		case *resealv1.BackendPool:
			c.needs("TLSPolicy", spec.GetTls().GetPolicy(), "spec.tls.policy")
			c.needs("Certificate", spec.GetTls().GetClientCertificate(), "spec.tls.clientCertificate")
		case *resealv1.TLSPolicy:
			c.tlsPolicy(spec)
		case *resealv1.Listener:
			c.listener(spec)
			if other := taken.take(resource); other != "" {
				c.failf("spec.address", "%s collides with the address of Listener %s, which the same edges serve; choose another port or other edges",
					Quote(spec.Address), Quote(other))
			}
		case *resealv1.Route:
			c.route(spec)
		case *resealv1.Keyring:
			if !selection {
				c.keyring(resource.GetMetadata().GetName(), spec)
			}
		}
		violations = append(violations, c.violations...)
	}
	return violations
}

// references checks one resource against the others.
type references struct {
	checker
	snapshot  *resealv1.Snapshot
	selection bool // the snapshot is what one edge holds
}

// needs reports a name that refers to nothing. It returns the resource, or nil.
func (c *references) needs(kind, name, path string) *resealv1.Resource {
	if name == "" {
		return nil
	}
	resource := c.snapshot.Get(kind, name)
	if resource == nil {
		c.failf(path, "%s %s does not exist", kind, Quote(name))
	}
	return resource
}

func isTCP(pool *resealv1.Resource) bool {
	return pool.GetBackendPool().GetProtocol() == resealv1.BackendPool_PROTOCOL_TCP
}

func isTLS(listener *resealv1.Listener) bool {
	return listener.GetProtocol() == resealv1.Listener_PROTOCOL_TLS
}

func (c *references) listener(l *resealv1.Listener) {
	for i, name := range l.Certificates {
		c.needs("Certificate", name, ItemPath("spec.certificates", i))
	}
	policy := c.needs("TLSPolicy", l.TlsPolicy, "spec.tlsPolicy")
	for _, protocol := range policy.GetTlsPolicy().GetAlpn() {
		if !isTLS(l) && protocol != "h2" && protocol != "http/1.1" {
			c.failf("spec.tlsPolicy", "TLSPolicy %s offers %s by ALPN, which a listener with protocol https does not speak; it speaks h2 and http/1.1",
				Quote(l.TlsPolicy), Quote(protocol))
		}
	}
	if forward := l.GetClientCertificate().GetForward(); forward > resealv1.ClientCertificate_FORWARD_NONE &&
		(l.TlsPolicy == "" || policy != nil && !asksForCertificate(policy.GetTlsPolicy())) {
		c.failf("spec.clientCertificate.forward", "%s needs a TLSPolicy that asks clients for a certificate; set its clientAuth.mode to optional or require",
			resealv1.Label(forward))
	}
	pool := c.needs("BackendPool", l.Pool, "spec.pool")
	switch {
	case pool == nil:
	case isTLS(l) && !isTCP(pool):
		c.failf("spec.pool", "BackendPool %s has protocol %s; a listener with protocol tls needs a pool with protocol tcp",
			Quote(l.Pool), resealv1.Label(pool.GetBackendPool().WithDefaults().Protocol))
	case !isTLS(l) && isTCP(pool):
		c.failf("spec.pool", "BackendPool %s has protocol tcp; a listener with protocol https needs a pool that speaks HTTP", Quote(l.Pool))
	}
}

func asksForCertificate(p *resealv1.TLSPolicy) bool {
	return p.GetClientAuth().GetMode() > resealv1.ClientAuth_MODE_NONE
}

func (c *references) route(r *resealv1.Route) {
	isHere := func(name string) bool { return c.snapshot.Get("Listener", name) != nil }
	if c.selection && !slices.ContainsFunc(r.Listeners, isHere) {
		return // other edges serve it
	}
	for i, name := range r.Listeners {
		path := ItemPath("spec.listeners", i)
		listener := c.snapshot.Get("Listener", name)
		if !c.selection {
			c.needs("Listener", name, path)
		}
		if isTLS(listener.GetListener()) {
			c.failf(path, "Listener %s has protocol tls, which has no routes; its traffic goes to its own pool", Quote(name))
		}
	}
	for i, weighted := range r.Pools {
		path := ItemPath("spec.pools", i) + ".name"
		if pool := c.needs("BackendPool", weighted.GetName(), path); isTCP(pool) {
			c.failf(path, "BackendPool %s has protocol tcp; a route needs pools that speak HTTP", Quote(weighted.GetName()))
		}
	}
}

// tlsPolicy checks the policy's keyring. A keyring that states its own
// retireAfter is reported itself, see keyring.
func (c *references) tlsPolicy(p *resealv1.TLSPolicy) {
	if c.selection {
		return // what tickets need is for the control plane to know
	}
	full := p.WithDefaults()
	name := full.Resumption.Keyring
	keyring := c.snapshot.Get("Keyring", name)
	if keyring == nil && name != resealv1.DefaultKeyring {
		c.needs("Keyring", name, "spec.resumption.keyring")
		return
	}
	spec := keyring.GetKeyring()
	lifetime, retireAfter := full.Resumption.TicketLifetime.AsDuration(), spec.WithDefaults().RetireAfter.AsDuration()
	if full.Resumption.GetEnabled() && spec.GetRetireAfter() == nil && lifetime > retireAfter {
		c.failf("spec.resumption.ticketLifetime", "%s is above the retireAfter %s of Keyring %s: keys would end before their tickets",
			DurationText(lifetime), DurationText(retireAfter), Quote(name))
	}
}

func (c *references) keyring(name string, k *resealv1.Keyring) {
	if k.RetireAfter == nil {
		return
	}
	retireAfter := k.RetireAfter.AsDuration()
	for _, policy := range c.snapshot.Kind("TLSPolicy") {
		user := "TLSPolicy " + Quote(policy.GetMetadata().GetName())
		if c.outlived(name, policy.GetTlsPolicy(), user, retireAfter) {
			return
		}
	}
	for _, listener := range c.snapshot.Kind("Listener") {
		user := "Listener " + Quote(listener.GetMetadata().GetName()) + ", which has no tlsPolicy"
		if listener.GetListener().GetTlsPolicy() == "" && c.outlived(name, nil, user, retireAfter) {
			return
		}
	}
}

// outlived reports a keyring whose keys end before the tickets of a policy.
func (c *references) outlived(keyring string, p *resealv1.TLSPolicy, user string, retireAfter time.Duration) bool {
	resumption := p.WithDefaults().Resumption
	lifetime := resumption.TicketLifetime.AsDuration()
	if resumption.Keyring != keyring || !resumption.GetEnabled() || lifetime <= retireAfter {
		return false
	}
	c.failf("spec.retireAfter", "%s is below the ticketLifetime %s of %s: keys would end before their tickets",
		DurationText(retireAfter), DurationText(lifetime), user)
	return true
}
