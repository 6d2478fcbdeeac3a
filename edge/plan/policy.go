package plan

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxTicketLifetime is TLS's own bound (RFC 8446 section 4.6.1).
const maxTicketLifetime = 7 * 24 * time.Hour

// policy is a compiled TLSPolicy.
type policy struct {
	spec       *resealv1.TLSPolicy // with defaults
	uid        string
	min, max   uint16
	suites     []uint16
	curves     []tls.CurveID
	clientAuth tls.ClientAuthType
	roots      *x509.CertPool
	rootsHash  string
	revoked    *revocations
}

var tlsVersions = map[resealv1.TLSVersion]uint16{
	resealv1.TLSVersion_TLS_VERSION_TLS1_2: tls.VersionTLS12,
	resealv1.TLSVersion_TLS_VERSION_TLS1_3: tls.VersionTLS13,
}

var curves = map[string]tls.CurveID{
	"X25519":         tls.X25519,
	"P256":           tls.CurveP256,
	"P384":           tls.CurveP384,
	"P521":           tls.CurveP521,
	"X25519MLKEM768": tls.X25519MLKEM768,
}

// policy compiles a TLSPolicy once; "" is one of default values. The reference
// has been checked. It returns nil when the policy is broken.
func (c *compiler) policy(name string) *policy {
	if compiled, ok := c.policies[name]; ok {
		return compiled
	}
	var compiled *policy
	if name == "" {
		compiled = object{c: c, ref: &resealv1.ResourceRef{Kind: "TLSPolicy"}}.compilePolicy(nil)
	} else {
		resource := c.snapshot.Get("TLSPolicy", name)
		compiled = c.object(resource).compilePolicy(resource.GetTlsPolicy())
	}
	c.policies[name] = compiled
	return compiled
}

func (o object) compilePolicy(spec *resealv1.TLSPolicy) *policy {
	before := len(o.c.violations)
	spec = spec.WithDefaults()
	p := &policy{spec: spec, uid: o.uid}
	p.min = o.version("spec.minVersion", spec.MinVersion)
	p.max = o.version("spec.maxVersion", spec.MaxVersion)
	if p.min > p.max && p.max != 0 {
		o.refuse("spec.minVersion", "is above maxVersion")
	}
	p.suites = o.cipherSuites(spec.CipherSuites)
	for i, name := range spec.Curves {
		curve, ok := curves[name]
		if !ok {
			o.refuse(fmt.Sprintf("spec.curves[%d]", i), "%q is none of X25519, P256, P384, P521, X25519MLKEM768", name)
		}
		p.curves = append(p.curves, curve)
	}
	for i, protocol := range spec.Alpn {
		if protocol != "h2" && protocol != "http/1.1" {
			o.refuse(fmt.Sprintf("spec.alpn[%d]", i), "%q is neither h2 nor http/1.1", protocol)
		}
	}
	if lifetime := duration(spec.Resumption.TicketLifetime); lifetime <= 0 || lifetime > maxTicketLifetime {
		o.refuse("spec.resumption.ticketLifetime", "must be longer than 0s and at most 168h")
	}
	o.clientAuth(p, spec.ClientAuth)
	if len(o.c.violations) > before {
		return nil
	}
	return p
}

func (o object) version(field string, version resealv1.TLSVersion) uint16 {
	number, ok := tlsVersions[version]
	if !ok {
		o.refuse(field, "this edge does not know the value %d", version)
	}
	return number
}

func (o object) cipherSuites(names []string) []uint16 {
	var ids []uint16
	for i, name := range names {
		field := fmt.Sprintf("spec.cipherSuites[%d]", i)
		same := func(suite *tls.CipherSuite) bool { return suite.Name == name }
		secure := tls.CipherSuites()
		at := slices.IndexFunc(secure, same)
		if at >= 0 && !slices.Contains(secure[at].SupportedVersions, tls.VersionTLS12) {
			o.refuse(field, "%s is a suite of TLS 1.3, which can't be chosen", name)
			continue
		}
		if at >= 0 {
			ids = append(ids, secure[at].ID)
			continue
		}
		insecure := tls.InsecureCipherSuites()
		if at = slices.IndexFunc(insecure, same); at < 0 {
			o.refuse(field, "%q is no TLS 1.2 cipher suite that this edge knows, for example TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", name)
			continue
		}
		o.warn(field, "%s is insecure", name)
		ids = append(ids, insecure[at].ID)
	}
	return ids
}

