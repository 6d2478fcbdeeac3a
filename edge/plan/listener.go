package plan

import (
	"crypto/tls"
	"fmt"
	"slices"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// listeners compiles all Listeners, sorted by name.
func (c *compiler) listeners() []*Listener {
	var compiled []*Listener
	byName := map[string]*Listener{}
	byAddress := map[string]string{}
	for _, resource := range c.snapshot.Kind("Listener") {
		o := c.object(resource)
		listener := o.compileListener(resource.GetListener().WithDefaults())
		if other, ok := byAddress[listener.Spec.Address]; ok {
			o.refuse("spec.address", "%s is the address of Listener/%s too", listener.Spec.Address, other)
		}
		byAddress[listener.Spec.Address] = listener.Name
		byName[listener.Name] = listener
		compiled = append(compiled, listener)
	}
	c.attachRoutes(byName)
	return compiled
}

// compileListener compiles one Listener without its routes. The result is
// useless when it found violations.
func (o object) compileListener(spec *resealv1.Listener) *Listener {
	o.checkListener(spec)
	listener := &Listener{
		Name:         o.ref.Name,
		UID:          o.uid,
		Spec:         spec,
		certificates: newCertificateSet(o.serverCertificates(spec.Certificates)),
		router:       newRouter(spec.Pool),
	}
	if spec.TlsPolicy == "" || o.exists("spec.tlsPolicy", "TLSPolicy", spec.TlsPolicy) {
		if policy := o.c.policy(spec.TlsPolicy); policy != nil {
			listener.applyPolicy(policy)
		}
	}
	return listener
}

func (o object) checkListener(spec *resealv1.Listener) {
	o.hostPort("spec.address", spec.Address, true, true)
	o.enum("spec.protocol", int32(spec.Protocol), resealv1.Listener_Protocol_name)
	o.prefixes("spec.proxyProtocol.trustedCIDRs", spec.GetProxyProtocol().GetTrustedCidrs())
	o.prefixes("spec.forwarded.trustedCIDRs", spec.GetForwarded().GetTrustedCidrs())
	switch {
	case spec.Pool != "":
		o.poolFor("spec.pool", spec.Pool, o.ref.Name, spec.Protocol)
	case spec.Protocol == resealv1.Listener_PROTOCOL_TLS:
		o.refuse("spec.pool", "is required for protocol tls")
	}
	o.timeout("spec.timeouts.handshake", spec.Timeouts.Handshake)
	o.timeout("spec.timeouts.header", spec.Timeouts.Header)
	o.timeout("spec.timeouts.idle", spec.Timeouts.Idle)
	o.timeout("spec.timeouts.drain", spec.Timeouts.Drain)
}

// poolFor checks a reference to a pool and that the pool speaks what the
// listener passes on.
func (o object) poolFor(field, name, listener string, protocol resealv1.Listener_Protocol) {
	if !o.exists(field, "BackendPool", name) {
		return
	}
	speaks := o.c.snapshot.Get("BackendPool", name).GetBackendPool().GetProtocol()
	isTCP := speaks == resealv1.BackendPool_PROTOCOL_TCP
	switch {
	case protocol == resealv1.Listener_PROTOCOL_TLS && !isTCP:
		o.refuse(field, "Listener/%s has protocol tls, so BackendPool/%s needs protocol tcp", listener, name)
	case protocol != resealv1.Listener_PROTOCOL_TLS && isTCP:
		o.refuse(field, "BackendPool/%s has protocol tcp, so Listener/%s needs protocol tls", name, listener)
	}
}

func (o object) serverCertificates(names []string) []*certificate {
	if len(names) == 0 {
		o.refuse("spec.certificates", "name at least one Certificate")
	}
	var loaded []*certificate
	for i, name := range names {
		if !o.exists(fmt.Sprintf("spec.certificates[%d]", i), "Certificate", name) {
			continue
		}
		if certificate := o.c.certificate(name); certificate != nil {
			loaded = append(loaded, certificate)
		}
	}
	return loaded
}

// applyPolicy fills in what depends on the TLSPolicy.
func (l *Listener) applyPolicy(p *policy) {
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
