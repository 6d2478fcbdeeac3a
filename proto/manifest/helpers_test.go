package manifest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"google.golang.org/protobuf/types/known/durationpb"
)

func seconds(s float64) *durationpb.Duration {
	return durationpb.New(time.Duration(s * float64(time.Second)))
}

func poolOf(name string, spec *resealv1.BackendPool) *resealv1.Resource {
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec:     &resealv1.Resource_BackendPool{BackendPool: spec},
	}
}

func certificateOf(name string, spec *resealv1.Certificate) *resealv1.Resource {
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec:     &resealv1.Resource_Certificate{Certificate: spec},
	}
}

// authority is a self-signed certificate with its key, in several forms.
type authority struct {
	cert           *x509.Certificate
	key            *ecdsa.PrivateKey
	certPEM        string
	pkcs8, sec1    string
	revocationList string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		DNSNames: []string{"web.example"}, SubjectKeyId: []byte{1},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(err)
	cert, err := x509.ParseCertificate(der)
	must(err)
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
	}, cert, key)
	must(err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	sec1, err := x509.MarshalECPrivateKey(key)
	must(err)
	return &authority{
		cert: cert, key: key, certPEM: pemText("CERTIFICATE", der), revocationList: pemText("X509 CRL", list),
		pkcs8: pemText("PRIVATE KEY", pkcs8), sec1: pemText("EC PRIVATE KEY", sec1),
	}
}

func pemText(blockType string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: blockType, Bytes: der}))
}