func (o object) clientAuth(p *policy, spec *resealv1.ClientAuth) {
	switch spec.Mode {
	case resealv1.ClientAuth_MODE_NONE:
		p.clientAuth = tls.NoClientCert
		return
	case resealv1.ClientAuth_MODE_OPTIONAL:
		p.clientAuth = tls.VerifyClientCertIfGiven
	case resealv1.ClientAuth_MODE_REQUIRE:
		p.clientAuth = tls.RequireAndVerifyClientCert
	default:
		o.refuse("spec.clientAuth.mode", "this edge does not know the value %d", spec.Mode)
		return
	}
	roots, err := parseCertificates([]byte(spec.CaPem))
	if err != nil {
		o.refuse("spec.clientAuth.caPem", "holds no PEM certificates: %v", err)
		return
	}
	p.roots = x509.NewCertPool()
	for _, root := range roots {
		p.roots.AddCert(root)
	}
	p.rootsHash = hashSet(roots)
	if spec.CrlPem == "" {
		return
	}
	if p.revoked, err = parseRevocations([]byte(spec.CrlPem), roots); err != nil {
		o.refuse("spec.clientAuth.crlPem", "%v", err)
	}
}

// apply sets versions, cipher suites and curves.
func (p *policy) apply(cfg *tls.Config) {
	cfg.MinVersion, cfg.MaxVersion = p.min, p.max
	cfg.CipherSuites = p.suites
	cfg.CurvePreferences = p.curves
}

// parameters are the values that apply sets, for hashes.
func (p *policy) parameters() []string {
	values := []string{tls.VersionName(p.min), tls.VersionName(p.max)}
	for _, suite := range p.suites {
		values = append(values, "suite "+strconv.Itoa(int(suite)))
	}
	for _, curve := range p.curves {
		values = append(values, "curve "+strconv.Itoa(int(curve)))
	}
	return values
}

// revocations are the certificates that revocation lists name, by issuer and
// serial number.
type revocations struct {
	serials map[string]struct{}
	hash    string
}

// parseRevocations parses PEM revocation lists and checks that one of roots
// signed each. Lists past their nextUpdate still count: what was revoked stays
// so.
func parseRevocations(data []byte, roots []*x509.Certificate) (*revocations, error) {
	r := &revocations{serials: map[string]struct{}{}}
	var d digest
	lists := 0
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		list, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("revocation list %d can't be parsed: %w", lists+1, err)
		}
		signed := slices.ContainsFunc(roots, func(root *x509.Certificate) bool {
			return list.CheckSignatureFrom(root) == nil
		})
		if !signed {
			return nil, fmt.Errorf("revocation list %d is not signed by a root in caPem", lists+1)
		}
		for _, entry := range list.RevokedCertificateEntries {
			r.serials[revocationKey(list.RawIssuer, entry.SerialNumber.Bytes())] = struct{}{}
		}
		d.add(string(list.Raw))
		lists++
	}
	if lists == 0 {
		return nil, errors.New("no PEM revocation list in it")
	}
	r.hash = d.sum()
	return r, nil
}

func revocationKey(issuer, serial []byte) string {
	return strings.Join([]string{string(issuer), string(serial)}, "\x00")
}

var errRevoked = errors.New("the client's certificate is revoked")

// verify implements tls.Config.VerifyConnection, which also runs when a session
// is resumed: a certificate that was revoked since ends its sessions.
func (r *revocations) verify(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		return nil
	}
	for _, chain := range state.VerifiedChains {
		revoked := slices.ContainsFunc(chain, func(member *x509.Certificate) bool {
			_, found := r.serials[revocationKey(member.RawIssuer, member.SerialNumber.Bytes())]
			return found
		})
		if !revoked {
			return nil
		}
	}
	return errRevoked
}
