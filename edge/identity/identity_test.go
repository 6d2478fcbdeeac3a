package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestLoad(t *testing.T) {
	p := newPlane(t)
	cfg := testConfig(t, p)
	wantError(t, newDirect(t, p, cfg).Load(t.Context()), ErrNotEnrolled)
	ensure(t, newDirect(t, p, cfg))
	i := newDirect(t, p, cfg)
	if err := i.Load(t.Context()); err != nil || i.TrustDomain() != "reseal" {
		t.Errorf("%v, %q", err, i.TrustDomain())
	}
	other := cfg
	other.ID = "e2"
	wantError(t, newDirect(t, p, other).Ensure(t.Context()), ErrMismatch, `"e1"`, `"e2"`, "--state-dir")
	other = cfg
	other.TrustDomain = "elsewhere"
	wantError(t, newDirect(t, p, other).Load(t.Context()), ErrMismatch, `"elsewhere"`)
	if p.calls != 1 {
		t.Errorf("%d calls", p.calls)
	}
}

func TestBadConfig(t *testing.T) {
	p := newPlane(t)
	cfg := testConfig(t, p, "x:1")
	for _, id := range []string{"", ".", "..", "a/b", "ä", "a b", strings.Repeat("a", 64)} {
		cfg.ID = id
		if err := New(cfg).Load(t.Context()); err == nil || !strings.Contains(err.Error(), "--id") {
			t.Errorf("%q: %v", id, err)
		}
	}
	cfg = testConfig(t, p)
	if err := New(cfg).Load(t.Context()); err == nil || !strings.Contains(err.Error(), "--control-plane") {
		t.Errorf("no address: %v", err)
	}
}

func TestUnusableRecords(t *testing.T) {
	p := newPlane(t)
	cfg := testConfig(t, p)
	state := cfg.State.(*memory)
	ensure(t, newDirect(t, p, cfg))
	good := state.files[stateName]
	_, otherKey, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*record){
		"no key":         func(r *record) { r.PrivateKey = nil },
		"other key":      func(r *record) { r.PrivateKey = otherKey },
		"no certificate": func(r *record) { r.CertificatePEM = "x" },
		"no roots":       func(r *record) { r.CAPEM = "" },
		"other roots":    func(r *record) { r.CAPEM = toPEM(newPlane(t).ca.Raw) },
		"other domain":   func(r *record) { r.TrustDomain = "elsewhere" },
	} {
		t.Run(name, func(t *testing.T) {
			r, err := parseRecord(good)
			if err != nil {
				t.Fatal(err)
			}
			edit(&r)
			if state.files[stateName], err = json.Marshal(r); err != nil {
				t.Fatal(err)
			}
			wantError(t, newDirect(t, p, cfg).Ensure(t.Context()), ErrRecord)
		})
	}
	state.files[stateName] = []byte(`{"privateKey":"secret`)
	err = newDirect(t, p, cfg).Ensure(t.Context())
	wantError(t, err, ErrRecord)
	if strings.Contains(err.Error(), "secret") {
		t.Error("the error quotes the record")
	}
	damaged := errors.New("damaged state file /x/identity")
	cfg.State = failing{damaged}
	wantError(t, newDirect(t, p, cfg).Ensure(t.Context()), damaged)
}

type failing struct{ err error }

func (f failing) Read(string) ([]byte, error) { return nil, f.err }
func (f failing) Write(string, []byte) error  { return f.err }

func TestExpiredCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		cfg := testConfig(t, p)
		ensure(t, newDirect(t, p, cfg))
		time.Sleep(25 * time.Hour)
		i := newDirect(t, p, cfg)
		wantError(t, i.Load(t.Context()), ErrExpired)
		if i.NotAfter().IsZero() {
			t.Error("an expired identity is not held, so Run could not replace it")
		}
		// The token that it came with says nothing new.
		wantError(t, newDirect(t, p, cfg).Ensure(t.Context()), ErrExpired, cfg.TokenFile, "resealctl token create --id e1")
		if p.calls != 1 {
			t.Errorf("%d calls", p.calls)
		}
		if err := os.Remove(cfg.TokenFile); err != nil {
			t.Fatal(err)
		}
		wantError(t, newDirect(t, p, cfg).Ensure(t.Context()), ErrExpired, "resealctl token create --id e1")
		writeToken(t, cfg.TokenFile, p.token("2"))
		ensure(t, newDirect(t, p, cfg))
		if p.calls != 2 || p.keys[0] == p.keys[1] {
			t.Errorf("%d calls, keys %v", p.calls, p.keys)
		}
	})
}

