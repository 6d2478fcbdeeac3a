package rules

import (
	"fmt"
	"net/textproto"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxRouteWeight keeps sums of weights far from overflow.
	maxRouteWeight = 1_000_000
	// maxHeaderFields keeps a header from costing many times its bytes.
	maxHeaderFields = 10_000
	// maxHandshakes is more than machines have processors.
	maxHandshakes = 1024
)

func (c *checker) listener(l *resealv1.Listener) {
	// An edge takes port 0 too: tests have it choose a free one.
	c.err("spec.address", checkAddress(l.Address, true, !c.strict))
	if len(l.Certificates) == 0 {
		c.failf("spec.certificates", "is empty; name at least one Certificate")
	}
	c.each("spec.certificates", l.Certificates, checkName)
	c.optional("spec.tlsPolicy", l.TlsPolicy, checkName)
	c.optional("spec.pool", l.Pool, checkName)
	c.selector(l.EdgeSelector)
	if l.ProxyProtocol != nil {
		if len(l.ProxyProtocol.TrustedCidrs) == 0 {
			c.failf("spec.proxyProtocol.trustedCIDRs", "is empty; name the peers that send the PROXY header")
		}
		c.each("spec.proxyProtocol.trustedCIDRs", l.ProxyProtocol.TrustedCidrs, checkCIDR)
	}
	c.each("spec.forwarded.trustedCIDRs", l.GetForwarded().GetTrustedCidrs(), checkCIDR)
	c.claims(l)
	c.atMost("spec.limits.maxHeaderFields", l.GetLimits().GetMaxHeaderFields(), maxHeaderFields)
	c.atMost("spec.limits.maxHandshakes", l.GetLimits().GetMaxHandshakes(), maxHandshakes)
	if l.Protocol != resealv1.Listener_PROTOCOL_TLS {
		return
	}
	if l.Pool == "" {
		c.failf("spec.pool", "is missing; a listener with protocol tls has no routes, so name its pool")
	}
	if l.Forwarded != nil {
		c.failf("spec.forwarded", "needs HTTP; remove it from a listener with protocol tls")
	}
	if l.ClientCertificate != nil {
		c.failf("spec.clientCertificate", "needs HTTP; remove it from a listener with protocol tls")
	}
}

func (c *checker) route(r *resealv1.Route) {
	if len(r.Listeners) == 0 {
		c.failf("spec.listeners", "is empty; name at least one Listener")
	}
	c.each("spec.listeners", r.Listeners, checkName)
	c.each("spec.hosts", r.Hosts, checkHostPattern)
	c.paths(r.Paths)
	c.weightedPools(r.Pools)
	c.headerEdits("spec.requestHeaders", r.RequestHeaders)
	c.headerEdits("spec.responseHeaders", r.ResponseHeaders)
}

func (c *checker) paths(paths []*resealv1.PathMatch) {
	seen := make(map[string]bool, len(paths))
	for i, match := range paths {
		path := ItemPath("spec.paths", i)
		var field, value string
		switch match := match.GetMatch().(type) {
		case *resealv1.PathMatch_Prefix:
			field, value = "prefix", match.Prefix
		case *resealv1.PathMatch_Exact:
			field, value = "exact", match.Exact
		default:
			c.failf(path, "has neither prefix nor exact; set one of them")
			continue
		}
		plain, _, err := RoutePath(value)
		if err != nil {
			plain = value // checkPath says what is wrong
		}
		if seen[field+plain] {
			c.failf(path, "%s %s is there twice", field, Quote(value))
			continue
		}
		seen[field+plain] = true
		c.err(FieldPath(path, field), checkPath(value))
	}
}

func (c *checker) weightedPools(pools []*resealv1.WeightedPool) {
	if len(pools) == 0 {
		c.failf("spec.pools", "is empty; name at least one BackendPool")
		return
	}
	seen := make(map[string]bool, len(pools))
	someWeight := false
	for i, pool := range pools {
		path := ItemPath("spec.pools", i)
		c.err(path+".name", checkName(pool.GetName()))
		c.atMost(path+".weight", pool.GetWeight(), maxRouteWeight)
		if seen[pool.GetName()] && pool.GetName() != "" {
			c.failf(path+".name", "%s is there twice; give it more weight instead", Quote(pool.GetName()))
		}
		seen[pool.GetName()] = true
		someWeight = someWeight || pool.Weight == nil || pool.GetWeight() > 0
	}
	if !someWeight {
		c.failf("spec.pools", "every weight is 0, so no pool gets requests")
	}
}

func (c *checker) headerEdits(path string, edits *resealv1.HeaderEdits) {
	c.headerMap(FieldPath(path, "set"), edits.GetSet(), path == "spec.requestHeaders")
	c.headerMap(FieldPath(path, "add"), edits.GetAdd(), false)
	c.each(FieldPath(path, "remove"), edits.GetRemove(), checkEditedHeader)
}

// headerMap checks headers to set or to add. host allows Host.
func (c *checker) headerMap(path string, headers map[string]string, host bool) {
	first := make(map[string]string, len(headers))
	for _, name := range sortedKeys(headers) {
		canonical := textproto.CanonicalMIMEHeaderKey(name)
		if earlier, ok := first[canonical]; ok {
			c.failf(EntryPath(path, name), "is the same header as %s", Quote(earlier))
			continue
		}
		first[canonical] = name
		if host && canonical == "Host" {
			c.err(EntryPath(path, name), checkHostValue(headers[name]))
			continue
		}
		c.err(EntryPath(path, name), checkEditedHeader(name))
		c.err(EntryPath(path, name), checkHeaderValue(headers[name]))
	}
}

// checkHostValue checks what Host is set to: host or host:port (RFC 9110 section
// 7.2).
func checkHostValue(value string) error {
	if value == "" || !httpguts.ValidHostHeader(value) || strings.ContainsAny(value, "@/?# ,") {
		return fmt.Errorf("%s is not a host with or without a port, for example backend.example:8443", Quote(value))
	}
	return nil
}

// checkEditedHeader refuses headers that belong to one connection or to the
// framing of a message (RFC 9110 section 7.6.1), and Host, which a Route can set
// for the backend and not otherwise edit.
func checkEditedHeader(name string) error {
	if err := checkHeaderName(name); err != nil {
		return err
	}
	if slices.Contains(untouchable, textproto.CanonicalMIMEHeaderKey(name)) {
		return fmt.Errorf("the edge sets %s itself; it can't be edited", Quote(name))
	}
	return nil
}
