package plan

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"slices"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func commonNamePool(ca *authority, serverName string) *resealv1.BackendPool {
	spec := pool("10.0.0.1:443")
	spec.Tls = &resealv1.BackendTLS{
		Trust:      &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: ca.pem}},
		ServerName: serverName, SubjectCommonName: true,
	}
	return spec
}

func TestSubjectCommonName(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	tests := []struct {
		name   string
		issuer *authority
		leaf   leafOptions
		asked  string
		ok     bool
	}{
		{"the same", ca, leafOptions{cn: "real.test"}, "real.test", true},
		{"in other letters", ca, leafOptions{cn: "REAL.test."}, "real.test", true},
		{"another", ca, leafOptions{cn: "real.test"}, "other.test", false},
		{"a label more", ca, leafOptions{cn: "real.test"}, "a.real.test", false},
		{"wildcard", ca, leafOptions{cn: "*.real.test"}, "a.real.test", true},
		{"wildcard, two labels", ca, leafOptions{cn: "*.real.test"}, "a.b.real.test", false},
		{"wildcard, no label", ca, leafOptions{cn: "*.real.test"}, "real.test", false},
		{"wildcard in a label", ca, leafOptions{cn: "r*.test"}, "real.test", false},
		{"wildcard within", ca, leafOptions{cn: "a.*.test"}, "a.real.test", false},
		{"wildcard alone", ca, leafOptions{cn: "*"}, "real", false},
		{"address", ca, leafOptions{cn: "192.0.2.7"}, "192.0.2.7", false},
		{"no name", ca, leafOptions{cn: "A Server"}, "real.test", false},
		{"alternative name", ca, leafOptions{cn: "x", names: []string{"real.test"}}, "real.test", true},
		{"address as alternative name", ca, leafOptions{cn: "x", ips: []string{"192.0.2.7"}}, "192.0.2.7", true},
		{"alternative name takes its place", ca, leafOptions{cn: "real.test", names: []string{"x.test"}}, "real.test", false},
		{"so does an address", ca, leafOptions{cn: "real.test", ips: []string{"192.0.2.7"}}, "real.test", false},
		{"so does a URI", ca, leafOptions{cn: "real.test", uris: []string{"spiffe://a/b"}}, "real.test", false},
		{"foreign root", foreign, leafOptions{cn: "real.test"}, "real.test", false},
		{"expired", ca, leafOptions{cn: "real.test", expiry: -time.Minute}, "real.test", false},
		{"of a client", ca, leafOptions{cn: "real.test", client: true}, "real.test", false},
	}
	for _, test := range tests {
		chain, key, _ := test.issuer.issue(test.leaf)
		pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
		if err != nil {
			t.Fatal(err)
		}
		for _, fixed := range []bool{true, false} {
			cfg := mustCompile(t, named("p", commonNamePool(ca, test.asked))).Pools["p"].TLS.Clone()
			if !fixed { // as the request's host
				cfg = mustCompile(t, named("p", commonNamePool(ca, ""))).Pools["p"].TLS.Clone()
				cfg.ServerName = test.asked
				verify := cfg.VerifyConnection
				cfg.VerifyConnection = func(state tls.ConnectionState) error {
					state.ServerName = test.asked // which a client of an address does not tell
					return verify(state)
				}
			}
			_, err = func() (tls.ConnectionState, error) {
				state, err, _ := handshake(t, cfg, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}})
				return state, err
			}()
			var verification *tls.CertificateVerificationError
			if test.ok && err != nil || !test.ok && !errors.As(err, &verification) {
				t.Errorf("%s, fixed %v: %v", test.name, fixed, err)
			}
		}
	}
}

