package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestVerifyControlPlane(t *testing.T) {
	authority, err := newFakeAuthority()
	if err != nil {
		t.Fatal(err)
	}
	other, err := newFakeAuthority()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority.cert)
	uri := func(text string) *url.URL {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	server := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	good := uri("spiffe://reseal/controlplane")
	hour := time.Now().Add(time.Hour)
	for _, test := range []struct {
		name   string
		signer *fakeAuthority
		cert   x509.Certificate
		ok     bool
	}{
		{"good", authority, x509.Certificate{URIs: []*url.URL{good}, ExtKeyUsage: server, NotAfter: hour}, true},
		{"a DNS name is no obstacle", authority, x509.Certificate{URIs: []*url.URL{good}, DNSNames: []string{"x"}, ExtKeyUsage: server, NotAfter: hour}, true},
		{"other roots", other, x509.Certificate{URIs: []*url.URL{good}, ExtKeyUsage: server, NotAfter: hour}, false},
		{"expired", authority, x509.Certificate{URIs: []*url.URL{good}, ExtKeyUsage: server, NotAfter: time.Now().Add(-time.Minute)}, false},
		{"client certificate", authority, x509.Certificate{URIs: []*url.URL{good}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, NotAfter: hour}, false},
		{"an edge", authority, x509.Certificate{URIs: []*url.URL{uri("spiffe://reseal/edge/controlplane")}, ExtKeyUsage: server, NotAfter: hour}, false},
		{"other domain", authority, x509.Certificate{URIs: []*url.URL{uri("spiffe://reseal.example/controlplane")}, ExtKeyUsage: server, NotAfter: hour}, false},
		{"longer path", authority, x509.Certificate{URIs: []*url.URL{uri("spiffe://reseal/controlplane/x")}, ExtKeyUsage: server, NotAfter: hour}, false},
		{"two URIs", authority, x509.Certificate{URIs: []*url.URL{good, good}, ExtKeyUsage: server, NotAfter: hour}, false},
		{"no URI", authority, x509.Certificate{DNSNames: []string{"controlplane"}, ExtKeyUsage: server, NotAfter: hour}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			test.cert.SerialNumber, test.cert.NotBefore = big.NewInt(3), time.Now().Add(-time.Hour)
			der, err := x509.CreateCertificate(rand.Reader, &test.cert, test.signer.cert, key.Public(), test.signer.key)
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			err = verifyControlPlane(roots, "reseal")(tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}})
			if (err == nil) != test.ok {
				t.Errorf("got %v", err)
			}
		})
	}
	if verifyControlPlane(roots, "reseal")(tls.ConnectionState{}) == nil {
		t.Error("a server without certificate is accepted")
	}
}

func TestCertificateIdentity(t *testing.T) {
	for text, want := range map[string]string{
		"spiffe://reseal/admin/alice":   "admin alice",
		"spiffe://reseal/viewer/v/w":    "viewer v/w",
		"spiffe://reseal/edge/e1":       "edge e1",
		"spiffe://reseal/admin/":        "",
		"spiffe://reseal/admin":         "",
		"spiffe://reseal/root/x":        "",
		"spiffe://reseal//x":            "",
		"https://reseal/admin/alice":    "",
		"spiffe://reseal/unspecified/x": "",
	} {
		uri, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		who, err := certificateIdentity(&x509.Certificate{URIs: []*url.URL{uri}})
		if got := who.String(); (err == nil) != (want != "") || err == nil && got != want {
			t.Errorf("%s: %q, %v; want %q", text, got, err, want)
		}
	}
}

