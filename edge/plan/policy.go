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

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

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

// policy compiles a TLSPolicy once; "" is one of default values. It returns nil
// when there is none, or it is broken.
func (c *compiler) policy(name string) *policy {
	if compiled, ok := c.policies[name]; ok {
		return compiled
	}
	var compiled *policy
	if name == "" {
		compiled = object{c: c, ref: &resealv1.ResourceRef{Kind: "TLSPolicy"}}.compilePolicy(nil)
	} else if resource := c.snapshot.Get("TLSPolicy", name); resource != nil {
		c.guard(resource, func(o object) { compiled = o.compilePolicy(resource.GetTlsPolicy()) })
	}
	c.policies[name] = compiled
	return compiled
}

func (o object) compilePolicy(spec *resealv1.TLSPolicy) *policy {
	spec = spec.WithDefaults()
	p := &policy{
		spec: spec, uid: o.uid,
		min: tlsVersions[spec.MinVersion], max: tlsVersions[spec.MaxVersion],
		suites: cipherSuites(spec.CipherSuites),
	}
	for _, name := range spec.Curves {
		p.curves = append(p.curves, curves[name])
	}
	if !o.clientAuth(p, spec.ClientAuth) {
		return nil
	}
	return p
}

func cipherSuites(names []string) []uint16 {
	var ids []uint16
	for _, suite := range tls.CipherSuites() {
		if slices.Contains(names, suite.Name) {
			ids = append(ids, suite.ID)
		}
	}
	return ids
}

var clientAuthTypes = map[resealv1.ClientAuth_Mode]tls.ClientAuthType{
	resealv1.ClientAuth_MODE_NONE:     tls.NoClientCert,
	resealv1.ClientAuth_MODE_OPTIONAL: tls.VerifyClientCertIfGiven,
	resealv1.ClientAuth_MODE_REQUIRE:  tls.RequireAndVerifyClientCert,
}

// clientAuth reports whether it found no violation.
func (o object) clientAuth(p *policy, spec *resealv1.ClientAuth) bool {
	p.clientAuth = clientAuthTypes[spec.Mode]
	if p.clientAuth == tls.NoClientCert {
		return true
	}
	roots, odd, err := parseBundle([]byte(spec.CaPem))
	if err != nil {
		o.refuse("spec.clientAuth.caPem", "holds no PEM certificates: %v", err)
		return false
	}
	o.warnOdd("spec.clientAuth.caPem", odd)
	p.roots = x509.NewCertPool()
	for _, root := range roots {
		p.roots.AddCert(root)
	}
	p.rootsHash = hashSet(roots)
	if spec.CrlPem == "" {
		return true
	}
	if p.revoked, err = parseRevocations(withoutMark([]byte(spec.CrlPem)), roots); err != nil {
		o.refuse("spec.clientAuth.crlPem", "%v", err)
	}
	return err == nil
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
