package trust

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func TestOpenTwice(t *testing.T) {
	cfg := testConfig(t)
	first := openTrust(t, cfg)
	second := openTrust(t, cfg)
	if !first.Created() || second.Created() {
		t.Errorf("created: %v, %v", first.Created(), second.Created())
	}
	if first.CAHash() != second.CAHash() || len(first.CAHash()) != 64 {
		t.Errorf("hashes %q, %q", first.CAHash(), second.CAHash())
	}
	ca := parsePEM(t, string(first.CAPEM()))
	if sum := sha256.Sum256(ca.Raw); hex.EncodeToString(sum[:]) != first.CAHash() {
		t.Error("the hash is not that of the DER")
	}
	if life := ca.NotAfter.Sub(ca.NotBefore); life < 9*365*24*time.Hour || !ca.IsCA {
		t.Errorf("authority: lives %s, CA %v", life, ca.IsCA)
	}
	info, err := os.Stat(cfg.KEKFile)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("KEK file has mode %o", info.Mode().Perm())
	}
	sealed, err := first.Seal([]byte("x"), []byte("context"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := second.Unseal(sealed, []byte("context")); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestReplicasRaceToOpen(t *testing.T) {
	cfg := testConfig(t)
	trusts := make([]*Trust, 8)
	var group sync.WaitGroup
	for i := range trusts {
		trusts[i] = New(cfg)
		group.Go(func() {
			if err := trusts[i].Open(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	created := 0
	for _, trust := range trusts {
		if trust.CAHash() == "" || trust.CAHash() != trusts[0].CAHash() {
			t.Errorf("hash %q, want %q", trust.CAHash(), trusts[0].CAHash())
		}
		if trust.Created() {
			created++
		}
	}
	if created != 1 {
		t.Errorf("%d replicas created the authority", created)
	}
}

func TestReplicasRaceWithKEKsOfTheirOwn(t *testing.T) {
	cfg := testConfig(t)
	dir := t.TempDir()
	errs := make([]error, 4)
	var group sync.WaitGroup
	for i := range errs {
		mine := cfg
		mine.KEKFile = filepath.Join(dir, string(rune('a'+i)))
		group.Go(func() { errs[i] = New(mine).Open(t.Context()) })
	}
	group.Wait()
	opened := 0
	for i, err := range errs {
		_, statErr := os.Stat(filepath.Join(dir, string(rune('a'+i))))
		switch {
		case err == nil && statErr == nil:
			opened++
		case errors.Is(err, ErrKEK) && errors.Is(statErr, fs.ErrNotExist):
		default:
			t.Errorf("replica %d: %v, its file: %v", i, err, statErr)
		}
	}
	if opened != 1 {
		t.Errorf("%d replicas opened", opened)
	}
}

func storeContent(t *testing.T, cfg Config) map[string][]byte {
	t.Helper()
	answer, err := cfg.Client.Get(t.Context(), cfg.Prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	content := map[string][]byte{}
	for _, kv := range answer.Kvs {
		content[string(kv.Key)] = kv.Value
	}
	return content
}

func TestBadKEK(t *testing.T) {
	other := bytes.Repeat([]byte{9}, keySize)
	cases := map[string]struct {
		text  []byte // nil: no file
		words string
	}{
		"missing":      {nil, "does not exist"},
		"other raw":    {other, "--kek-file"},
		"other base64": {[]byte(base64.StdEncoding.EncodeToString(other)), "--kek-file"},
		"empty":        {[]byte{}, "32 bytes"},
		"short":        {[]byte("c2hvcnQ="), "32 bytes"},
		"garbage":      {[]byte("not a key at all!"), "32 bytes"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t)
			hash := openTrust(t, cfg).CAHash()
			before := storeContent(t, cfg)
			right, err := os.ReadFile(cfg.KEKFile)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(cfg.KEKFile); err != nil {
				t.Fatal(err)
			}
			if c.text != nil {
				if err := os.WriteFile(cfg.KEKFile, c.text, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			trust := New(cfg)
			err = trust.Open(t.Context())
			if !errors.Is(err, ErrKEK) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), cfg.KEKFile) {
				t.Fatalf("error is %v", err)
			}
			if len(c.text) > 0 && strings.Contains(err.Error(), string(c.text)) {
				t.Error("the error quotes the key")
			}
			if trust.CAHash() != "" || trust.Created() {
				t.Error("it opened all the same")
			}
			if text, _ := os.ReadFile(cfg.KEKFile); !bytes.Equal(text, c.text) {
				t.Errorf("the file was changed to %q", text)
			}
			after := storeContent(t, cfg)
			for key, value := range before {
				if !bytes.Equal(after[key], value) {
					t.Errorf("%s was changed", key)
				}
			}
			if err := os.WriteFile(cfg.KEKFile, right, 0o600); err != nil {
				t.Fatal(err)
			}
			if again := openTrust(t, cfg); again.CAHash() != hash {
				t.Error("another authority with the right key")
			}
		})
	}
}

func TestGivenKEK(t *testing.T) {
	cfg := testConfig(t)
	kek := bytes.Repeat([]byte{5}, keySize)
	if err := os.WriteFile(cfg.KEKFile, kek, 0o600); err != nil {
		t.Fatal(err)
	}
	openTrust(t, cfg)
	if got, err := os.ReadFile(cfg.KEKFile); err != nil || !bytes.Equal(got, kek) {
		t.Errorf("%x, %v", got, err)
	}
	// The same key, written otherwise.
	if err := os.WriteFile(cfg.KEKFile, []byte(base64.StdEncoding.EncodeToString(kek)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if openTrust(t, cfg).Created() {
		t.Error("a new authority")
	}
	cfg.KEKFile = ""
	if err := New(cfg).Open(t.Context()); !errors.Is(err, ErrKEK) {
		t.Errorf("no file: %v", err)
	}
}

func TestTrustDomain(t *testing.T) {
	cfg := testConfig(t)
	openTrust(t, cfg)
	cfg.TrustDomain = "other"
	if err := New(cfg).Open(t.Context()); err == nil || !strings.Contains(err.Error(), "--trust-domain") {
		t.Errorf("another trust domain: %v", err)
	}
	for _, bad := range []string{"UPPER", "a b", "a/b", "ä", strings.Repeat("a", 256)} {
		cfg.TrustDomain = bad
		if err := New(cfg).Open(t.Context()); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestDamagedAuthority(t *testing.T) {
	cfg := testConfig(t)
	trust := openTrust(t, cfg)
	e := trust.opened.Load().envelope
	seal := func(text string) string {
		sealed, err := e.seal([]byte(text), []byte(authorityKey))
		if err != nil {
			t.Fatal(err)
		}
		return string(sealed)
	}
	moved := string(storeContent(t, cfg)[cfg.Prefix+checkKey])
	for name, value := range map[string]string{
		"empty": "", "text": "x", "moved": moved, "not JSON": seal("x"), "no key": seal(`{}`),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := cfg.Client.Put(t.Context(), cfg.Prefix+authorityKey, value); err != nil {
				t.Fatal(err)
			}
			if err := New(cfg).Open(t.Context()); err == nil {
				t.Error("no error")
			}
			if got := storeContent(t, cfg)[cfg.Prefix+authorityKey]; string(got) != value {
				t.Error("it was overwritten")
			}
		})
	}
}

func TestStoreFailsDuringOpen(t *testing.T) {
	for name, arm := range map[string]func(*faulty){
		"without effect":      func(f *faulty) { f.before.Store(3) },
		"after taking effect": func(f *faulty) { f.after.Store(2) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t)
			faults := &faulty{KV: cfg.Client.KV}
			cfg.Client.KV = faults
			arm(faults)
			trust := openTrust(t, cfg)
			if !trust.Created() {
				t.Error("it does not know that it made the authority")
			}
			again := openTrust(t, cfg)
			if again.CAHash() != trust.CAHash() || again.Created() {
				t.Error("another authority")
			}
		})
	}
}

func TestStoreUnreachable(t *testing.T) {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix:///nowhere/socket"}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	kek := filepath.Join(t.TempDir(), "kek")
	err = New(Config{Client: client, KEKFile: kek}).Open(ctx)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(kek); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a KEK was made without knowing the store: %v", err)
	}
}

func TestBeforeOpen(t *testing.T) {
	trust := New(Config{})
	if trust.CAPEM() != nil || trust.CAHash() != "" || trust.Created() {
		t.Error("something before Open")
	}
	if err := trust.Run(t.Context()); !errors.Is(err, ErrNotOpen) {
		t.Error(err)
	}
	config := trust.ServerTLS()
	if config.ClientCAs == nil {
		t.Error("the system's roots would be trusted")
	}
	if _, err := config.GetCertificate(&tls.ClientHelloInfo{}); !errors.Is(err, ErrNotOpen) {
		t.Error(err)
	}
}

func TestServerCertificateRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		authority, err := newAuthority("reseal")
		if err != nil {
			t.Fatal(err)
		}
		trust := New(Config{})
		trust.opened.Store(&opened{authority: authority})
		if err := trust.renewServer(); err != nil {
			t.Fatal(err)
		}
		config := trust.ServerTLS()
		served := func() *tls.Certificate {
			certificate, err := config.GetCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			return certificate
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- trust.renew(ctx) }()
		keys := map[string]bool{}
		for range 5 {
			synctest.Wait()
			certificate := served()
			if left := time.Until(certificate.Leaf.NotAfter); left < 11*time.Hour || left > 24*time.Hour {
				t.Errorf("%s left", left)
			}
			keys[certificate.PrivateKey.(*ecdsa.PrivateKey).X.String()] = true
			time.Sleep(12 * time.Hour)
		}
		if len(keys) != 5 {
			t.Errorf("%d keys in 5 half lives", len(keys))
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestAuthorityExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		authority, err := newAuthority("reseal")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(authorityTTL - time.Hour)
		certificate, err := authority.issue(leaf{uri: New(Config{}).uri("edge/e"), publicKey: newKey(t).Public(), ttl: 24 * time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		if certificate.NotAfter.After(authority.certificate.NotAfter) {
			t.Error("a certificate outlives its authority")
		}
		time.Sleep(2 * time.Hour)
		if err := authority.check("reseal"); err == nil {
			t.Error("an expired authority is accepted")
		}
	})
}

func TestServerCertificate(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	certificate := trust.server.Load()
	if len(certificate.Certificate) != 2 || !bytes.Equal(certificate.Certificate[1], trust.opened.Load().authority.certificate.Raw) {
		t.Error("the chain does not end with the authority")
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(trust.CAPEM())
		if _, err := certificate.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("usage %d: %v", usage, err)
		}
	}
	if uri := certificate.Leaf.URIs[0].String(); uri != "spiffe://reseal/controlplane" {
		t.Errorf("it is for %s", uri)
	}
}
