package abbreviated

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/process"
)

// startOpenSSL runs `openssl s_server` with a certificate and its chain.
func startOpenSSL(t *testing.T, certificate tls.Certificate, args ...string) (address string) {
	t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: run integration/setup.sh")
	}
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "server.pem")
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	if err := os.WriteFile(file, both, 0o600); err != nil {
		t.Fatal(err)
	}
	if address, err = process.FreeAddress(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(openssl, append([]string{"s_server", "-accept", address, "-cert", file, "-key", file, "-www", "-quiet"}, args...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for range 500 {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return address
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("openssl s_server does not listen")
	return ""
}

// request makes an HTTP request on conn and reads the answer to its end.
func request(t *testing.T, conn net.Conn) {
	t.Helper()
	fmt.Fprintf(conn, "GET / HTTP/1.0\r\nHost: %s\r\n\r\n", testName)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n == 0 {
		t.Fatalf("%d bytes of body, %v", n, err)
	}
	resp.Body.Close()
	conn.Close()
}

func dial(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestOpenSSL(t *testing.T) {
	certificate, roots := issue(t)
	for _, suite := range []string{
		"ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305",
	} {
		t.Run(suite, func(t *testing.T) {
			address := startOpenSSL(t, certificate, "-no_ticket", "-tls1_2", "-cipher", suite)
			cfg := &tls.Config{RootCAs: roots, ServerName: testName, MaxVersion: tls.VersionTLS12}
			full, session := establish(t, dial(t, address), cfg)
			request(t, full)
			for i := range 3 {
				conn := Client(dial(t, address), Config{Session: session, Config: cfg})
				if err := conn.HandshakeContext(t.Context()); err != nil {
					t.Fatalf("resumption %d: %v", i, err)
				}
				if state := conn.ConnectionState(); !state.DidResume || state.CipherSuite != session.CipherSuite {
					t.Errorf("%+v", state)
				}
				request(t, conn)
			}
		})
	}
}
