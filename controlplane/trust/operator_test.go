package trust

import (
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestIssueOperatorChecks(t *testing.T) {
	if _, _, err := New(Config{}).IssueOperator(admin, "a", 0); !errors.Is(err, ErrNotOpen) {
		t.Errorf("before Open: %v", err)
	}
	trust := openTrust(t, testConfig(t))
	for name, issue := range map[string]func() error{
		"edge":      func() error { _, _, err := trust.IssueOperator(edgeRole, "a", 0); return err },
		"no role":   func() error { _, _, err := trust.IssueOperator(0, "a", 0); return err },
		"beyond":    func() error { _, _, err := trust.IssueOperator(admin+1, "a", 0); return err },
		"no name":   func() error { _, _, err := trust.IssueOperator(admin, "", 0); return err },
		"slash":     func() error { _, _, err := trust.IssueOperator(admin, "a/b", 0); return err },
		"past ends": func() error { _, _, err := trust.IssueOperator(admin, "a", -time.Hour); return err },
	} {
		if issue() == nil {
			t.Errorf("%s: no error", name)
		}
	}
	certPEM, _, err := trust.IssueOperator(viewer, "v", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	certificate := parsePEM(t, string(certPEM))
	if left := time.Until(certificate.NotAfter); left > time.Hour || left < 59*time.Minute {
		t.Errorf("it lives %s", left)
	}
}

func readContext(t *testing.T, path string) contextFile {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var file contextFile
	decoder := yaml.NewDecoder(strings.NewReader(string(text)))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestAdminContext(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	s := serve(t, trust, true)
	path := filepath.Join(t.TempDir(), "admin.yaml")
	if err := trust.WriteAdminContext(path, []string{s.addr, "[::1]:7443"}); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode().Perm())
	}
	file := readContext(t, path)
	if file.CurrentContext != "local" || len(file.Contexts) != 1 {
		t.Fatalf("wrong file %+v", file)
	}
	c := file.Contexts[0]
	if c.Name != "local" || c.TrustDomain != "reseal" || c.CAPEM != string(trust.CAPEM()) || strings.Join(c.ControlPlane, " ") != s.addr+" [::1]:7443" {
		t.Errorf("wrong context %+v", c)
	}
	certificate, err := tls.X509KeyPair([]byte(c.CertificatePEM), []byte(c.PrivateKeyPEM))
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(certificate.Leaf.NotAfter); left < 364*24*time.Hour {
		t.Errorf("it lives %s", left)
	}
	created, err := s.enrollment(t, certificate).CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: "e"})
	wantCode(t, err, codes.OK)
	if created.GetInfo().GetCreatedBy() != "admin/local" {
		t.Errorf("created by %s", created.GetInfo().GetCreatedBy())
	}
}

func TestAdminContextIsKept(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	path := filepath.Join(t.TempDir(), "admin.yaml")
	write := func(trust *Trust) string {
		t.Helper()
		if err := trust.WriteAdminContext(path, []string{"127.0.0.1:7443"}); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	first := write(trust)
	if write(trust) != first {
		t.Error("a good file was replaced")
	}

	// Expired: replaced, with the other contexts kept.
	file := readContext(t, path)
	certPEM, keyPEM, err := trust.IssueOperator(admin, "local", time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	file.Contexts[0].CertificatePEM, file.Contexts[0].PrivateKeyPEM = string(certPEM), string(keyPEM)
	file.Contexts = append(file.Contexts, clientContext{Name: "remote", TrustDomain: "far"})
	file.CurrentContext = "remote"
	text, err := yaml.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // certificates count whole seconds
	write(trust)
	file = readContext(t, path)
	if len(file.Contexts) != 2 || file.CurrentContext != "remote" || file.Contexts[1].TrustDomain != "far" {
		t.Errorf("other contexts were lost: %+v", file)
	}
	if !usable(file.Contexts[0], trust.opened.Load().authority) {
		t.Error("still expired")
	}

	other := openTrust(t, testConfig(t))
	write(other)
	if got := readContext(t, path).Contexts[0].CAPEM; got != string(other.CAPEM()) {
		t.Error("it still has the old authority")
	}
}

func TestAdminContextErrors(t *testing.T) {
	if err := New(Config{}).WriteAdminContext("x", nil); !errors.Is(err, ErrNotOpen) {
		t.Errorf("before Open: %v", err)
	}
	trust := openTrust(t, testConfig(t))
	path := filepath.Join(t.TempDir(), "admin.yaml")
	const text = "contexts: secret-looking text\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	err := trust.WriteAdminContext(path, nil)
	if err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "secret") {
		t.Errorf("error is %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != text {
		t.Errorf("the file was changed: %q, %v", got, err)
	}
	if err := trust.WriteAdminContext(filepath.Join(path, "below"), nil); err == nil {
		t.Error("no error below a file")
	}
}

// TestPage: metrics are for people and their tools, not for edges.
func TestPage(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	listener, err := tls.Listen("tcp", "127.0.0.1:0", trust.PageTLS())
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		Handler:  http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "metrics") }),
		ErrorLog: log.New(io.Discard, "", 0),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer func() {
		server.Close()
		<-served
	}()
	for who, caller := range map[string]struct {
		certificates []tls.Certificate
		admitted     bool
	}{
		"anonymous":     {nil, false},
		"edge":          {[]tls.Certificate{edgeCertificate(t, trust, "e1", "")}, false},
		"control plane": {[]tls.Certificate{*trust.server.Load()}, false},
		"viewer":        {[]tls.Certificate{operator(t, trust, viewer, "v")}, true},
		"operator":      {[]tls.Certificate{operator(t, trust, operating, "o")}, true},
		"admin":         {[]tls.Certificate{operator(t, trust, admin, "a")}, true},
	} {
		transport := &http.Transport{TLSClientConfig: clientTLS(trust, caller.certificates...), DisableKeepAlives: true}
		response, err := (&http.Client{Transport: transport}).Get("https://" + listener.Addr().String() + "/metrics")
		if err == nil {
			response.Body.Close()
		}
		if (err == nil) != caller.admitted {
			t.Errorf("%s: %v", who, err)
		}
	}
}
