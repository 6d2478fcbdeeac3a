package edge

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/process"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// startApache serves TLS 1.2. It renegotiates for /private, which needs a client
// certificate, and for /cipher, which needs another cipher suite.
func startApache(t *testing.T) (address string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	address, err := process.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	certificate, key := pemOf(t, issue(t, nil, "backend.test"))
	write("cert.pem", certificate)
	write("key.pem", key)
	write("ca.pem", authority().pem)
	for _, name := range []string{"public", "private", "cipher"} {
		write("www/"+name+".txt", name)
	}
	modules := ""
	for _, module := range []string{"mpm_event", "authz_core", "ssl"} {
		modules += fmt.Sprintf("LoadModule %s_module /usr/lib/apache2/modules/mod_%s.so\n", module, module)
	}
	write("apache.conf", modules+fmt.Sprintf(`ServerRoot %[1]s
DefaultRuntimeDir %[1]s
PidFile apache.pid
ServerName backend.test
Listen %[2]s https
ErrorLog /dev/stderr
DocumentRoot %[1]s/www
SSLEngine on
SSLProtocol TLSv1.2
SSLCipherSuite ECDHE-ECDSA-AES128-GCM-SHA256
SSLCertificateFile cert.pem
SSLCertificateKeyFile key.pem
SSLCACertificateFile ca.pem
<Location "/private.txt">
SSLVerifyClient require
SSLVerifyDepth 2
</Location>
<Location "/cipher.txt">
SSLCipherSuite ECDHE-ECDSA-AES256-GCM-SHA384
</Location>
`, dir, address))
	apache, err := process.Start(process.Config{
		Path: "apache2", Install: "apt-get install apache2-bin, or run integration/setup.sh",
		Args: []string{"-DFOREGROUND", "-f", filepath.Join(dir, "apache.conf")},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = apache.Stop() })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := apache.WaitReady(ctx, func(context.Context) error { return process.Listening(address) }); err != nil {
		t.Fatal(err)
	}
	return address
}

// get asks for a path on a connection of its own.
func (x *bothLegs) get(path string) (int, string) {
	x.t.Helper()
	resp, body := x.send("GET " + path + " HTTP/1.1\r\nHost: public.test\r\n\r\n")
	return resp.StatusCode, body
}

// TestRenegotiationOnce: Apache may renegotiate once, with the client certificate,
// on new and on resumed connections. It does so again for the next request, which
// gets another connection.
func TestRenegotiationOnce(t *testing.T) {
	apache := startApache(t)
	allowed := func(_ *resealv1.Listener, p *resealv1.BackendPool) {
		p.Tls.Renegotiation, p.Tls.ClientCertificate = resealv1.BackendTLS_RENEGOTIATION_ONCE, "front"
	}
	t.Run("connections in turn", func(t *testing.T) {
		x := newLegs(t, apache, allowed)
		for _, path := range []string{"public", "private", "public", "private", "cipher", "public", "public"} {
			if code, body := x.get("/" + path + ".txt"); code != http.StatusOK || body != path {
				t.Fatalf("%s: %d %q\n%s", path, code, body, x.log)
			}
		}
		if log := x.log.String(); strings.Count(log, `"backend_reused":true`) < 3 {
			t.Errorf("connections are not reused:\n%s", log)
		}
	})
	t.Run("many connections", func(t *testing.T) {
		x := newLegs(t, apache, allowed, func(_ *resealv1.Listener, p *resealv1.BackendPool) {
			p.Connections = &resealv1.Connections{MaxRequests: 1}
		})
		for i := range 4 {
			for _, path := range []string{"private", "cipher", "public"} {
				if code, body := x.get("/" + path + ".txt"); code != http.StatusOK || body != path {
					t.Fatalf("%s in turn %d: %d %q\n%s", path, i, code, body, x.log)
				}
			}
		}
		if log := x.log.String(); strings.Count(log, `"backend_resumed":true`) < 11 {
			t.Errorf("connections are not resumed:\n%s", log)
		}
	})
	t.Run("a body", func(t *testing.T) {
		x := newLegs(t, apache, allowed)
		resp, body := x.send("POST /private.txt HTTP/1.1\r\nHost: public.test\r\nContent-Length: 5\r\n\r\nhello")
		if resp.StatusCode != http.StatusOK || body != "private" {
			t.Errorf("%d %q\n%s", resp.StatusCode, body, x.log)
		}
	})
}

// TestRenegotiationNever: the log names the field that would allow it, and a client
// can't take the endpoint out by asking for what needs it.
func TestRenegotiationNever(t *testing.T) {
	x := newLegs(t, startApache(t), func(_ *resealv1.Listener, p *resealv1.BackendPool) { p.Tls.ClientCertificate = "front" })
	for range 8 {
		if code, body := x.get("/private.txt"); code != http.StatusBadGateway {
			t.Fatalf("%d %q", code, body)
		}
	}
	if log := x.log.String(); strings.Count(log, "tls.renegotiation: once") != 8 {
		t.Errorf("the log does not say why:\n%s", log)
	}
	if code, body := x.get("/public.txt"); code != http.StatusOK || body != "public" {
		t.Errorf("the endpoint is out: %d %q", code, body)
	}
}

// TestCertificateOfCommonName: a certificate without alternative names counts when
// the pool says so, at full and resumed handshakes, and the log says how to.
func TestCertificateOfCommonName(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	certificate := issue(t, func(c *x509.Certificate) { c.DNSNames = nil }, "backend.test")
	server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	server.StartTLS()
	defer server.Close()
	legs := func(name string, commonName bool) *bothLegs {
		return newLegs(t, server.Listener.Addr().String(), func(_ *resealv1.Listener, p *resealv1.BackendPool) {
			p.Tls.ServerName, p.Tls.SubjectCommonName = name, commonName
			p.Connections = &resealv1.Connections{MaxRequests: 1}
			p.Protocol = resealv1.BackendPool_PROTOCOL_HTTP1
		})
	}
	x := legs("backend.test", true)
	for range 3 {
		if code, body := x.get("/"); code != http.StatusOK || body != "hello" {
			t.Fatalf("%d %q\n%s", code, body, x.log)
		}
	}
	if log := x.log.String(); strings.Count(log, `"backend_resumed":true`) != 2 {
		t.Errorf("connections are not resumed:\n%s", log)
	}
	for _, test := range []struct {
		name       string
		commonName bool
		want       []string
	}{
		{"backend.test", false, []string{"tls.subjectCommonName", `it is not for \"backend.test\"`, `CN=backend.test`, `CN=test authority`}},
		{"other.test", true, []string{`\"other.test\"`, `CN=backend.test`, "common name", "tls.serverName"}},
	} {
		x := legs(test.name, test.commonName)
		if code, body := x.get("/"); code != http.StatusBadGateway || strings.Contains(body, "CN=") {
			t.Errorf("%s: %d %q", test.name, code, body)
		}
		log := x.log.String()
		for _, want := range append(test.want, "verify_failure") {
			if !strings.Contains(log, want) {
				t.Errorf("%s: %q is missing in\n%s", test.name, want, log)
			}
		}
	}
}
