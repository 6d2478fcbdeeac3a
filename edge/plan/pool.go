package plan

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

var poolALPN = map[resealv1.BackendPool_Protocol][]string{
	resealv1.BackendPool_PROTOCOL_AUTO:  {"h2", "http/1.1"},
	resealv1.BackendPool_PROTOCOL_HTTP1: {"http/1.1"},
	resealv1.BackendPool_PROTOCOL_HTTP2: {"h2"},
	resealv1.BackendPool_PROTOCOL_TCP:   nil,
}

// compilePool compiles a BackendPool, or returns nil when it is broken, or what it
// refers to is.
func (o object) compilePool(spec *resealv1.BackendPool) *Pool {
	spec = spec.WithDefaults()
	cfg, identity, ok := o.clientTLS(spec)
	if !ok {
		return nil
	}
	return &Pool{Name: o.ref.Name, UID: o.uid, Spec: spec, TLS: cfg, Identity: identity}
}

// clientTLS is the configuration for connections to a pool and the hash of it.
func (o object) clientTLS(spec *resealv1.BackendPool) (*tls.Config, string, bool) {
	from := spec.Tls
	cfg := &tls.Config{NextProtos: slices.Clone(poolALPN[spec.Protocol])}
	var identity digest
	identity.add(cfg.NextProtos...)

	policy := o.c.policy(from.Policy)
	if policy == nil {
		return nil, "", false
	}
	policy.apply(cfg)
	identity.add(policy.parameters()...)

	roots, ok := o.trust(from.Trust)
	if !ok {
		return nil, "", false
	}
	cfg.RootCAs = roots.pool
	identity.add(roots.hash)

	if from.ServerName != "" {
		cfg.ServerName = NormalizeHost(from.ServerName)
	}
	sans := subjectAltNames(from.SubjectAltNames)
	identity.add(slices.Sorted(slices.Values(from.SubjectAltNames))...)
	identity.add(strconv.FormatBool(from.InsecureSkipVerify))
	switch {
	case from.InsecureSkipVerify:
		cfg.InsecureSkipVerify = true
	case len(sans) > 0:
		cfg.InsecureSkipVerify = true // VerifyConnection does all of it
		cfg.VerifyConnection = sanVerifier(cfg.RootCAs, sans)
	}

	presented := ""
	if from.ClientCertificate != "" {
		loaded := o.c.certificate(from.ClientCertificate)
		if loaded == nil {
			return nil, "", false
		}
		presented = loaded.hash
		// Always presented: leaving it out because the server's list of
		// authorities lacks its issuer hides the misconfiguration.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return loaded.tls, nil
		}
	}
	identity.add(presented)
	if spec.Sessions.GetSharing() == resealv1.Sessions_SHARING_FLEET {
		// Sessions of pools that look alike must not travel with this one's.
		identity.add("fleet", o.uid)
	}
	return cfg, identity.sum(), true
}

// roots are what a pool trusts.
type roots struct {
	pool *x509.CertPool // nil: the system's
	hash string
	odd  []error // why some of them are left out
}

// trust are the roots of a pool, read once per edition of it.
func (o object) trust(trust *resealv1.BackendTLS_Trust) (*roots, bool) {
	var field string
	var data []byte
	switch from := trust.GetRoots().(type) {
	case *resealv1.BackendTLS_Trust_CaPem:
		field, data = "spec.tls.trust.caPem", []byte(from.CaPem)
	case *resealv1.BackendTLS_Trust_CaFile:
		field = "spec.tls.trust.caFile"
		var ok bool
		if data, ok = o.file(field, from.CaFile); !ok {
			return nil, false
		}
	default:
		return &roots{hash: "system"}, true
	}
	found := o.edition.roots
	if found == nil {
		certificates, odd, err := parseBundle(data)
		if err != nil {
			o.refuse(field, "holds no PEM certificates: %v", err)
			return nil, false
		}
		found = &roots{pool: x509.NewCertPool(), hash: hashSet(certificates), odd: odd}
		for _, certificate := range certificates {
			found.pool.AddCert(certificate)
		}
		o.edition.roots = found
	}
	o.warnOdd(field, found.odd)
	return found, true
}

// warnOdd says which roots can't be used. Those that can are, as elsewhere: one odd
// root must not cost all the others.
func (o object) warnOdd(field string, odd []error) {
	for _, problem := range odd {
		o.warn(field, "a root is left out: %v", problem)
	}
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

var errNoSAN = errors.New("the certificate holds none of the pool's subjectAltNames")

// sanVerifier verifies the chain against roots and then that the leaf holds one
// of sans. It stands in for the check against the server name, at full and at
// resumed handshakes.
func sanVerifier(roots *x509.CertPool, sans []san) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return &tls.CertificateVerificationError{Err: errors.New("the server sent no certificate")}
		}
		leaf := state.PeerCertificates[0]
		options := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
		for _, intermediate := range state.PeerCertificates[1:] {
			options.Intermediates.AddCert(intermediate)
		}
		_, err := leaf.Verify(options)
		if err == nil && !slices.ContainsFunc(sans, func(name san) bool { return name.in(leaf) }) {
			err = errNoSAN
		}
		if err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
		}
		return nil
	}
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
