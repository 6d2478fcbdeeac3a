package session

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// link is a certificate that may issue others.
type link struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// sign issues a certificate; of its own when l is nil.
func (l *link) sign(t *testing.T, template *x509.Certificate) *link {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	template.BasicConstraintsValid = true
	parent, signer := template, key
	if l != nil {
		parent, signer = l.cert, l.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &link{cert, key}
}

func authorityTemplate(name string) *x509.Certificate {
	return &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
}

func leafTemplate(name string, usage x509.ExtKeyUsage) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
}

// TestSessionIDsOfManyServers resumes by session ID whatever else a handshake
// holds: chains with intermediates, client certificates, no extended master
// secret (RFC 7627).
func TestSessionIDsOfManyServers(t *testing.T) {
	root := (*link)(nil).sign(t, authorityTemplate("root"))
	middle := root.sign(t, authorityTemplate("middle"))
	server := middle.sign(t, leafTemplate("example.test", x509.ExtKeyUsageServerAuth))
	client := root.sign(t, leafTemplate("client.test", x509.ExtKeyUsageClientAuth))
	roots := x509.NewCertPool()
	roots.AddCert(root.cert)
	chain := tls.Certificate{Certificate: [][]byte{server.cert.Raw, middle.cert.Raw}, PrivateKey: server.key}
	dir := t.TempDir()
	rootFile, legacy := filepath.Join(dir, "root.pem"), filepath.Join(dir, "legacy.cnf")
	for file, text := range map[string]string{
		rootFile: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.cert.Raw})),
		legacy:   "openssl_conf=a\n[a]\nssl_conf=b\n[b]\nsystem_default=c\n[c]\nOptions=-ExtendedMasterSecret\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mutual := []string{"-Verify", "2", "-verify_return_error", "-CAfile", rootFile}
	tests := []struct {
		name        string
		environment []string
		args        []string
		extended    bool
	}{
		{"intermediate", nil, nil, true},
		{"client certificate", nil, mutual, true},
		{"no extended master secret", []string{"OPENSSL_CONF=" + legacy}, nil, false},
		{"all of it", []string{"OPENSSL_CONF=" + legacy}, mutual, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			address := startOpenSSL(t, chain, test.environment, append([]string{"-no_ticket", "-tls1_2"}, test.args...)...)
			store := New(Config{})
			cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
			if test.args != nil {
				cfg.Certificates = []tls.Certificate{{Certificate: [][]byte{client.cert.Raw}, PrivateKey: client.key}}
			}
			for i := range 4 {
				mechanism, miss, err := visit(t, store, address, "a", cfg)
				got, want := fmt.Sprint(mechanism, miss, err), fmt.Sprint(sessionID, resealv1.MissReason(0), nil)
				if i == 0 {
					want = fmt.Sprint(resealv1.Mechanism(0), noSession, nil)
				}
				if got != want {
					t.Fatalf("connection %d: %s, want %s", i, got, want)
				}
			}
			store.mu.Lock()
			defer store.mu.Unlock()
			if held := store.find("a").sessions; len(held) != 1 || held[0].byID.extends != test.extended {
				t.Errorf("sessions %v, extended master secret must be %t", held, test.extended)
			}
		})
	}
}

// TestShortSessionIDs: an ID that crypto/tls can't send is kept when it can be
// offered without.
func TestShortSessionIDs(t *testing.T) {
	certificate, _ := issue(t, time.Now().Add(time.Hour))
	for suite, bare := range map[uint16]bool{
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256: true,
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA:    false,
	} {
		state := tls.ConnectionState{
			Version: tls.VersionTLS12, CipherSuite: suite, PeerCertificates: []*x509.Certificate{certificate.Leaf},
		}
		for size := range maxSessionID + 2 {
			for _, onTop := range []bool{true, false} {
				h := newIDSession(serverHello{sessionID: make([]byte, size)}, state, make([]byte, 48), onTop, time.Now())
				want := size > 0 && size <= maxSessionID && (bare || onTop && size == sessionIDSize)
				if (h != nil) != want {
					t.Errorf("an ID of %d bytes, %s, crypto/tls can offer it %t: kept %t", size, tls.CipherSuiteName(suite), onTop, h != nil)
				}
			}
		}
	}
}
