package frontend

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net/url"
	"strings"
	"sync"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// clientCertificate is the verified certificate of a client. What is told about
// it is written once per connection.
type clientCertificate struct {
	subject     string // as distinguishedName returns it
	fingerprint string // SHA-256 of the DER, in hex
	rfc9440     func() (certificate, chain string)
	xfcc        func() string
}

// newClientCertificate returns nil for a connection without a verified
// certificate. A resumed one has that of the handshake that it goes back to.
func newClientCertificate(shown tls.ConnectionState) *clientCertificate {
	if len(shown.VerifiedChains) == 0 || len(shown.VerifiedChains[0]) == 0 {
		return nil
	}
	// What a client sends besides the chain that was verified may be anything.
	leaf, chain := shown.VerifiedChains[0][0], shown.VerifiedChains[0][1:]
	digest := sha256.Sum256(leaf.Raw)
	c := &clientCertificate{subject: distinguishedName(leaf), fingerprint: hex.EncodeToString(digest[:])}
	c.rfc9440 = sync.OnceValues(func() (string, string) {
		issuers := make([]string, len(chain))
		for i, issuer := range chain {
			issuers[i] = byteSequence(issuer.Raw)
		}
		return byteSequence(leaf.Raw), strings.Join(issuers, ", ")
	})
	c.xfcc = sync.OnceValue(func() string { return c.element(leaf) })
	return c
}

// set writes the header fields of a form. c may be nil.
func (c *clientCertificate) set(fields *exchange.Fields, form resealv1.ClientCertificate_Forward) {
	if c == nil {
		return
	}
	switch form {
	case resealv1.ClientCertificate_FORWARD_RFC9440:
		certificate, chain := c.rfc9440()
		fields.Set("Client-Cert", certificate)
		if chain != "" {
			fields.Set("Client-Cert-Chain", chain)
		}
	case resealv1.ClientCertificate_FORWARD_XFCC:
		fields.Set("X-Forwarded-Client-Cert", c.xfcc())
	}
}

// byteSequence is an item of a structured field (RFC 8941 section 3.3.5).
func byteSequence(der []byte) string { return ":" + base64.StdEncoding.EncodeToString(der) + ":" }

// element is the element of X-Forwarded-Client-Cert. Values that can hold what
// separates them are quoted. Quotes and backslashes in them are written in other
// ways, since readers don't agree on what ends a quoted value after one of them.
func (c *clientCertificate) element(leaf *x509.Certificate) string {
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})
	pairs := []string{
		"Hash=" + c.fingerprint,
		`Cert="` + strings.ReplaceAll(url.QueryEscape(string(text)), "+", "%20") + `"`,
		`Subject="` + c.subject + `"`,
	}
	for _, uri := range leaf.URIs {
		pairs = append(pairs, "URI="+quotedList(escapeBytes(uri.String(), "%", `"\ `)))
	}
	for _, name := range leaf.DNSNames {
		if plainDNS(name) {
			pairs = append(pairs, "DNS="+name)
		}
	}
	return strings.Join(pairs, ";")
}

// quotedList quotes a value that holds a separator.
func quotedList(value string) string {
	if strings.ContainsAny(value, ",;=") {
		return `"` + value + `"`
	}
	return value
}

// plainDNS reports whether a certificate's name can be that of a host.
func plainDNS(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("-._*", r)
	})
}

// distinguishedName is a subject in the order and form of RFC 2253, in printable
// ASCII and without quotes.
func distinguishedName(leaf *x509.Certificate) string {
	var names pkix.RDNSequence
	text := leaf.Subject.String()
	if rest, err := asn1.Unmarshal(leaf.RawSubject, &names); err == nil && len(rest) == 0 {
		text = names.String()
	}
	text = strings.NewReplacer(`\\`, `\5C`, `\"`, `\22`).Replace(text) // both are always escaped
	return escapeBytes(text, `\`, "")
}

// escapeBytes writes what is not printable ASCII, and bytes of more, in hex.
func escapeBytes(text, escape, more string) string {
	var b strings.Builder
	for i := range len(text) {
		if char := text[i]; char < ' ' || char > '~' || strings.IndexByte(more, char) >= 0 {
			fmt.Fprintf(&b, "%s%02X", escape, char)
		} else {
			b.WriteByte(char)
		}
	}
	return b.String()
}