// TestEveryDeedHasAMethod: the table of can-i and the protocol agree.
func TestEveryDeedHasAMethod(t *testing.T) {
	for _, d := range deeds {
		if len(allowedRoles(d.method)) == 0 {
			t.Errorf("%s admits nobody, or does not exist", d.method)
		}
		for _, lower := range []resealv1.Role{resealv1.Role_ROLE_ANONYMOUS, resealv1.Role_ROLE_EDGE} {
			if (identity{role: lower}).mayCall(d.method) {
				t.Errorf("%s may call %s", lower, d.method)
			}
		}
		if !(identity{role: resealv1.Role_ROLE_ADMIN}).mayCall(d.method) {
			t.Errorf("an admin may not call %s", d.method)
		}
	}
	if (identity{role: resealv1.Role_ROLE_ADMIN}).mayCall(resealv1.FeedService_Sync_FullMethodName) {
		t.Error("an admin may speak as an edge")
	}
}

func TestStatusTexts(t *testing.T) {
	authority, err := newFakeAuthority()
	if err != nil {
		t.Fatal(err)
	}
	certPEM, _, err := authority.issue("spiffe://reseal/viewer/vera", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	c := &client{target: &target{name: "local", path: "f", certPEM: certPEM}, dials: newDialLog([]string{"a:1"}), timeout: time.Second}
	c.dials.note("a:1", nil)
	const apply = resealv1.AdminService_Apply_FullMethodName
	for _, test := range []struct {
		method string
		code   codes.Code
		text   string
		want   string
	}{
		{apply, codes.PermissionDenied, "no", `not allowed: AdminService.Apply needs role operator, and context "local" of f is for viewer vera`},
		{resealv1.AdminService_List_FullMethodName, codes.PermissionDenied, "revoked", "not allowed: revoked"},
		{apply, codes.Unauthenticated, "no certificate", `the control plane does not accept the client certificate of context "local" of f: no certificate`},
		{apply, codes.DeadlineExceeded, "", "the control plane did not answer within 1s (--timeout)"},
		{apply, codes.Aborted, "busy", "conflict: busy"},
		{apply, codes.ResourceExhausted, "Certificate/big is larger than etcd takes", "Certificate/big is larger than etcd takes"},
		{apply, codes.FailedPrecondition, "not now", "not now"},
		{apply, codes.Unimplemented, "unknown method", "the control plane has no AdminService.Apply: is its version another than resealctl's?"},
		{apply, codes.Unavailable, "no leader", "the control plane can't do this now: no leader"},
		{apply, codes.Unavailable, "connection error: desc = remote error: tls: bad certificate", `the control plane does not accept the client certificate of context "local" of f: bad certificate`},
		{apply, codes.Canceled, "the server cancelled", "the server cancelled"},
	} {
		err := c.explain(context.Background(), test.method, status.Error(test.code, test.text))
		if err == nil || err.Error() != test.want {
			t.Errorf("%s: %v; want %s", test.code, err, test.want)
		}
	}
	st, err := status.New(codes.InvalidArgument, "bad").WithDetails(&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
		{Field: "BackendPool/a: spec.x", Description: "one"}, {Field: "Route/b", Description: "two"}, {Field: "message", Description: "three"}}})
	if err != nil {
		t.Fatal(err)
	}
	err = c.explain(context.Background(), apply, st.Err())
	if want := "BackendPool/a: spec.x: one\nRoute/b: two\nmessage: three"; err.Error() != want {
		t.Errorf("violations: %v", err)
	}
	if located := located(nil, err); located.Error() != err.Error() {
		t.Errorf("located without files: %v", located)
	}
	c.answered.Store(true)
	if err := c.explain(context.Background(), apply, status.Error(codes.Unavailable, "error reading from server: EOF")); err.Error() != "lost the connection to the control plane" {
		t.Error(err)
	}
}

func TestShortDuration(t *testing.T) {
	const day = 24 * time.Hour
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 150 * time.Second: "2m30s",
		11 * time.Minute: "11m", 179 * time.Minute: "179m", 3 * time.Hour: "3h", 200 * time.Minute: "3h20m",
		47 * time.Hour: "47h", 2 * day: "2d", 55 * time.Hour: "2d7h", 100 * day: "100d", 800 * day: "2y70d",
	} {
		if got := shortDuration(d); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
}

