package manifest

import (
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// ValidateSnapshot checks what holds between the resources of a whole
// configuration: names that refer to nothing, protocols that do not fit, and
// keyrings that retire keys before the tickets under them end. It expects that
// each resource passed Validate, and does not look at write-only values, which
// may be sealed. It reports at most 100 violations per resource.
func ValidateSnapshot(s *resealv1.Snapshot) []*resealv1.Violation {
	var violations []*resealv1.Violation
	for _, resource := range s.All() {
		if resource.Kind() == "" {
			continue
		}
		c := &references{checker: checker{ref: resource.Ref()}, snapshot: s}
		switch spec := resource.SpecMessage().Interface().(type) {
		case *resealv1.BackendPool:
			c.needs("TLSPolicy", spec.GetTls().GetPolicy(), "spec.tls.policy")
			c.needs("Certificate", spec.GetTls().GetClientCertificate(), "spec.tls.clientCertificate")
		case *resealv1.TLSPolicy:
			c.tlsPolicy(spec)
		case *resealv1.Listener:
			c.listener(spec)
		case *resealv1.Route:
			c.route(spec)
		case *resealv1.Keyring:
			c.keyring(resource.GetMetadata().GetName(), spec)
		}
		violations = append(violations, c.violations...)
	}
	return violations
}

// references checks one resource against the others.
type references struct {
	checker
	snapshot *resealv1.Snapshot
}

// needs reports a name that refers to nothing. It returns the resource, or nil.
func (c *references) needs(kind, name, path string) *resealv1.Resource {
	if name == "" {
		return nil
	}
	resource := c.snapshot.Get(kind, name)
	if resource == nil {
		c.failf(path, "%s %s does not exist", kind, quote(name))
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
		c.needs("Certificate", name, itemPath("spec.certificates", i))
	}
	policy := c.needs("TLSPolicy", l.TlsPolicy, "spec.tlsPolicy")
	for _, protocol := range policy.GetTlsPolicy().GetAlpn() {
		if !isTLS(l) && protocol != "h2" && protocol != "http/1.1" {
			c.failf("spec.tlsPolicy", "TLSPolicy %s offers %s by ALPN, which a listener with protocol https does not speak; it speaks h2 and http/1.1",
				quote(l.TlsPolicy), quote(protocol))
		}
	}
	pool := c.needs("BackendPool", l.Pool, "spec.pool")
	switch {
	case pool == nil:
	case isTLS(l) && !isTCP(pool):
		c.failf("spec.pool", "BackendPool %s has protocol %s; a listener with protocol tls needs a pool with protocol tcp",
			quote(l.Pool), resealv1.Label(pool.GetBackendPool().WithDefaults().Protocol))
	case !isTLS(l) && isTCP(pool):
		c.failf("spec.pool", "BackendPool %s has protocol tcp; a listener with protocol https needs a pool that speaks HTTP", quote(l.Pool))
	}
}

func (c *references) route(r *resealv1.Route) {
	for i, name := range r.Listeners {
		path := itemPath("spec.listeners", i)
		if listener := c.needs("Listener", name, path); isTLS(listener.GetListener()) {
			c.failf(path, "Listener %s has protocol tls, which has no routes; its traffic goes to its own pool", quote(name))
		}
	}
	for i, weighted := range r.Pools {
		path := itemPath("spec.pools", i) + ".name"
		if pool := c.needs("BackendPool", weighted.GetName(), path); isTCP(pool) {
			c.failf(path, "BackendPool %s has protocol tcp; a route needs pools that speak HTTP", quote(weighted.GetName()))
		}
	}
}

// tlsPolicy checks the policy's keyring. A keyring that states its own
// retireAfter is reported itself, see keyring.
func (c *references) tlsPolicy(p *resealv1.TLSPolicy) {
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
			durationText(lifetime), durationText(retireAfter), quote(name))
	}
}

func (c *references) keyring(name string, k *resealv1.Keyring) {
	if k.RetireAfter == nil {
		return
	}
	retireAfter := k.RetireAfter.AsDuration()
	for _, policy := range c.snapshot.Kind("TLSPolicy") {
		user := "TLSPolicy " + quote(policy.GetMetadata().GetName())
		if c.outlived(name, policy.GetTlsPolicy(), user, retireAfter) {
			return
		}
	}
	for _, listener := range c.snapshot.Kind("Listener") {
		user := "Listener " + quote(listener.GetMetadata().GetName()) + ", which has no tlsPolicy"
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
		durationText(retireAfter), durationText(lifetime), user)
	return true
}
