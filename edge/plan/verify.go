package plan

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

var (
	errNoCertificate = errors.New("the server sent no certificate")
	errNoSAN         = errors.New("the certificate holds none of the pool's tls.subjectAltNames")
	errConstrained   = errors.New("the certificate has no alternative names, which its issuer's name constraints are about; tls.subjectCommonName can't take their place")
	errCommonName    = errors.New("the certificate's only name, its subject's common name, is another one")
)

// verification sets how certificates are verified: by crypto/tls, unless the pool
// has rules of its own. Those are VerifyConnection's, which runs at full and at
// resumed handshakes and for sessions of other edges.
func verification(cfg *tls.Config, from *resealv1.BackendTLS) {
	var check nameCheck
	switch sans := subjectAltNames(from.SubjectAltNames); {
	case from.InsecureSkipVerify:
	case len(sans) > 0:
		check = func(chains [][]*x509.Certificate, _ string) error {
			if slices.ContainsFunc(sans, func(name san) bool { return name.in(chains[0][0]) }) {
				return nil
			}
			return fmt.Errorf("%w: %s", errNoSAN, strings.Join(from.SubjectAltNames, ", "))
		}
	case from.SubjectCommonName:
		check = commonName
	default:
		return
	}
	cfg.InsecureSkipVerify = true
	if check != nil {
		cfg.VerifyConnection = verifier(cfg.RootCAs, cfg.ServerName, check)
	}
}

// nameCheck says whether the leaf of verified chains, at least one, may be used by
// the server that was asked for.
type nameCheck func(chains [][]*x509.Certificate, serverName string) error

// verifier verifies the chain against roots and then the leaf by check. fixed is
// the server name if the connection names none.
func verifier(roots *x509.CertPool, fixed string, check nameCheck) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return &tls.CertificateVerificationError{Err: errNoCertificate}
		}
		leaf, name := state.PeerCertificates[0], state.ServerName
		if name == "" {
			name = fixed
		}
		options := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
		for _, intermediate := range state.PeerCertificates[1:] {
			options.Intermediates.AddCert(intermediate)
		}
		chains, err := leaf.Verify(options)
		if err == nil {
			err = check(chains, name)
		}
		if err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
		}
		return nil
	}
}

// commonName checks as crypto/tls does, but a certificate without alternative
// names by its subject. The name is matched as a DNS name only (RFC 6125 section
// 6.4.4), and never when there is an alternative name of whatever kind.
func commonName(chains [][]*x509.Certificate, serverName string) error {
	leaf := chains[0][0]
	if hasExtension(leaf, altNames) {
		return leaf.VerifyHostname(serverName)
	}
	own := strings.ToLower(strings.TrimSuffix(leaf.Subject.CommonName, "."))
	asked := strings.ToLower(strings.TrimSuffix(serverName, "."))
	matched := own == asked
	if suffix, wild := strings.CutPrefix(own, "*."); wild {
		label, rest, _ := strings.Cut(asked, ".")
		matched = label != "" && rest == suffix
	}
	if _, err := netip.ParseAddr(asked); err == nil || !matched || !validName(strings.TrimPrefix(own, "*.")) {
		return fmt.Errorf("%w than %q (tls.serverName, or the request's host)", errCommonName, serverName)
	}
	// Name constraints are checked against alternative names only, so that an
	// authority that has some could give itself any name here.
	if !slices.ContainsFunc(chains, unconstrained) {
		return errConstrained
	}
	return nil
}

// unconstrained reports whether no certificate of a chain has name constraints.
func unconstrained(chain []*x509.Certificate) bool {
	return !slices.ContainsFunc(chain, func(c *x509.Certificate) bool { return hasExtension(c, nameConstraints) })
}

// Extensions (RFC 5280 section 4.2.1).
var (
	altNames        = asn1.ObjectIdentifier{2, 5, 29, 17}
	nameConstraints = asn1.ObjectIdentifier{2, 5, 29, 30}
)

func hasExtension(c *x509.Certificate, id asn1.ObjectIdentifier) bool {
	return slices.ContainsFunc(c.Extensions, func(extension pkix.Extension) bool { return extension.Id.Equal(id) })
}

// san is a name that a certificate may hold. One field is set.
type san struct {
	dns string
	ip  netip.Addr
	uri string
}

func subjectAltNames(names []string) []san {
	var sans []san
	for _, name := range names {
		address, err := netip.ParseAddr(name)
		dns := strings.ToLower(strings.TrimSuffix(name, "."))
		switch {
		case err == nil:
			sans = append(sans, san{ip: address.Unmap()})
		case validName(strings.TrimPrefix(dns, "*.")):
			sans = append(sans, san{dns: dns})
		default:
			sans = append(sans, san{uri: name})
		}
	}
	return sans
}

func (s san) in(leaf *x509.Certificate) bool {
	switch {
	case s.ip.IsValid():
		for _, ip := range leaf.IPAddresses {
			if address, ok := netip.AddrFromSlice(ip); ok && address.Unmap() == s.ip {
				return true
			}
		}
	case s.uri != "":
		for _, uri := range leaf.URIs {
			if uri.String() == s.uri {
				return true
			}
		}
	case strings.HasPrefix(s.dns, "*."):
		for _, name := range leaf.DNSNames {
			if strings.EqualFold(name, s.dns) {
				return true
			}
		}
	default:
		return leaf.VerifyHostname(s.dns) == nil
	}
	return false
}
