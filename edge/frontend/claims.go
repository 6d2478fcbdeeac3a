package frontend

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
)

// claims says which fields of a request are removed because backends may take
// them for a statement of a proxy about the client.
type claims struct {
	trusted []netip.Prefix // clients that are believed
	remove  []string       // plain names, some with a * for what follows
	keep    []string       // likewise
	forward resealv1.ClientCertificate_Forward
}

func newClaims(l *resealv1.Listener, refuse func(field, format string, args ...any)) claims {
	c := claims{
		trusted: prefixes("spec.forwarded.trustedCIDRs", l.GetForwarded().GetTrustedCidrs(), refuse),
		forward: l.GetClientCertificate().GetForward(),
	}
	for _, name := range l.GetForwarded().GetRemoveHeaders() {
		c.remove = append(c.remove, rules.PlainName(name))
	}
	for _, name := range l.GetForwarded().GetKeepHeaders() {
		c.keep = append(c.keep, rules.PlainName(name))
	}
	return c
}

// filter removes from a header or trailer section of a client what it may not
// say.
func (c *claims) filter(fields *exchange.Fields, client netip.Addr) {
	trusted := contains(c.trusted, client)
	*fields = slices.DeleteFunc(*fields, func(field exchange.Field) bool {
		return (len(c.remove) > 0 || mayClaim(field.Name)) && c.removes(rules.PlainName(field.Name), trusted)
	})
}

// mayClaim is quickly false for most names that rules.NamesClient is false for.
func mayClaim(name string) bool {
	switch name[0] | 0x20 {
	case 'c', 'f', 'x':
		return true
	}
	return false
}

// removes looks at a plain name. What describes a client's certificate nobody may
// send but whoever made the handshake (RFC 9440 section 4).
func (c *claims) removes(name string, trusted bool) bool {
	switch {
	case rules.HandshakesOwn(name), c.forward == resealv1.ClientCertificate_FORWARD_XFCC && name == rules.ForwardedClientCert:
		return true
	case trusted:
		return false
	}
	return named(c.remove, name) || rules.NamesClient(name) && !named(c.keep, name)
}

// named reports whether a list holds a plain name, or the start of it.
func named(list []string, name string) bool {
	return slices.ContainsFunc(list, func(entry string) bool {
		start, isPattern := strings.CutSuffix(entry, "*")
		return name == entry || isPattern && strings.HasPrefix(name, start)
	})
}
