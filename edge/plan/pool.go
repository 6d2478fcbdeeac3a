package plan

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
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

// pool compiles a BackendPool, or returns nil when it is broken.
func (c *compiler) pool(resource *resealv1.Resource) *Pool {
	o := c.object(resource)
	before := len(c.violations)
	spec := resource.GetBackendPool().WithDefaults()
	o.checkPool(spec)
	pool := &Pool{Name: o.ref.Name, UID: o.uid, Spec: spec}
	pool.TLS, pool.Identity = o.clientTLS(spec)
	if len(c.violations) > before {
		return nil
	}
	return pool
}

func (o object) checkPool(spec *resealv1.BackendPool) {
	o.enum("spec.protocol", int32(spec.Protocol), resealv1.BackendPool_Protocol_name)
	switch {
	case len(spec.Endpoints) > 0 && spec.Dns != nil:
		o.refuse("spec", "set either endpoints or dns, not both")
	case len(spec.Endpoints) == 0 && spec.Dns == nil:
		o.refuse("spec", "set either endpoints or dns")
	}
	for i, endpoint := range spec.Endpoints {
		o.hostPort(fmt.Sprintf("spec.endpoints[%d].address", i), endpoint.GetAddress(), false, false)
	}
	if dns := spec.Dns; dns != nil {
		if !validName(strings.ToLower(strings.TrimSuffix(dns.Name, "."))) {
			o.refuse("spec.dns.name", "%q is no DNS name", dns.Name)
		}
		if dns.Port == 0 || dns.Port > 65535 {
			o.refuse("spec.dns.port", "must be from 1 to 65535")
		}
		o.timeout("spec.dns.refreshInterval", dns.RefreshInterval)
	}
	o.enum("spec.sessions.mode", int32(spec.Sessions.Mode), resealv1.Sessions_Mode_name)
	o.enum("spec.sessions.sessionIDs", int32(spec.Sessions.SessionIds), resealv1.Sessions_SessionIds_name)
	o.enum("spec.sessions.scope", int32(spec.Sessions.Scope), resealv1.Sessions_Scope_name)
	o.enum("spec.connections.reuse", int32(spec.Connections.Reuse), resealv1.Connections_Reuse_name)
	o.enum("spec.loadBalancing.algorithm", int32(spec.LoadBalancing.Algorithm), resealv1.LoadBalancing_Algorithm_name)
	if check := spec.HealthCheck; check != nil {
		o.checkHealth(check)
	}
	o.timeout("spec.connections.idleTimeout", spec.Connections.IdleTimeout)
	o.timeout("spec.connections.maxLifetime", spec.Connections.MaxLifetime)
	o.timeout("spec.connections.closeTimeout", spec.Connections.CloseTimeout)
	o.timeout("spec.outlierDetection.ejectionTime", spec.OutlierDetection.EjectionTime)
	o.timeout("spec.timeouts.connect", spec.Timeouts.Connect)
	o.timeout("spec.timeouts.handshake", spec.Timeouts.Handshake)
	o.timeout("spec.timeouts.responseHeader", spec.Timeouts.ResponseHeader)
	o.timeout("spec.timeouts.idle", spec.Timeouts.Idle)
}

func (o object) checkHealth(check *resealv1.HealthCheck) {
	if check.ServerName == "" {
		o.refuse("spec.healthCheck.serverName", "is required when tls.serverName is empty")
	}
	if !strings.HasPrefix(check.Path, "/") {
		o.refuse("spec.healthCheck.path", "%q does not start with /", check.Path)
	}
	o.timeout("spec.healthCheck.interval", check.Interval)
	o.timeout("spec.healthCheck.timeout", check.Timeout)
}

// clientTLS is the configuration for connections to a pool and the hash of it.
// Both are useless when it found violations.
func (o object) clientTLS(spec *resealv1.BackendPool) (*tls.Config, string) {
	from := spec.Tls
	cfg := &tls.Config{NextProtos: slices.Clone(poolALPN[spec.Protocol])}
	var identity digest
	identity.add(cfg.NextProtos...)

	if from.Policy == "" || o.exists("spec.tls.policy", "TLSPolicy", from.Policy) {
		if policy := o.c.policy(from.Policy); policy != nil {
			policy.apply(cfg)
			identity.add(policy.parameters()...)
		}
	}
	var roots string
	cfg.RootCAs, roots = o.trust(from.Trust)
	identity.add(roots)

	if name := from.ServerName; name != "" {
		cfg.ServerName = NormalizeHost(name)
		if !validName(cfg.ServerName) && !isIP(cfg.ServerName) {
			o.refuse("spec.tls.serverName", "%q is no host name", name)
		}
	}
	sans := o.subjectAltNames(from.SubjectAltNames)
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
	if name := from.ClientCertificate; name != "" && o.exists("spec.tls.clientCertificate", "Certificate", name) {
		if loaded := o.c.certificate(name); loaded != nil {
			presented = loaded.hash
			// Always presented: leaving it out because the server's list of
			// authorities lacks its issuer hides the misconfiguration.
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return loaded.tls, nil
			}
		}
	}
	identity.add(presented)
	if spec.Sessions.GetSharing() == resealv1.Sessions_SHARING_FLEET {
		// Sessions of pools that look alike must not travel with this one's.
		identity.add("fleet", o.uid)
	}
	return cfg, identity.sum()
}

// trust are the roots, nil for the system's, and a hash of them.
func (o object) trust(trust *resealv1.BackendTLS_Trust) (*x509.CertPool, string) {
	var field string
	var data []byte
	switch roots := trust.GetRoots().(type) {
	case *resealv1.BackendTLS_Trust_CaPem:
		field, data = "spec.tls.trust.caPem", []byte(roots.CaPem)
	case *resealv1.BackendTLS_Trust_CaFile:
		field = "spec.tls.trust.caFile"
		var ok bool
		if data, ok = o.file(field, roots.CaFile); !ok {
			return nil, ""
		}
	case *resealv1.BackendTLS_Trust_System:
		if !roots.System {
			o.refuse("spec.tls.trust.system", "must be true, or another kind of trust be set")
		}
		return nil, "system"
	}
	certificates, err := parseCertificates(data)
	if err != nil {
		o.refuse(field, "holds no PEM certificates: %v", err)
		return nil, ""
	}
	pool := x509.NewCertPool()
	for _, certificate := range certificates {
		pool.AddCert(certificate)
	}
	return pool, hashSet(certificates)
}

// san is a name that a certificate may hold. One field is set.
type san struct {
	dns string
	ip  netip.Addr
	uri string
}

func (o object) subjectAltNames(names []string) []san {
	var sans []san
	for i, name := range names {
		field := fmt.Sprintf("spec.tls.subjectAltNames[%d]", i)
		address, err := netip.ParseAddr(name)
		dns := strings.ToLower(strings.TrimSuffix(name, "."))
		switch {
		case err == nil:
			sans = append(sans, san{ip: address.Unmap()})
		case strings.Contains(name, "://"):
			if _, err := url.Parse(name); err != nil {
				o.refuse(field, "%q is no URI", name)
			}
			sans = append(sans, san{uri: name})
		case validName(strings.TrimPrefix(dns, "*.")):
			sans = append(sans, san{dns: dns})
		default:
			o.refuse(field, "%q is no DNS name, IP address or URI", name)
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
