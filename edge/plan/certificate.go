package plan

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// certificate is a loaded Certificate.
type certificate struct {
	tls   *tls.Certificate
	hash  string // of the chain
	field string // that names the chain
}

// certificate loads a Certificate once. It returns nil when there is none, or it
// is broken.
func (c *compiler) certificate(name string) *certificate {
	if loaded, ok := c.certificates[name]; ok {
		return loaded
	}
	var loaded *certificate
	if resource := c.snapshot.Get("Certificate", name); resource != nil {
		c.guard(resource, func(o object) {
			if loaded = o.edition.certificate; loaded == nil {
				loaded = o.loadCertificate(resource.GetCertificate())
				o.edition.certificate = loaded
			}
			if loaded != nil {
				o.checkValidity(loaded.field, loaded.tls.Leaf)
			}
		})
	}
	c.certificates[name] = loaded
	return loaded
}

func (o object) loadCertificate(spec *resealv1.Certificate) *certificate {
	chainField, keyField := "spec.certificatePem", "spec.privateKeyPem"
	chainPEM, keyPEM := []byte(spec.GetCertificatePem()), []byte(spec.GetPrivateKeyPem())
	if spec.GetCertificateFile() != "" {
		chainField, keyField = "spec.certificateFile", "spec.privateKeyFile"
		var ok1, ok2 bool
		chainPEM, ok1 = o.file(chainField, spec.GetCertificateFile())
		keyPEM, ok2 = o.file(keyField, spec.GetPrivateKeyFile())
		if !ok1 || !ok2 {
			return nil
		}
	}
	chainPEM, keyPEM = withoutMark(chainPEM), withoutMark(keyPEM)
	chain, err := parseCertificates(chainPEM)
	if err != nil {
		o.refuse(chainField, "is not a PEM certificate chain: %v", err)
		return nil
	}
	pair, err := tls.X509KeyPair(chainPEM, keyPEM)
	if err != nil {
		o.refuse(keyField, "%s", keyProblem(keyPEM, err))
		return nil
	}
	pair.Leaf = chain[0]
	var d digest
	for _, der := range pair.Certificate {
		d.add(string(der))
	}
	return &certificate{tls: &pair, hash: d.sum(), field: chainField}
}

// checkValidity warns only: an expired certificate is still better than none,
// and refusing it would hold back every other change.
func (o object) checkValidity(field string, leaf *x509.Certificate) {
	now := time.Now()
	if now.After(leaf.NotAfter) {
		o.warn(field, "the certificate expired on %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	if now.Before(leaf.NotBefore) {
		o.warn(field, "the certificate is not valid before %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	}
}

// keyProblem says what is wrong with a private key in words of our own: errors
// of parsers may quote their input.
func keyProblem(keyPEM []byte, err error) string {
	switch {
	case len(keyPEM) == 0:
		return "the private key is missing"
	case strings.Contains(err.Error(), "does not match"):
		return "the private key does not belong to the certificate"
	default:
		return "is not an unencrypted PEM private key (PKCS #8, PKCS #1 or SEC 1)"
	}
}

// parseCertificates parses all PEM certificates in data, at least one.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	found, odd, err := parseBundle(data)
	if err == nil && len(odd) > 0 {
		err = odd[0]
	}
	return found, err
}

// parseBundle parses all PEM certificates in data of which at least one is
// usable. A bundle of an operating system may hold roots that crypto/x509 does not
// take, for example with a negative serial number: they are left out, and odd says
// why.
func parseBundle(data []byte) (found []*x509.Certificate, odd []error, err error) {
	data = withoutMark(data)
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		data = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		parsed, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			odd = append(odd, fmt.Errorf("certificate %d: %w", len(found)+len(odd)+1, err))
			continue
		}
		found = append(found, parsed)
	}
	switch {
	case len(found) > 0:
		return found, odd, nil
	case len(odd) > 0:
		return nil, odd, odd[0]
	}
	return nil, nil, errors.New("no CERTIFICATE block in it")
}

// withoutMark skips a byte order mark, which would hide the first PEM block.
func withoutMark(data []byte) []byte { return bytes.TrimPrefix(data, []byte("\ufeff")) }

// certificateSet chooses a listener's certificate by SNI.
type certificateSet struct {
	all      []*tls.Certificate
	exact    map[string][]*tls.Certificate // by name or IP address
	wildcard map[string][]*tls.Certificate // by ".suffix" of "*.suffix"
}

func newCertificateSet(certificates []*certificate) *certificateSet {
	s := &certificateSet{exact: map[string][]*tls.Certificate{}, wildcard: map[string][]*tls.Certificate{}}
	for _, certificate := range certificates {
		s.all = append(s.all, certificate.tls)
		for _, name := range certificate.tls.Leaf.DNSNames {
			name = strings.ToLower(strings.TrimSuffix(name, "."))
			if suffix, ok := strings.CutPrefix(name, "*"); ok {
				s.wildcard[suffix] = append(s.wildcard[suffix], certificate.tls)
			} else {
				s.exact[name] = append(s.exact[name], certificate.tls)
			}
		}
		for _, ip := range certificate.tls.Leaf.IPAddresses {
			s.exact[ip.String()] = append(s.exact[ip.String()], certificate.tls)
		}
	}
	for _, byName := range []map[string][]*tls.Certificate{s.exact, s.wildcard} {
		for _, candidates := range byName {
			slices.SortStableFunc(candidates, func(a, b *tls.Certificate) int { return signingCost(a) - signingCost(b) })
		}
	}
	return s
}

// signingCost orders certificates by what a handshake with them costs: a signature
// with RSA takes some twenty times as long as one with ECDSA or Ed25519.
func signingCost(certificate *tls.Certificate) int {
	if certificate.Leaf.PublicKeyAlgorithm == x509.RSA {
		return 1
	}
	return 0
}

// named are the certificates for a name: exact before wildcard, which stands for
// one label (RFC 6125 section 6.4.3).
func (s *certificateSet) named(name string) []*tls.Certificate {
	if found := s.exact[name]; len(found) > 0 {
		return found
	}
	if dot := strings.IndexByte(name, '.'); dot > 0 {
		return s.wildcard[name[dot:]]
	}
	return nil
}

func (s *certificateSet) covers(name string) bool { return len(s.named(name)) > 0 }

// get implements tls.Config.GetCertificate. Of several certificates for a name,
// the first that the client supports is used: ECDSA before RSA, side by side.
func (s *certificateSet) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	// The name is matched here; SupportsCertificate would refuse the default
	// certificate for a name that it does not hold.
	nameless := *hello
	nameless.ServerName = ""
	candidates := s.named(NormalizeHost(hello.ServerName))
	if chosen := firstSupported(&nameless, candidates); chosen != nil {
		return chosen, nil
	}
	if len(candidates) > 0 {
		return candidates[0], nil
	}
	if chosen := firstSupported(&nameless, s.all); chosen != nil {
		return chosen, nil
	}
	return s.all[0], nil
}

func firstSupported(hello *tls.ClientHelloInfo, candidates []*tls.Certificate) *tls.Certificate {
	for _, candidate := range candidates {
		if hello.SupportsCertificate(candidate) == nil {
			return candidate
		}
	}
	return nil
}
