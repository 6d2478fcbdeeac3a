package rules

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Fields by which proxies tell backends about the client. An edge removes those
// that clients send, by the rules of resealv1.Forwarded.

// ForwardedClientCert is Envoy's, in the form that PlainName returns.
const ForwardedClientCert = "x-forwarded-client-cert"

// maxClaims bounds each of the lists, which are looked at for every field.
const maxClaims = 64

// claimPrefixes start names of such fields.
var claimPrefixes = []string{"x-forwarded-", "x-ssl-client-"}

// PlainName is a field's name in lower case and with - for _: CGI and its kin
// can't tell one from the other.
func PlainName(name string) string { return strings.ToLower(strings.ReplaceAll(name, "_", "-")) }

// NamesClient reports whether backends may take a field for a statement of a
// proxy about the client. name may have any case.
func NamesClient(name string) bool {
	name = PlainName(name)
	if name == "forwarded" || name == "x-real-ip" || HandshakesOwn(name) {
		return true
	}
	return slices.ContainsFunc(claimPrefixes, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// HandshakesOwn reports whether only the server that made the handshake may set a
// field (RFC 9440 section 4). name is plain.
func HandshakesOwn(name string) bool { return name == "client-cert" || name == "client-cert-chain" }

// claims checks which fields are removed from requests.
func (c *checker) claims(l *resealv1.Listener) {
	removed := c.fieldList("spec.forwarded.removeHeaders", l.GetForwarded().GetRemoveHeaders(), checkRemoved)
	kept := c.fieldList("spec.forwarded.keepHeaders", l.GetForwarded().GetKeepHeaders(), func(name string) error {
		if l.GetClientCertificate().GetForward() == resealv1.ClientCertificate_FORWARD_XFCC && PlainName(name) == ForwardedClientCert {
			return fmt.Errorf("%s is written by the edge, as clientCertificate.forward is xfcc; it can't be kept", Quote(name))
		}
		return checkKept(name)
	})
	for i, name := range l.GetForwarded().GetKeepHeaders() {
		if plain := PlainName(name); kept[plain] && removed[plain] {
			c.failf(ItemPath("spec.forwarded.keepHeaders", i), "%s is in removeHeaders, too; remove it from one of them", Quote(name))
		}
	}
}

// fieldList checks a list of names, and returns the plain ones.
func (c *checker) fieldList(path string, names []string, check func(string) error) map[string]bool {
	if len(names) > maxClaims {
		c.failf(path, "holds %d entries; at most %d are allowed", len(names), maxClaims)
		return nil
	}
	seen := make(map[string]bool, len(names))
	for i, name := range names {
		if plain := PlainName(name); seen[plain] {
			c.failf(ItemPath(path, i), "%s is there twice; case, and _ for -, make no difference", Quote(name))
			continue
		}
		seen[PlainName(name)] = true
		c.err(ItemPath(path, i), check(name))
	}
	return seen
}

// checkRemoved checks a header, or the start of headers, to remove.
func checkRemoved(name string) error {
	start, isPattern := strings.CutSuffix(name, "*")
	if err := checkHeaderName(start); err != nil || strings.Contains(start, "*") {
		return fmt.Errorf("%s is neither a header name nor the start of one with a * after it, such as X-Auth-*", Quote(name))
	}
	if isPattern && !strings.HasSuffix(start, "-") {
		return fmt.Errorf("%s: a * must follow a -, as in X-Auth-*", Quote(name))
	}
	plain := PlainName(start)
	for _, other := range untouchable {
		switch {
		case plain == strings.ToLower(other):
			return fmt.Errorf("%s frames or routes the message; it can't be removed", Quote(name))
		case isPattern && strings.HasPrefix(strings.ToLower(other), plain):
			return fmt.Errorf("%s matches %s, which frames or routes the message; it can't be removed", Quote(name), other)
		}
	}
	return nil
}

// checkKept checks an exception to what is removed.
func checkKept(name string) error {
	plain := PlainName(name)
	start, isPattern := strings.CutSuffix(plain, "*")
	switch {
	case HandshakesOwn(plain):
		return fmt.Errorf("%s can't be kept: only the server that made the handshake may set it (RFC 9440 section 4)", Quote(name))
	case isPattern && slices.Contains(claimPrefixes, start):
		return nil
	case checkHeaderName(name) != nil || isPattern || !NamesClient(plain):
		return errors.New(Quote(name) + " is not removed by default; what can be kept are Forwarded, X-Forwarded-*, X-Real-IP and X-SSL-Client-*, or headers of these names")
	}
	return nil
}

// untouchable belong to one connection, or to the framing of a message (RFC 9110
// section 7.6.1), or say which host is meant.
var untouchable = []string{
	"Connection", "Content-Length", "Host", "Keep-Alive", "Proxy-Connection",
	"Te", "Trailer", "Transfer-Encoding", "Upgrade",
}