// A new token of another control plane moves the edge; the old token file left
// where it was does not.
func TestMoveToAnotherControlPlane(t *testing.T) {
	first, second := newPlane(t), newPlane(t)
	cfg := testConfig(t, first)
	ensure(t, newDirect(t, first, cfg))
	writeToken(t, cfg.TokenFile, second.token("2"))
	i := newDirect(t, second, cfg)
	ensure(t, i)
	if second.calls != 1 || !i.current.Load().certificate.Leaf.NotAfter.After(time.Now()) {
		t.Errorf("%d calls", second.calls)
	}
	writeToken(t, cfg.TokenFile, second.token("3"))
	ensure(t, newDirect(t, second, cfg))
	if second.calls != 1 {
		t.Error("a token of the same control plane was used without need")
	}
}

func TestClientTLS(t *testing.T) {
	p := newPlane(t)
	address := p.serve(t, nil)
	i := New(testConfig(t, p, address))
	config := i.ClientTLS() // made before there is a certificate
	if _, err := tls.Dial("tcp", address, config); !errors.Is(err, ErrNotEnrolled) {
		t.Errorf("before: %v", err)
	}
	ensure(t, i)
	renew := func(address string) error {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		request, err := newRequest(ecKey(t))
		if err != nil {
			t.Fatal(err)
		}
		_, err = resealv1.NewEnrollmentServiceClient(conn).Renew(t.Context(), &resealv1.RenewRequest{CertificateRequest: request})
		return err
	}
	if err := renew(address); err != nil {
		t.Fatal(err)
	}
	if len(p.peers) != 1 || p.peers[0] != "spiffe://reseal/edge/e1" {
		t.Errorf("the server saw %v", p.peers)
	}

	edge := p.certificate("/edge/e2", time.Hour)
	expired := p.certificate("/controlplane", -time.Minute)
	noServer := p.certificate("/controlplane", time.Hour)
	noServer.Certificate[0] = p.sign("/controlplane", publicOf(noServer), time.Hour, func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	})
	twoURIs := p.certificate("/controlplane", time.Hour)
	twoURIs.Certificate[0] = p.sign("/controlplane", publicOf(twoURIs), time.Hour, func(c *x509.Certificate) {
		c.URIs = append(c.URIs, c.URIs[0])
	})
	for name, bad := range map[string]string{
		"an edge":           p.serve(t, &edge),
		"expired":           p.serve(t, &expired),
		"not for servers":   p.serve(t, &noServer),
		"two URIs":          p.serve(t, &twoURIs),
		"another authority": newPlane(t).serve(t, nil),
	} {
		if err := renew(bad); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
	if p.calls != 2 {
		t.Errorf("%d calls arrived", p.calls)
	}
}

func publicOf(c tls.Certificate) any {
	return c.PrivateKey.(*ecdsa.PrivateKey).Public()
}

func TestServerTLS(t *testing.T) {
	p := newPlane(t)
	i := newDirect(t, p, testConfig(t, p))
	if config := i.ServerTLS(); config.ClientCAs == nil {
		t.Error("the system's roots would be trusted")
	} else if _, err := config.GetCertificate(nil); !errors.Is(err, ErrNotEnrolled) {
		t.Errorf("before: %v", err)
	}
	ensure(t, i)
	for path, admitted := range map[string]bool{
		"/viewer/v": true, "/operator/o": true, "/admin/a": true,
		"/edge/e1": false, "/controlplane": false, "/viewer": false, "/root/x": false,
	} {
		if err := visit(t, i.ServerTLS(), p.certificate(path, time.Hour)); (err == nil) != admitted {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := visit(t, i.ServerTLS(), newPlane(t).certificate("/admin/a", time.Hour)); err == nil {
		t.Error("another authority was admitted")
	}
	if err := visit(t, i.ServerTLS(), tls.Certificate{}); err == nil {
		t.Error("no certificate was admitted")
	}
}

// visit makes one handshake and returns the server's opinion.
func visit(t *testing.T, config *tls.Config, certificate tls.Certificate) error {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	client := tls.Client(near, &tls.Config{
		InsecureSkipVerify:   true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil },
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, client)
	}()
	server := tls.Server(far, config)
	err := server.HandshakeContext(t.Context())
	_ = far.Close()
	<-done
	return err
}

func TestLoadWhileBusy(t *testing.T) {
	p := newPlane(t)
	i := newDirect(t, p, testConfig(t, p))
	if err := i.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := i.Load(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := i.Ensure(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"id":"e1","caPem":"x","certificatePem":"y","privateKey":"AAAA"}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseRecord(data)
		if err != nil {
			return
		}
		if h, err := r.held(); err == nil && h.certificate.Leaf == nil {
			t.Fatal("held without certificate")
		}
	})
}
