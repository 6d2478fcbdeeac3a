package share

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"
)

const (
	maxCertificate = 8 << 10
	maxVerified    = 1024
)

// trust verifies the certificates of other edges. What was verified is
// remembered while the authority stays the same.
type trust struct {
	mu       sync.Mutex
	roots    *x509.CertPool
	verified map[[32]byte]*x509.Certificate
}

// verify returns the key of an edge: its certificate must be of the fleet's
// authority and name that edge, in the trust domain of own, and nothing else.
func (t *trust) verify(edge string, der []byte, own *x509.Certificate, roots *x509.CertPool) (*ecdsa.PublicKey, error) {
	certificate, err := t.chain(der, roots)
	if err != nil {
		return nil, err
	}
	if now := time.Now(); now.Before(certificate.NotBefore) || now.After(certificate.NotAfter) {
		return nil, errors.New("its certificate is not valid now")
	}
	if len(own.URIs) != 1 {
		return nil, errors.New("the edge's own certificate names no trust domain")
	}
	names := len(certificate.DNSNames) + len(certificate.IPAddresses) + len(certificate.EmailAddresses)
	want := "spiffe://" + own.URIs[0].Host + "/edge/" + edge
	if len(certificate.URIs) != 1 || names > 0 || certificate.URIs[0].String() != want {
		return nil, fmt.Errorf("its certificate is for %v, not for %s", certificate.URIs, want)
	}
	key, ok := certificate.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("its key is not ECDSA P-256")
	}
	return key, nil
}

func (t *trust) chain(der []byte, roots *x509.CertPool) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, errors.New("its certificate is too large")
	}
	sum := sha256.Sum256(der)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.roots != roots || len(t.verified) >= maxVerified {
		t.roots, t.verified = roots, map[[32]byte]*x509.Certificate{}
	}
	if certificate := t.verified[sum]; certificate != nil {
		return certificate, nil
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, errors.New("its certificate is malformed")
	}
	if _, err := certificate.Verify(x509.VerifyOptions{
		Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		return nil, err
	}
	t.verified[sum] = certificate
	return certificate, nil
}
