package abbreviated

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// The servers of others: each is resumed by what one full handshake of crypto/tls
// with it gave.

// material is the certificates of one test: the servers' and a client's.
type material struct {
	authority   *peers.Authority
	dir         string
	cert, key   string // files of the server
	root        string // file of the authority
	client      tls.Certificate
	environment []string
}

func newMaterial(t *testing.T, rsa bool) *material {
	t.Helper()
	authority, err := peers.NewAuthority("root")
	if err != nil {
		t.Fatal(err)
	}
	m := &material{authority: authority, dir: t.TempDir()}
	issue := authority.Issue
	if rsa {
		issue = authority.IssueRSA
	}
	pair, err := issue(peers.ServerName, "localhost")
	if err == nil {
		m.cert, m.key, _, err = pair.Write(m.dir, "server")
	}
	if err != nil {
		t.Fatal(err)
	}
	m.root = m.file(t, "root.pem", authority.PEM())
	if pair, err = authority.Issue("client"); err != nil {
		t.Fatal(err)
	}
	if m.client, err = tls.X509KeyPair(pair.Certificate, pair.Key); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *material) file(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(m.dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (m *material) config() *tls.Config {
	return &tls.Config{RootCAs: m.authority.Pool(), ServerName: peers.ServerName, MaxVersion: tls.VersionTLS12}
}

// start runs a program until the test ends; ready is asked until it says so.
func start(t *testing.T, config process.Config, ready func(context.Context) error) {
	t.Helper()
	running, err := process.Start(config)
	if errors.Is(err, process.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := running.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("%s wrote:\n%s", running.Name(), running.Output())
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := running.WaitReady(ctx, ready); err != nil {
		t.Fatal(err)
	}
}

// listens asks a port whether somebody listens.
func listens(address string) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	address, err := process.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func (m *material) openssl(t *testing.T, args ...string) string {
	address := freeAddress(t)
	start(t, process.Config{
		Path: "openssl", Env: m.environment,
		Args: append([]string{"s_server", "-accept", address, "-cert", m.cert, "-key", m.key, "-www", "-quiet"}, args...),
	}, listens(address))
	return address
}

func (m *material) gnutls(t *testing.T, args ...string) string {
	address := freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	start(t, process.Config{
		Path: "gnutls-serv", Install: "apt-get install gnutls-bin, or run integration/setup.sh",
		Args: append([]string{"-p", port, "--x509certfile", m.cert, "--x509keyfile", m.key, "--http", "-q"}, args...),
	}, listens(address))
	return address
}

func (m *material) nss(t *testing.T, args ...string) string {
	const install = "apt-get install libnss3-tools, or run integration/setup.sh"
	address := freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	bundle := m.pkcs12(t)
	for _, command := range [][]string{
		{"certutil", "-N", "-d", "sql:" + m.dir, "--empty-password"},
		{"pk12util", "-i", bundle, "-d", "sql:" + m.dir, "-W", bundlePassword, "-K", ""},
	} {
		run(t, install, command...)
	}
	start(t, process.Config{
		Path: "selfserv", Install: install,
		Args: append([]string{"-d", "sql:" + m.dir, "-n", "server", "-e", "server", "-p", port, "-V", "tls1.2:tls1.2", "-w", "", "-G"}, args...),
	}, listens(address))
	return address
}

const bundlePassword = "secret"

// pkcs12 writes the server's key and certificate as a PKCS #12 file.
func (m *material) pkcs12(t *testing.T) string {
	bundle := filepath.Join(m.dir, "server.p12")
	run(t, "", "openssl", "pkcs12", "-export", "-in", m.cert, "-inkey", m.key, "-name", "server", "-passout", "pass:"+bundlePassword, "-out", bundle)
	return bundle
}

func (m *material) jsse(t *testing.T, home, roots string) string {
	path := "java"
	if home != "" {
		path = filepath.Join(home, "bin", "java")
	}
	var port atomic.Pointer[string]
	start(t, process.Config{
		Name: "JSSE", Path: path, Install: "apt-get install openjdk-17-jdk-headless, or run integration/setup.sh",
		Args: []string{"-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "testdata/Sockets.java", m.pkcs12(t), bundlePassword, roots},
		OnLine: func(line string) bool {
			if rest, ok := strings.CutPrefix(line, "READY "); ok {
				port.Store(&rest)
			}
			return true
		},
	}, func(context.Context) error {
		if port.Load() == nil {
			return errors.New("no READY line yet")
		}
		return nil
	})
	return "127.0.0.1:" + *port.Load()
}

// run runs a program to its end.
func run(t *testing.T, install string, command ...string) {
	t.Helper()
	running, err := process.Start(process.Config{Path: command[0], Args: command[1:], Install: install})
	if errors.Is(err, process.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-running.Done():
	case <-time.After(limit):
		t.Fatalf("%s does not end", command[0])
	}
	if err := running.Err(); err != nil {
		t.Fatalf("%v: %v\n%s", command, err, running.Output())
	}
}

func dial(t testing.TB, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(limit))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// tlsConn is what both kinds of connections can do.
type tlsConn interface {
	net.Conn
	CloseWrite() error
}

// goodbye ends a connection in good order.
func goodbye(t *testing.T, conn tlsConn) {
	t.Helper()
	if err := conn.CloseWrite(); err != nil {
		t.Errorf("close_notify: %v", err)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil && !isReset(err) {
		t.Errorf("to the end: %v", err)
	}
	_ = conn.Close()
}

// isReset: some servers of tests end with RST when they are told goodbye.
func isReset(err error) bool { return strings.Contains(err.Error(), "reset by peer") }

// request makes an HTTP request and reads the answer.
func request(t *testing.T, conn tlsConn) {
	t.Helper()
	fmt.Fprintf(conn, "GET /256k HTTP/1.0\r\nHost: %s\r\n\r\n", peers.ServerName)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); err != nil && !isReset(err) || n == 0 {
		t.Errorf("%d bytes of body, %v", n, err)
	}
	resp.Body.Close()
	goodbye(t, conn)
}

// echo sends data to a server that sends it back.
func echo(t *testing.T, conn tlsConn) {
	t.Helper()
	data := bytes.Repeat([]byte("0123456789abcdef"), 10_000)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		sent <- err
	}()
	got := make([]byte, len(data))
	if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the echo differs, %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	goodbye(t, conn)
}

// resume makes one full handshake and resumes it.
func resume(t *testing.T, address string, cfg *tls.Config, talk func(*testing.T, tlsConn)) Session {
	t.Helper()
	full, session := establish(t, dial(t, address), cfg)
	talk(t, full)
	for i := range resumptions {
		conn := Client(dial(t, address), Config{Session: session, Config: cfg})
		if err := conn.HandshakeContext(t.Context()); err != nil {
			t.Fatalf("resumption %d: %v", i, err)
		}
		state := conn.ConnectionState()
		if !state.DidResume || state.CipherSuite != session.CipherSuite || len(state.VerifiedChains) == 0 {
			t.Errorf("%+v", state)
		}
		talk(t, conn)
	}
	return session
}

const resumptions = 3

func TestServers(t *testing.T) {
	const tls12 = "NORMAL:-VERS-ALL:+VERS-TLS1.2"
	for name, test := range map[string]struct {
		start  func(*testing.T, *material) string
		talk   func(*testing.T, tlsConn)
		rsa    bool
		mutual bool
		legacy bool // no extended master secret
		suites []uint16
	}{
		"OpenSSL":         {start: func(t *testing.T, m *material) string { return m.openssl(t, "-tls1_2") }},
		"OpenSSL, TLS1.3": {start: func(t *testing.T, m *material) string { return m.openssl(t) }},
		"OpenSSL, AES-128": {start: func(t *testing.T, m *material) string { return m.openssl(t, "-no_ticket") },
			suites: []uint16{gcm128}},
		"OpenSSL, ChaCha20": {start: func(t *testing.T, m *material) string { return m.openssl(t) },
			suites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}},
		"OpenSSL, RSA": {start: func(t *testing.T, m *material) string { return m.openssl(t) }, rsa: true},
		"OpenSSL, RSA key exchange": {start: func(t *testing.T, m *material) string { return m.openssl(t) }, rsa: true,
			suites: []uint16{tls.TLS_RSA_WITH_AES_256_GCM_SHA384}},
		"OpenSSL, client certificate": {start: func(t *testing.T, m *material) string {
			return m.openssl(t, "-Verify", "2", "-verify_return_error", "-CAfile", m.root)
		}, mutual: true},
		"OpenSSL, no extended master secret": {start: func(t *testing.T, m *material) string {
			file := m.file(t, "openssl.cnf", []byte("openssl_conf=a\n[a]\nssl_conf=b\n[b]\nsystem_default=c\n[c]\nOptions=-ExtendedMasterSecret\n"))
			m.environment = []string{"OPENSSL_CONF=" + file}
			return m.openssl(t)
		}, legacy: true},
		"GnuTLS": {start: func(t *testing.T, m *material) string { return m.gnutls(t, "-a", "--priority", tls12) }},
		"GnuTLS, without tickets": {start: func(t *testing.T, m *material) string {
			return m.gnutls(t, "-a", "--noticket", "--priority", tls12)
		}},
		"GnuTLS, ChaCha20": {start: func(t *testing.T, m *material) string {
			return m.gnutls(t, "-a", "--priority", tls12+":-CIPHER-ALL:+CHACHA20-POLY1305")
		}},
		"GnuTLS, client certificate": {start: func(t *testing.T, m *material) string {
			return m.gnutls(t, "-r", "--verify-client-cert", "--x509cafile", m.root, "--priority", tls12)
		}, mutual: true},
		"GnuTLS, no extended master secret": {start: func(t *testing.T, m *material) string {
			return m.gnutls(t, "-a", "--priority", tls12+":%NO_SESSION_HASH")
		}, legacy: true},
		"NSS":               {start: func(t *testing.T, m *material) string { return m.nss(t) }},
		"NSS, with tickets": {start: func(t *testing.T, m *material) string { return m.nss(t, "-u") }},
		"JSSE":              {start: func(t *testing.T, m *material) string { return m.jsse(t, "", "") }, talk: echo},
		"JSSE, client certificate": {start: func(t *testing.T, m *material) string {
			return m.jsse(t, "", m.root)
		}, talk: echo, mutual: true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMaterial(t, test.rsa)
			cfg := m.config()
			cfg.CipherSuites = test.suites
			if test.mutual {
				cfg.Certificates = []tls.Certificate{m.client}
			}
			talk := test.talk
			if talk == nil {
				talk = request
			}
			session := resume(t, test.start(t, m), cfg, talk)
			if session.ExtendedMasterSecret == test.legacy {
				t.Errorf("extended master secret: %t", session.ExtendedMasterSecret)
			}
		})
	}
}

// Servers that count their handshakes themselves.
func TestServersThatCount(t *testing.T) {
	type starter func(context.Context, peers.Options) (*peers.Backend, error)
	for name, test := range map[string]struct {
		start starter
		mode  peers.Mode
		home  string
	}{
		"nginx":                   {start: peers.Nginx, mode: peers.TLS12SessionIDs},
		"nginx, with tickets":     {start: peers.Nginx, mode: peers.TLS12Tickets},
		"HAProxy":                 {start: peers.HAProxy, mode: peers.TLS12SessionIDs},
		"HAProxy, with tickets":   {start: peers.HAProxy, mode: peers.TLS12Tickets},
		"Jetty, stock":            {start: peers.Jetty, mode: peers.TLS12Tickets},
		"Jetty, one name":         {start: peers.JettyOneName, mode: peers.TLS12Tickets},
		"Jetty, JSSE's keys":      {start: peers.JettyArranged, mode: peers.TLS12Tickets},
		"Jetty, tickets off":      {start: peers.Jetty, mode: peers.TLS12SessionIDs},
		"Jetty, stock, newer JDK": {start: peers.Jetty, mode: peers.TLS12Tickets, home: newestJava()},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.HasSuffix(name, "newer JDK") && test.home == "" {
				t.Skip("only one Java is installed")
			}
			authority, err := peers.NewAuthority("root")
			if err != nil {
				t.Fatal(err)
			}
			backend, err := test.start(t.Context(), peers.Options{Authority: authority, Dir: t.TempDir(), Mode: test.mode, JavaHome: test.home})
			if errors.Is(err, process.ErrMissing) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := backend.Stop(); err != nil {
					t.Error(err)
				}
			})
			cfg := &tls.Config{RootCAs: authority.Pool(), ServerName: peers.ServerName, MaxVersion: tls.VersionTLS12}
			resume(t, backend.Address, cfg, request)
			checkCounts(t, backend)
		})
	}
}

// newestJava is the home of the newest Java besides that of PATH, or "".
func newestJava() string {
	homes := peers.Javas()
	return homes[len(homes)-1]
}

// checkCounts waits until a backend has counted what was done to it.
func checkCounts(t *testing.T, backend *peers.Backend) {
	t.Helper()
	var counts peers.Counts
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var err error
		if counts, err = backend.Counts(t.Context()); err != nil {
			t.Fatal(err)
		}
		if counts.Full == 1 && counts.Resumed() == resumptions {
			return
		}
	}
	t.Errorf("counted at the backend: %+v", counts)
}

// issue makes a certificate that is its own root, for a server of this process.
func issue(t testing.TB) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	authority, err := peers.NewAuthority("root")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.Issue(testName)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := tls.X509KeyPair(pair.Certificate, pair.Key)
	if err != nil {
		t.Fatal(err)
	}
	return certificate, authority.Pool()
}
