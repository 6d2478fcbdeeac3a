package plan

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"strconv"

	"github.com/reseal/reseal/edge/exchange"
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
func (o object) compilePool(spec *resealv1.BackendPool) *exchange.Pool {
	spec = spec.WithDefaults()
	if spec.Tls.Renegotiation == resealv1.BackendTLS_RENEGOTIATION_ONCE && spec.Protocol == resealv1.BackendPool_PROTOCOL_AUTO {
		spec.Protocol = resealv1.BackendPool_PROTOCOL_HTTP1 // RFC 9113 section 9.2.1
	}
	cfg, identity, ok := o.clientTLS(spec)
	if !ok {
		return nil
	}
	return &exchange.Pool{Name: o.ref.Name, UID: o.uid, Spec: spec, TLS: cfg, Identity: identity}
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
	identity.add(slices.Sorted(slices.Values(from.SubjectAltNames))...)
	identity.add(strconv.FormatBool(from.InsecureSkipVerify))
	verification(cfg, from)
	if from.SubjectCommonName {
		identity.add("subjectCommonName")
	}
	if from.Renegotiation == resealv1.BackendTLS_RENEGOTIATION_ONCE {
		cfg.Renegotiation = tls.RenegotiateOnceAsClient
		identity.add("renegotiation", "once")
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
