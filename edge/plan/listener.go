package plan

import (
	"crypto/tls"
	"slices"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// listener is a Listener while it is compiled.
type listener struct {
	exchange.Listener
	certificates *certificateSet
	router       *router
}

// listeners compiles all Listeners, sorted by name.
func (c *compiler) listeners() []exchange.Listener {
	var compiled []exchange.Listener
	byName := map[string]*listener{}
	for _, resource := range c.snapshot.Kind("Listener") {
		c.guard(resource, func(o object) {
			if l := o.compileListener(resource.GetListener().WithDefaults()); l != nil {
				byName[l.Name] = l
				compiled = append(compiled, l.Listener)
			}
		})
	}
	c.attachRoutes(byName)
	return compiled
}

// compileListener compiles one Listener without its routes, or returns nil when
// something that it refers to is broken.
func (o object) compileListener(spec *resealv1.Listener) *listener {
	var certificates []*certificate
	for _, name := range spec.Certificates {
		if loaded := o.c.certificate(name); loaded != nil {
			certificates = append(certificates, loaded)
		}
	}
	policy := o.c.policy(spec.TlsPolicy)
	if len(certificates) < len(spec.Certificates) || policy == nil {
		return nil
	}
	names, router := newCertificateSet(certificates), newRouter(spec.Pool)
	compiled := &listener{
		Listener: exchange.Listener{
			Name: o.ref.Name, UID: o.uid, Spec: spec, Route: router.route,
			AllowsHost: func(host string) bool { return host != "" && (router.names(host) || names.covers(host)) },
		},
		certificates: names,
		router:       router,
	}
	compiled.applyPolicy(policy)
	return compiled
}

// applyPolicy fills in what depends on the TLSPolicy.
func (l *listener) applyPolicy(p *policy) {
	l.Keyring = p.spec.Resumption.Keyring
	l.TicketLifetime = duration(p.spec.Resumption.TicketLifetime)
	l.TLS = &tls.Config{
		GetCertificate:         l.certificates.get,
		ClientAuth:             p.clientAuth,
		ClientCAs:              p.roots,
		NextProtos:             p.spec.Alpn,
		SessionTicketsDisabled: !p.spec.Resumption.GetEnabled(),
	}
	p.apply(l.TLS)
	if len(p.spec.Alpn) == 0 && l.Spec.Protocol == resealv1.Listener_PROTOCOL_HTTPS {
		l.TLS.NextProtos = []string{"h2", "http/1.1"}
	}
	if l.Spec.Protocol == resealv1.Listener_PROTOCOL_HTTPS && slices.Contains(l.TLS.NextProtos, "http/1.1") {
		// A client that offers http/1.0 alone, as curl --http1.0 does, would be
		// refused with no_application_protocol (RFC 7301 section 3.2).
		l.TLS.NextProtos = append(slices.Clip(l.TLS.NextProtos), "http/1.0")
	}
	var key digest
	key.add(l.Name, l.UID, p.uid, p.spec.Resumption.Keyring, p.clientAuth.String(), p.rootsHash)
	if p.revoked != nil {
		l.TLS.VerifyConnection = p.revoked.verify
		key.add(p.revoked.hash)
	}
	l.PolicyKey = key.sum()
}