// At a resumed handshake the common name is verified again.
func TestSubjectCommonNameAtResumption(t *testing.T) {
	ca := newAuthority(t)
	chain, key, _ := ca.issue(leafOptions{cn: "real.test"})
	pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	for _, max := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		server := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}, MaxVersion: max}
		cfg := mustCompile(t, named("p", commonNamePool(ca, "real.test"))).Pools["p"].TLS.Clone()
		cfg.ClientSessionCache = oneSession{tls.NewLRUClientSessionCache(1)}
		for i := range 2 {
			if state, err, _ := handshake(t, cfg, server); err != nil || state.DidResume != (i == 1) {
				t.Fatalf("handshake %d: resumed %v, %v", i, state.DidResume, err)
			}
		}
		cfg.ServerName = "other.test"
		if state, err, _ := handshake(t, cfg, server); !errors.Is(err, errCommonName) {
			t.Errorf("resumed %v with another name: %v", state.DidResume, err)
		}
	}
}

// oneSession gives its session to every name.
type oneSession struct{ tls.ClientSessionCache }

func (o oneSession) Get(string) (*tls.ClientSessionState, bool) { return o.ClientSessionCache.Get("") }
func (o oneSession) Put(_ string, s *tls.ClientSessionState)    { o.ClientSessionCache.Put("", s) }

// An authority with name constraints can't get around them by a common name.
func TestSubjectCommonNameOfConstrainedAuthority(t *testing.T) {
	root := newAuthority(t)
	key := newKey(t, false)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial.Add(1)), Subject: pkix.Name{CommonName: "constrained"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, PermittedDNSDomains: []string{"own.test"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, root.cert, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	constrained := &authority{t: t, cert: cert, key: key}
	for _, test := range []struct {
		leaf leafOptions
		ok   bool
	}{
		{leafOptions{cn: "real.test"}, false},
		{leafOptions{cn: "x", names: []string{"a.own.test"}}, true},
	} {
		chain, leafKey, leaf := constrained.issue(test.leaf)
		pair, err := tls.X509KeyPair([]byte(chain+toPEM("CERTIFICATE", der)), []byte(leafKey))
		if err != nil {
			t.Fatal(err)
		}
		asked := slices.Concat(leaf.DNSNames, []string{leaf.Subject.CommonName})[0]
		cfg := mustCompile(t, named("p", commonNamePool(root, asked))).Pools["p"].TLS
		_, err, _ = handshake(t, cfg, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}})
		if (err == nil) != test.ok || !test.ok && !errors.Is(err, errConstrained) {
			t.Errorf("%s: %v", asked, err)
		}
	}
}

// HTTP/2 forbids renegotiation, so it is not offered where renegotiation is
// allowed.
func TestRenegotiation(t *testing.T) {
	const never, once = resealv1.BackendTLS_RENEGOTIATION_NEVER, resealv1.BackendTLS_RENEGOTIATION_ONCE
	for _, test := range []struct {
		allowed resealv1.BackendTLS_Renegotiation
		proto   resealv1.BackendPool_Protocol
		alpn    []string
		want    tls.RenegotiationSupport
	}{
		{0, 0, []string{"h2", "http/1.1"}, tls.RenegotiateNever},
		{never, resealv1.BackendPool_PROTOCOL_AUTO, []string{"h2", "http/1.1"}, tls.RenegotiateNever},
		{once, 0, []string{"http/1.1"}, tls.RenegotiateOnceAsClient},
		{once, resealv1.BackendPool_PROTOCOL_AUTO, []string{"http/1.1"}, tls.RenegotiateOnceAsClient},
		{once, resealv1.BackendPool_PROTOCOL_HTTP1, []string{"http/1.1"}, tls.RenegotiateOnceAsClient},
		{once, resealv1.BackendPool_PROTOCOL_TCP, nil, tls.RenegotiateOnceAsClient},
	} {
		spec := pool("10.0.0.1:443")
		spec.Protocol, spec.Tls = test.proto, &resealv1.BackendTLS{Renegotiation: test.allowed}
		cfg := mustCompile(t, named("p", spec)).Pools["p"].TLS
		if cfg.Renegotiation != test.want || !slices.Equal(cfg.NextProtos, test.alpn) {
			t.Errorf("%v of %v: %v, %v", test.allowed, test.proto, cfg.Renegotiation, cfg.NextProtos)
		}
	}
}
