package frontend

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// tool runs a client of others, with input, and returns all that it printed.
func tool(t *testing.T, input, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

func need(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
}

func TestCurl(t *testing.T) {
	need(t, "curl")
	legs(t, func(w http.ResponseWriter, r *http.Request) {
		var body bytes.Buffer
		_, _ = body.ReadFrom(r.Body)
		fmt.Fprint(w, body.Len(), " bytes")
	}, func(t *testing.T, e *edge, _ *http.Client) {
		dir := t.TempDir()
		roots, upload := filepath.Join(dir, "roots.pem"), filepath.Join(dir, "upload")
		leaf := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.cert.Certificate[0]})
		if err := os.WriteFile(roots, leaf, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(upload, make([]byte, 2<<20), 0o600); err != nil { // enough for Expect: 100-continue
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(e.address("main"))
		for version, flag := range map[string]string{"2": "--http2", "1.1": "--http1.1"} {
			got := tool(t, "", "curl", "-sS", flag, "--cacert", roots, "--resolve", "app.test:"+port+":127.0.0.1",
				"-w", " %{http_code} %{http_version}", "--data-binary", "@"+upload, "https://app.test:"+port+"/")
			if want := "2097152 bytes 200 " + version; got != want {
				t.Errorf("%s: %q, want %q", flag, got, want)
			}
		}
	})
}

func TestH2Load(t *testing.T) {
	need(t, "h2load")
	e := newEdge(t, answering("ok"))
	got := tool(t, "", "h2load", "-n", "200", "-c", "4", "-m", "10", "--connect-to", e.address("main"), "https://app.test/")
	if !strings.Contains(got, "200 succeeded, 0 failed, 0 errored, 0 timeout") {
		t.Error(got)
	}
	if opened := read(e.count("main"), func(c *counts) int { return c.opened }); opened != 4 {
		t.Errorf("%d connections, want 4", opened)
	}
}

func TestOpenSSLResumes(t *testing.T) {
	need(t, "openssl")
	e := newEdge(t, answering("ok"))
	c := e.count("main")
	got := tool(t, "", "openssl", "s_client", "-connect", e.address("main"), "-servername", "app.test", "-tls1_2", "-reconnect")
	if n := strings.Count(got, "\nReused, TLSv1.2"); n != 5 {
		t.Errorf("openssl resumed %d of 5 reconnections:\n%s", n, got)
	}
	if full, resumed := read(c, func(c *counts) int { return c.misses[notOffered] }),
		read(c, func(c *counts) int { return c.resumed[resealv1.Mechanism_MECHANISM_TICKET] }); full != 1 || resumed != 5 {
		t.Errorf("%d full and %d resumed are counted", full, resumed)
	}
	session := filepath.Join(t.TempDir(), "session")
	request := "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n"
	common := []string{"s_client", "-connect", e.address("main"), "-servername", "app.test", "-tls1_3", "-ign_eof"}
	tool(t, request, "openssl", append(common, "-sess_out", session)...)
	got = tool(t, request, "openssl", append(common, "-sess_in", session)...)
	if !strings.Contains(got, "Reused, TLSv1.3") || !strings.Contains(got, "200 OK") {
		t.Errorf("TLS 1.3:\n%s", got)
	}
	if resumed := read(c, func(c *counts) int { return c.resumed[resealv1.Mechanism_MECHANISM_PSK] }); resumed != 1 {
		t.Errorf("%d resumed by PSK are counted", resumed)
	}
}

func TestOpenSSLTunnel(t *testing.T) {
	need(t, "openssl")
	e, _ := tcpEdge(t, func(backend *net.TCPConn) {
		line := make([]byte, 6)
		_, _ = backend.Read(line)
		fmt.Fprintf(backend, "echo %s", line)
	}, func(l *exchange.Listener) { l.TLS.MaxVersion = tls.VersionTLS12 })
	got := tool(t, "hello\n", "openssl", "s_client", "-connect", e.address("main"), "-servername", "app.test", "-quiet", "-ign_eof")
	if !strings.Contains(got, "echo hello\n") {
		t.Errorf("got %q", got)
	}
}
