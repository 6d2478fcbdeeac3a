package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestEnrolOverTLS(t *testing.T) {
	p := newPlane(t)
	log := &logs{}
	cfg := testConfig(t, p, p.serve(t, nil))
	cfg.Logger = newLogger(log)
	i := New(cfg)
	ensure(t, i)
	if i.TrustDomain() != "reseal" || time.Until(i.NotAfter()) < 23*time.Hour {
		t.Errorf("trust domain %q, until %s", i.TrustDomain(), i.NotAfter())
	}
	if err := os.Remove(cfg.TokenFile); err != nil {
		t.Fatal(err)
	}
	again := New(cfg)
	ensure(t, again)
	if p.calls != 1 {
		t.Errorf("%d calls", p.calls)
	}
	if again.NotAfter() != i.NotAfter() {
		t.Error("another certificate")
	}
	if strings.Contains(log.String(), "secret1") || !strings.Contains(log.String(), "enrolled") {
		t.Errorf("log: %s", log)
	}
}

func TestBareToken(t *testing.T) {
	p := newPlane(t)
	cfg := testConfig(t, p, p.serve(t, nil))
	writeToken(t, cfg.TokenFile, "id1.secret1")
	wantError(t, New(cfg).Ensure(t.Context()), ErrToken, "--ca-hash")
	cfg.CAHash = strings.ToUpper(p.hash())
	ensure(t, New(cfg))
	if len(p.tokens) != 1 || p.tokens[0] != "id1.secret1" {
		t.Errorf("sent %q", p.tokens)
	}
}

// The token is sent only to the control plane that it names.
func TestPin(t *testing.T) {
	p, other := newPlane(t), newPlane(t)
	edge := p.certificate("/edge/e2", time.Hour)
	edge.Certificate = append(edge.Certificate, p.ca.Raw)
	bare := p.certificate("/controlplane", time.Hour)
	foreign := other.certificate("/controlplane", time.Hour)
	foreign.Certificate = append(foreign.Certificate, p.ca.Raw) // not its own
	both := p.certificate("/controlplane", time.Hour)
	both.Certificate = append(both.Certificate, other.ca.Raw, p.ca.Raw)
	for name, c := range map[string]struct {
		address string
		fails   bool
	}{
		"another authority":         {other.serve(t, nil), true},
		"an edge as server":         {p.serve(t, &edge), true},
		"no authority in the chain": {p.serve(t, &bare), true},
		"authority did not sign":    {p.serve(t, &foreign), true},
		"two authorities":           {p.serve(t, &both), false},
	} {
		t.Run(name, func(t *testing.T) {
			p.calls, other.calls = 0, 0
			err := New(testConfig(t, p, c.address)).Ensure(t.Context())
			if !c.fails {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantError(t, err, ErrPin)
			if p.calls+other.calls != 0 {
				t.Error("the token was sent")
			}
		})
	}
}

func TestTrustDomainIsChecked(t *testing.T) {
	p := newPlane(t)
	p.trustDomain = "elsewhere"
	address := p.serve(t, nil)
	cfg := testConfig(t, p, address)
	cfg.TrustDomain = "reseal"
	wantError(t, New(cfg).Ensure(t.Context()), ErrPin, "spiffe://reseal/controlplane")
	cfg.TrustDomain = "elsewhere"
	ensure(t, New(cfg))
	cfg.TrustDomain = ""
	ensure(t, New(cfg))
	cfg.TrustDomain = "reseal"
	wantError(t, New(cfg).Ensure(t.Context()), ErrMismatch, "--trust-domain")
}

func TestRefusedToken(t *testing.T) {
	p := newPlane(t)
	p.fail = func(int) error { return status.Error(codes.PermissionDenied, "no") }
	err := New(testConfig(t, p, p.serve(t, nil))).Ensure(t.Context())
	wantError(t, err, ErrRefused, "unknown, used or expired", "resealctl token create --id e1")
	if p.calls != 1 || strings.Contains(err.Error(), "secret1") {
		t.Errorf("%d calls, %v", p.calls, err)
	}
	p.fail = func(int) error { return status.Error(codes.InvalidArgument, `the token is for edge "e2"`) }
	wantError(t, New(testConfig(t, p, p.serve(t, nil))).Ensure(t.Context()), ErrRefused, `for edge "e2"`)
}

func TestOtherReplicasAreTried(t *testing.T) {
	p, other := newPlane(t), newPlane(t)
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	good, foreign := p.serve(t, nil), other.serve(t, nil)
	for range 5 { // the start is random
		ensure(t, New(testConfig(t, p, dead.Addr().String(), foreign, good)))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	err = New(testConfig(t, p, dead.Addr().String(), foreign)).Ensure(ctx)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one dead, one foreign: %v", err)
	}
}

func TestUnreachableControlPlane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.fail = func(call int) error {
			if call <= 40 {
				return status.Error(codes.Unavailable, "down")
			}
			return nil
		}
		start := time.Now()
		ensure(t, newDirect(t, p, testConfig(t, p)))
		if p.calls != 41 {
			t.Errorf("%d calls", p.calls)
		}
		if took := time.Since(start); took > 41*maxDelay || took < 30*maxDelay/2 {
			t.Errorf("41 calls in %s", took)
		}
	})
}

func TestEnsureEndsWithContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.fail = func(int) error { return status.Error(codes.Unavailable, "down") }
		i := newDirect(t, p, testConfig(t, p))
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := i.Ensure(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v", err)
		}
		if p.calls > 1000 || p.calls < 300 {
			t.Errorf("%d calls in an hour", p.calls)
		}
		if err := i.Run(t.Context()); !errors.Is(err, ErrNotEnrolled) {
			t.Errorf("Run: %v", err)
		}
	})
}

// An enrolment whose answer was lost goes on with the same key, even after a
// restart.
func TestSameKeyAfterALostAnswer(t *testing.T) {
	p := newPlane(t)
	p.lose = true
	cfg := testConfig(t, p)
	ensure(t, newDirect(t, p, cfg))
	if len(p.keys) != 2 || p.keys[0] != p.keys[1] {
		t.Errorf("keys %v", p.keys)
	}

	p.keys, p.lose, cfg.State = nil, true, &memory{}
	p.fail = func(call int) error {
		if call > 3 {
			return status.Error(codes.Unavailable, "down")
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := newDirect(t, p, cfg).Ensure(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	p.fail = nil
	ensure(t, newDirect(t, p, cfg))
	if len(p.keys) != 2 || p.keys[0] != p.keys[1] {
		t.Errorf("after a restart: keys %v", p.keys)
	}
}

func TestUnusableAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		edit  func(*plane) func(*resealv1.EnrollResponse)
		want  error
		words string
	}{
		"other key": {func(p *plane) func(*resealv1.EnrollResponse) {
			return func(r *resealv1.EnrollResponse) {
				r.CertificatePem = toPEM(p.sign("/edge/e1", ecKey(p.t).Public(), time.Hour, nil))
			}
		}, ErrRecord, "another key"},
		"no certificate": {func(*plane) func(*resealv1.EnrollResponse) {
			return func(r *resealv1.EnrollResponse) { r.CertificatePem = "" }
		}, ErrRecord, "PEM"},
		"no roots": {func(*plane) func(*resealv1.EnrollResponse) {
			return func(r *resealv1.EnrollResponse) { r.CaPem = "" }
		}, ErrRecord, "roots"},
		"a leaf as root": {func(*plane) func(*resealv1.EnrollResponse) {
			return func(r *resealv1.EnrollResponse) { r.CaPem = r.CertificatePem }
		}, ErrRecord, "authority"},
		"other roots": {func(p *plane) func(*resealv1.EnrollResponse) {
			return func(r *resealv1.EnrollResponse) { r.CaPem = toPEM(newPlane(p.t).ca.Raw) }
		}, ErrRecord, "x509"},
		"other trust domain": {func(*plane) func(*resealv1.EnrollResponse) {
			return func(r *resealv1.EnrollResponse) { r.TrustDomain = "elsewhere" }
		}, ErrRecord, "elsewhere"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlane(t)
			p.edit = c.edit(p)
			i := newDirect(t, p, testConfig(t, p))
			wantError(t, i.Ensure(t.Context()), c.want, c.words)
			if !i.NotAfter().IsZero() {
				t.Error("it is used all the same")
			}
		})
	}
	for name, edit := range map[string]func(*x509.Certificate){
		"other edge": func(c *x509.Certificate) { c.URIs[0].Path = "/edge/e2" },
		"two URIs":   func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) },
		"no client":  func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlane(t)
			p.issue = edit
			wantError(t, newDirect(t, p, testConfig(t, p)).Ensure(t.Context()), ErrRecord)
		})
	}
}

