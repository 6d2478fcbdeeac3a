package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"strings"
	"time"
)

// record is what the state directory keeps.
type record struct {
	ID             string `json:"id"`
	TrustDomain    string `json:"trustDomain,omitempty"`
	CAPEM          string `json:"caPem,omitempty"`
	CertificatePEM string `json:"certificatePem,omitempty"`
	PrivateKey     []byte `json:"privateKey,omitempty"` // PKCS #8, of the certificate
	// PendingKey is the key of an enrolment under way. It is kept from before
	// the token is sent until the certificate is there, since a token whose
	// answer was lost is taken again only with the same key.
	PendingKey []byte `json:"pendingKey,omitempty"` // PKCS #8
	// EnrolledWith is the SHA-256 of the join token that the certificate came
	// with. A token file that still holds it says nothing new.
	EnrolledWith []byte `json:"enrolledWith,omitempty"`
}

func parseRecord(data []byte) (record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		// The decoder's error may quote the key.
		return record{}, fmt.Errorf("%w: it is not a record of this edge's format", ErrRecord)
	}
	return r, nil
}

// held is an identity ready for use. Immutable.
type held struct {
	certificate tls.Certificate
	roots       *x509.CertPool
	rootHashes  map[[sha256.Size]byte]bool
	trustDomain string
	renewAt     time.Time
}

func (h *held) hasRoot(pin [sha256.Size]byte) bool { return h.rootHashes[pin] }

// expired is nil or ErrExpired.
func (h *held) expired() error {
	if notAfter := h.certificate.Leaf.NotAfter; !time.Now().Before(notAfter) {
		return fmt.Errorf("%w on %s", ErrExpired, notAfter.Format(time.RFC3339))
	}
	return nil
}

// held checks all but the validity now.
func (r *record) held() (*held, error) {
	certificate, err := parseLeaf(r.CertificatePEM)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	key, err := parseKey(r.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	if !key.PublicKey.Equal(certificate.PublicKey) {
		return nil, fmt.Errorf("%w: the certificate is for another key", ErrRecord)
	}
	h := &held{
		certificate: tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key, Leaf: certificate},
		trustDomain: r.TrustDomain,
		renewAt:     renewalOf(certificate),
	}
	if h.roots, h.rootHashes, err = parseRoots(r.CAPEM); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	want := "spiffe://" + r.TrustDomain + "/edge/" + r.ID
	if len(certificate.URIs) != 1 || certificate.URIs[0].String() != want {
		return nil, fmt.Errorf("%w: the certificate is for %v, not for %s", ErrRecord, certificate.URIs, want)
	}
	_, err = certificate.Verify(x509.VerifyOptions{
		Roots:       h.roots,
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		CurrentTime: certificate.NotAfter, // expired says whether it is valid now
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	return h, nil
}

// renewalOf is half of the certificate's life and a little more, at random, so
// that edges that enrolled together don't renew together.
func renewalOf(certificate *x509.Certificate) time.Time {
	life := certificate.NotAfter.Sub(certificate.NotBefore)
	return certificate.NotBefore.Add(life/2 + mathrand.N(life/10+1))
}

func parseLeaf(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("there is no certificate in PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}

func parseRoots(text string) (*x509.CertPool, map[[sha256.Size]byte]bool, error) {
	roots, hashes := x509.NewCertPool(), map[[sha256.Size]byte]bool{}
	for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, err
		}
		if !certificate.IsCA {
			return nil, nil, errors.New("a root is not a certificate authority")
		}
		roots.AddCert(certificate)
		hashes[sha256.Sum256(certificate.Raw)] = true
	}
	if len(hashes) == 0 {
		return nil, nil, errors.New("there are no roots in PEM")
	}
	return roots, hashes, nil
}

func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	return key, der, err
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("malformed private key")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("the private key is of an unexpected kind")
	}
	return key, nil
}

func newRequest(key crypto.Signer) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// verifyServer accepts only a chain to roots whose leaf is a control plane of
// trustDomain ("": of any).
func verifyServer(chain []*x509.Certificate, roots *x509.CertPool, trustDomain string) error {
	if len(chain) == 0 {
		return errors.New("the server sent no certificate")
	}
	intermediates := x509.NewCertPool()
	for _, certificate := range chain[1:] {
		intermediates.AddCert(certificate)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return fmt.Errorf("the server's certificate: %w", err)
	}
	uris := chain[0].URIs
	if len(uris) == 1 && trustDomain == "" {
		trustDomain = uris[0].Host
	}
	if want := "spiffe://" + trustDomain + "/controlplane"; len(uris) != 1 || uris[0].String() != want {
		return fmt.Errorf("the server's certificate is for %v, not for %s", uris, want)
	}
	return nil
}

// verifyOperator accepts viewers, operators and administrators. The chain was
// verified before.
func verifyOperator(certificate *x509.Certificate, trustDomain string) error {
	if len(certificate.URIs) == 1 && trustDomain != "" {
		path, ok := strings.CutPrefix(certificate.URIs[0].String(), "spiffe://"+trustDomain+"/")
		role, _, named := strings.Cut(path, "/")
		if ok && named && (role == "viewer" || role == "operator" || role == "admin") {
			return nil
		}
	}
	return fmt.Errorf("%v may not see this page: it needs the role viewer, operator or admin", certificate.URIs)
}
