package plan

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var serial atomic.Int64

// authority issues certificates for tests.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  crypto.Signer
	pem  string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key := newKey(t, false)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial.Add(1)), Subject: pkix.Name{CommonName: "test root " + t.Name()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t: t, cert: cert, key: key, pem: toPEM("CERTIFICATE", der)}
}

type leafOptions struct {
	rsa    bool
	names  []string
	ips    []string
	uris   []string
	client bool
	cn     string        // default "leaf"
	expiry time.Duration // from now, default 1h
}

// issue returns a chain and a key as PEM.
func (a *authority) issue(options leafOptions) (chain, key string, cert *x509.Certificate) {
	a.t.Helper()
	signer := newKey(a.t, options.rsa)
	if options.expiry == 0 {
		options.expiry = time.Hour
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial.Add(1)), Subject: pkix.Name{CommonName: "leaf"},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(options.expiry),
		DNSNames: options.names, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if options.client {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	if options.cn != "" {
		template.Subject.CommonName = options.cn
	}
	for _, ip := range options.ips {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
	}
	for _, uri := range options.uris {
		parsed, err := url.Parse(uri)
		if err != nil {
			a.t.Fatal(err)
		}
		template.URIs = append(template.URIs, parsed)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, signer.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err = x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		a.t.Fatal(err)
	}
	return toPEM("CERTIFICATE", der), toPEM("PRIVATE KEY", pkcs8), cert
}

func (a *authority) revoke(certs ...*x509.Certificate) string {
	a.t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(serial.Add(1)), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	for _, cert := range certs {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: cert.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return toPEM("X509 CRL", der)
}

func newKey(t *testing.T, useRSA bool) crypto.Signer {
	t.Helper()
	var key crypto.Signer
	var err error
	if useRSA {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func toPEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// named makes a resource of a spec.
func named(name string, spec any) *resealv1.Resource {
	r := &resealv1.Resource{Metadata: &resealv1.Metadata{Name: name, Uid: "uid-" + name}}
	switch spec := spec.(type) {
	case *resealv1.BackendPool:
		r.Spec = &resealv1.Resource_BackendPool{BackendPool: spec}
	case *resealv1.TLSPolicy:
		r.Spec = &resealv1.Resource_TlsPolicy{TlsPolicy: spec}
	case *resealv1.Listener:
		r.Spec = &resealv1.Resource_Listener{Listener: spec}
	case *resealv1.Route:
		r.Spec = &resealv1.Resource_Route{Route: spec}
	case *resealv1.Certificate:
		r.Spec = &resealv1.Resource_Certificate{Certificate: spec}
	default:
		panic("unknown spec")
	}
	return r
}

func prefix(path string) *resealv1.PathMatch {
	return &resealv1.PathMatch{Match: &resealv1.PathMatch_Prefix{Prefix: path}}
}

func exact(path string) *resealv1.PathMatch {
	return &resealv1.PathMatch{Match: &resealv1.PathMatch_Exact{Exact: path}}
}

func pools(names ...string) []*resealv1.WeightedPool {
	var list []*resealv1.WeightedPool
	for _, name := range names {
		list = append(list, &resealv1.WeightedPool{Name: name})
	}
	return list
}

func pool(endpoint string) *resealv1.BackendPool {
	return &resealv1.BackendPool{Endpoints: []*resealv1.Endpoint{{Address: endpoint}}}
}

func compile(resources ...*resealv1.Resource) (*Plan, []*resealv1.Violation) {
	return Compile(resealv1.NewSnapshot("cluster", 7, resources), Env{})
}

func mustCompile(t *testing.T, resources ...*resealv1.Resource) *Plan {
	t.Helper()
	compiled, violations := compile(resources...)
	for _, violation := range violations {
		t.Error(violation.Text())
	}
	if len(violations) > 0 {
		t.FailNow()
	}
	return compiled
}