func TestTokenFile(t *testing.T) {
	p := newPlane(t)
	cfg := testConfig(t, p)
	for name, c := range map[string]struct {
		text  string
		hash  string
		words string
	}{
		"empty":            {"", "", "0 bytes"},
		"one part":         {"abc", "", "<ca-hash>"},
		"four parts":       {p.token("1") + ".x", "", "<ca-hash>"},
		"short hash":       {"abcd.id.secretX", "", "64 hex digits"},
		"no hash":          {".id.secretX", "", "64 hex digits"},
		"two lines":        {p.token("1") + "\n" + p.token("2"), "", "one line"},
		"binary":           {"a.b.\x00secretX", "", "one line"},
		"other hash":       {p.token("1"), newPlane(t).hash(), "another authority"},
		"malformed --hash": {p.token("1"), "xyz", "--ca-hash"},
		"long":             {strings.Repeat("a", 5000), "", "bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			writeToken(t, cfg.TokenFile, c.text)
			mine := cfg
			mine.CAHash = c.hash
			err := newDirect(t, p, mine).Ensure(t.Context())
			wantError(t, err, ErrToken, c.words)
			if strings.Contains(err.Error(), "secretX") || strings.Contains(err.Error(), "secret1") {
				t.Errorf("the error quotes the token: %v", err)
			}
		})
	}
	if err := os.Remove(cfg.TokenFile); err != nil {
		t.Fatal(err)
	}
	wantError(t, newDirect(t, p, cfg).Ensure(t.Context()), ErrNoToken, cfg.TokenFile, "resealctl token create --id e1")
	cfg.TokenFile = ""
	wantError(t, newDirect(t, p, cfg).Ensure(t.Context()), ErrNoToken, "--join-token-file")
	cfg.TokenFile = filepath.Join(t.TempDir())
	if err := newDirect(t, p, cfg).Ensure(t.Context()); err == nil || errors.Is(err, ErrNoToken) {
		t.Errorf("a folder as token: %v", err)
	}
	if p.calls != 0 {
		t.Errorf("%d calls", p.calls)
	}
}

func TestStateCanNotBeWritten(t *testing.T) {
	p := newPlane(t)
	cfg := testConfig(t, p)
	full := errors.New("disk full")
	cfg.State = &memory{fail: full}
	wantError(t, newDirect(t, p, cfg).Ensure(t.Context()), full, "state directory")
	if p.calls != 0 {
		t.Error("the token was spent on a key that can't be kept")
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add([]byte(strings.Repeat("ab", 32)+".id.secret\n"), "")
	f.Add([]byte("id.secret"), strings.Repeat("AB", 32))
	f.Add([]byte(".."), "sha256:")
	f.Fuzz(func(t *testing.T, text []byte, hash string) {
		token, err := parseToken(text, hash)
		if err != nil {
			if !errors.Is(err, ErrToken) {
				t.Fatalf("error %v", err)
			}
			return
		}
		if again, err := parseToken([]byte(token.text), hash); err != nil || again != token {
			t.Fatalf("%q does not come back: %v", token.text, err)
		}
	})
}