func TestPercentIsRoundedDown(t *testing.T) {
	for _, test := range []struct {
		part, all uint64
		want      string
	}{{0, 7, "0"}, {1, 3, "33.3"}, {99999, 100000, "99.9"}, {5, 5, "100"}} {
		if got := percent(test.part, test.all); got != test.want {
			t.Errorf("%d of %d: %s, want %s", test.part, test.all, got, test.want)
		}
	}
}

func TestRate(t *testing.T) {
	for _, test := range []struct {
		before, now uint64
		elapsed     float64
		want        string
	}{{0, 10, 4, "2.5"}, {10, 1010, 2, "500"}, {10, 5, 1, "0"}, {0, 5, 0, "0"}} {
		if got := rate(test.before, test.now, test.elapsed); got != test.want {
			t.Errorf("%+v: %s", test, got)
		}
	}
}

// TestTableIsSafe: what others wrote can't steer the terminal or break rows.
func TestTableIsSafe(t *testing.T) {
	var out bytes.Buffer
	table := newTable(&out, "NAME", "REASON")
	table.add("é", "bad\x1b[2J\nnews\u009b")
	table.flush()
	if want := "NAME   REASON\né      bad\\x1b[2J\\nnews\\u009b\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestWriteContexts(t *testing.T) {
	dir := t.TempDir()
	real, link := filepath.Join(dir, "real.yaml"), filepath.Join(dir, "link.yaml")
	if err := os.WriteFile(real, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	want := &contextFile{CurrentContext: "a", Contexts: []namedContext{{Name: "a", ControlPlane: []string{"h:1"}, PrivateKeyPEM: "k\n"}}}
	if err := writeContexts(link, want); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(link)
	if err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link was replaced: %v, %v", info, err)
	}
	if info, err := os.Stat(real); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	data, err := os.ReadFile(real)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseContexts(real, data)
	if err != nil || got.CurrentContext != "a" || got.find("a").PrivateKeyPEM != "k\n" {
		t.Errorf("got %+v, %v", got, err)
	}
	if names, _ := filepath.Glob(filepath.Join(dir, ".config-*")); len(names) > 0 {
		t.Errorf("left behind: %v", names)
	}
	// A directory that can't be made is an error, and nothing is written.
	if err := writeContexts(filepath.Join(real, "sub", "c.yaml"), want); err == nil {
		t.Error("a file served as a directory")
	}
}

func FuzzParseContexts(f *testing.F) {
	f.Add([]byte("currentContext: a\ncontexts: [{name: a, controlPlane: [h:1]}]"))
	f.Add([]byte("contexts: {}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := parseContexts("f", data)
		if err != nil {
			return
		}
		encoded, err := encodeContexts(file)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseContexts("f", encoded)
		if err != nil || !slices.Equal(again.names(), file.names()) {
			t.Fatalf("%q does not come back: %v", data, err)
		}
	})
}

func FuzzParseViolation(f *testing.F) {
	f.Add("BackendPool/jetty: spec.endpoints[0].address")
	f.Add("Route/api")
	f.Add("expected_revision")
	f.Fuzz(func(t *testing.T, field string) {
		v := parseViolation(field, "d")
		if v.GetResource() == nil && v.GetField() != field {
			t.Fatalf("%q became %q", field, v.GetField())
		}
	})
}

func FuzzParseSelection(f *testing.F) {
	f.Add("pools,routes", "a")
	f.Add("pool/a", "route/b")
	f.Add("all", "")
	f.Fuzz(func(t *testing.T, first, second string) {
		s, err := parseSelection([]string{first, second})
		if err == nil && (len(s.kinds) == 0 || slices.Contains(s.names[kindAll], second)) {
			t.Fatalf("%q %q: %+v", first, second, s)
		}
	})
}

func FuzzParseLabels(f *testing.F) {
	f.Add("a=b,c=d")
	f.Add("a==b")
	f.Fuzz(func(t *testing.T, text string) {
		labels, err := parseLabels(text)
		if err != nil {
			return
		}
		for key := range labels {
			if key == "" || strings.Contains(key, ",") {
				t.Fatalf("%q: key %q", text, key)
			}
		}
	})
}
