package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"
)

const (
	authorityTTL = 10 * 365 * 24 * time.Hour
	// A certificate starts a little in the past, for verifiers whose clock is
	// behind.
	maxBackdate = 5 * time.Minute
)

// authority is the certificate authority of one trust domain. Immutable.
type authority struct {
	certificate *x509.Certificate
	key         crypto.Signer
}

// authorityRecord is what is sealed in etcd.
type authorityRecord struct {
	Certificate []byte `json:"certificate"` // DER
	PrivateKey  []byte `json:"privateKey"`  // PKCS #8
}

func newAuthority(trustDomain string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{Organization: []string{"Reseal"}, CommonName: "Reseal CA of " + trustDomain},
		NotBefore:             now.Add(-maxBackdate),
		NotAfter:              now.Add(authorityTTL),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{certificate: certificate, key: key}, nil
}

func (a *authority) marshal() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return nil, err
	}
	return json.Marshal(authorityRecord{Certificate: a.certificate.Raw, PrivateKey: key})
}

func parseAuthority(data []byte) (*authority, error) {
	var record authorityRecord
	if err := json.Unmarshal(data, &record); err != nil {
		return nil, errors.New("its record is malformed") // the JSON error may quote the key
	}
	certificate, err := x509.ParseCertificate(record.Certificate)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(record.PrivateKey)
	if err != nil {
		return nil, errors.New("its key is malformed")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(certificate.PublicKey) {
		return nil, errors.New("its key does not belong to its certificate")
	}
	return &authority{certificate: certificate, key: key}, nil
}

// check says whether the authority can serve trustDomain now.
func (a *authority) check(trustDomain string) error {
	if len(a.certificate.URIs) != 1 || a.certificate.URIs[0].String() != "spiffe://"+trustDomain {
		return fmt.Errorf("it was made for %v, but --trust-domain is %q", a.certificate.URIs, trustDomain)
	}
	if now := time.Now(); now.After(a.certificate.NotAfter) || now.Before(a.certificate.NotBefore) {
		return fmt.Errorf("it is valid from %s to %s, and now it is %s", a.certificate.NotBefore.Format(time.RFC3339),
			a.certificate.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	return nil
}

// leaf is a certificate to be issued.
type leaf struct {
	uri       *url.URL
	publicKey crypto.PublicKey
	ttl       time.Duration
	usages    []x509.ExtKeyUsage
	enrolment string // of edges: the id of the join token; of users: one of their own
}

func (a *authority) issue(l leaf) (*x509.Certificate, error) {
	now := time.Now()
	notAfter := now.Add(l.ttl)
	if notAfter.After(a.certificate.NotAfter) {
		notAfter = a.certificate.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{Organization: []string{"Reseal"}, CommonName: l.uri.Path[1:], SerialNumber: l.enrolment},
		NotBefore:             now.Add(-min(maxBackdate, l.ttl/20)),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           l.usages,
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{l.uri},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, l.publicKey, a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func (a *authority) pem() []byte { return certificatePEM(a.certificate.Raw) }

// hash is what a join token pins.
func (a *authority) hash() string {
	sum := sha256.Sum256(a.certificate.Raw)
	return hex.EncodeToString(sum[:])
}

func certificatePEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// newSerial has 128 random bits, within the 20 octets of RFC 5280, 4.1.2.2.
func newSerial() *big.Int {
	bytes := make([]byte, 16)
	_, _ = rand.Read(bytes) // never fails
	bytes[0] |= 1           // not zero
	return new(big.Int).SetBytes(bytes)
}
