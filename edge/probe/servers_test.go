package probe

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/reseal/reseal/edge/session"
	"github.com/reseal/reseal/integration/process"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority signs the certificates of one test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err == nil {
		a.cert, err = x509.ParseCertificate(der)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue signs a certificate for backend.test and loopback.
func (a *authority) issue(name string) tls.Certificate {
	a.t.Helper()
	key := newKey(a.t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"backend.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// files writes a certificate and its key as PEM.
func (a *authority) files(cert tls.Certificate) (certFile, keyFile string) {
	a.t.Helper()
	dir := a.t.TempDir()
	keyDER, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		a.t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		keyFile:  {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// goServer is an HTTP server of this process that may forget sessions.
type goServer struct {
	address string
	strict  bool // forgets the session of a connection that ends without close_notify
	once    bool // takes each session once

	mu       sync.Mutex
	sessions map[string][]byte
	opened   int
	requests int
}

type serverOptions struct {
	tls     *tls.Config
	handler http.Handler
	strict  bool
	once    bool
	closes  bool
	idle    time.Duration
	listen  string
}

func startGo(t *testing.T, cert tls.Certificate, o serverOptions) *goServer {
	t.Helper()
	if o.listen == "" {
		o.listen = "127.0.0.1:0"
	}
	listener, err := net.Listen("tcp", o.listen)
	if err != nil {
		t.Fatal(err)
	}
	s := &goServer{address: listener.Addr().String(), strict: o.strict, once: o.once, sessions: map[string][]byte{}}
	cfg := &tls.Config{}
	if o.tls != nil {
		cfg = o.tls
	}
	cfg.Certificates = []tls.Certificate{cert}
	if o.strict || o.once {
		cfg.WrapSession, cfg.UnwrapSession = s.wrap, s.unwrap
	}
	handler := o.handler
	if handler == nil {
		handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello\n") })
	}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.mu.Lock()
			s.requests++
			s.mu.Unlock()
			handler.ServeHTTP(w, r)
		}),
		TLSConfig: cfg, ErrorLog: log.New(io.Discard, "", 0), IdleTimeout: o.idle,
		ReadHeaderTimeout: time.Minute,
	}
	server.SetKeepAlivesEnabled(!o.closes)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.ServeTLS(&watchedListener{listener, s}, "", "")
	}()
	t.Cleanup(func() {
		server.Close()
		<-ended
	})
	return s
}

// startRaw serves TLS connections without HTTP until the test ends.
func startRaw(t *testing.T, cfg *tls.Config, serve func(*tls.Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				tc := tls.Server(conn, cfg)
				serve(tc)
				_ = tc.Close()
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		serving.Wait()
	})
	return listener.Addr().String()
}

// watchedListener notices how connections end.
type watchedListener struct {
	net.Listener
	server *goServer
}

func (l *watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.server.mu.Lock()
	l.server.opened++
	l.server.mu.Unlock()
	// Otherwise the kernel takes up to 4 MB of an answer that the client does not
	// read.
	if err := conn.(*net.TCPConn).SetWriteBuffer(64 << 10); err != nil {
		return nil, err
	}
	return &watchedConn{Conn: conn, server: l.server}, nil
}

// watchedConn forgets all sessions when the client ends it without
// close_notify, which is the rule of old Java.
type watchedConn struct {
	net.Conn
	server *goServer
	mu     sync.Mutex
	record byte // type of the last record
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	if n >= 5 {
		// A record of TLS 1.3 hides its type; an alert is the only one that small.
		c.record = p[0]
		if size := int(p[3])<<8 | int(p[4]); p[0] == 23 && size <= 24 {
			c.record = 21
		}
	}
	if err != nil && !isTimeout(err) && !errors.Is(err, net.ErrClosed) && c.record != 21 && c.server.strict {
		c.server.mu.Lock()
		clear(c.server.sessions)
		c.server.mu.Unlock()
	}
	return n, err
}

func (s *goServer) wrap(_ tls.ConnectionState, state *tls.SessionState) ([]byte, error) {
	encoded, err := state.Bytes()
	if err != nil {
		return nil, err
	}
	id := make([]byte, 16)
	rand.Read(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions[string(id)] = encoded
	return id, nil
}

func (s *goServer) unwrap(id []byte, _ tls.ConnectionState) (*tls.SessionState, error) {
	s.mu.Lock()
	encoded := s.sessions[string(id)]
	if s.once {
		delete(s.sessions, string(id))
	}
	s.mu.Unlock()
	if encoded == nil {
		return nil, nil
	}
	return tls.ParseSessionState(encoded)
}

func (s *goServer) counts() (opened, requests int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened, s.requests
}

// startOpenSSL runs openssl s_server until the test ends.
func startOpenSSL(t *testing.T, a *authority, args ...string) string {
	t.Helper()
	program, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	certFile, keyFile := a.files(a.issue("openssl"))
	address := freeAddress(t)
	args = append([]string{"s_server", "-accept", address, "-cert", certFile, "-key", keyFile, "-quiet"}, args...)
	startProcess(t, address, exec.Command(program, args...))
	return address
}

func freeAddress(t *testing.T) string {
	t.Helper()
	address, err := process.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return address
}

// startProcess runs a server until the test ends and waits until it listens.
func startProcess(t *testing.T, address string, command *exec.Cmd) {
	t.Helper()
	var output lockedBuffer
	command.Stdout, command.Stderr = &output, &output
	// s_server ends at the end of its input.
	input, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		input.Close()
		_ = command.Process.Kill()
		_ = command.Wait()
		if t.Failed() {
			t.Logf("%s wrote:\n%s", command.Path, output.String())
		}
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen: %v\n%s", command.Path, err, output.String())
		}
	}
}

type lockedBuffer struct {
	mu   sync.Mutex
	data bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data.String()
}

func sessions() Handshaker { return session.New(session.Config{}) }

// probe runs a probe that must succeed.
func probe(t *testing.T, cfg Config) *Report {
	t.Helper()
	if cfg.Sessions == nil {
		cfg.Sessions = sessions
	}
	// Machines that run tests may be busy.
	cfg.Timeout = 30 * time.Second
	if cfg.CloseTimeout == 0 {
		cfg.CloseTimeout = 10 * time.Second
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	report, err := p.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if testing.Verbose() {
		t.Log(describe(report))
	}
	return report
}

// describe writes a report for the eyes of a tester.
func describe(r *Report) string {
	var b strings.Builder
	for _, c := range r.Connections {
		fmt.Fprintf(&b, "\n%2d %s %-30s offered %v answered %v resumed %v tickets %d requests %d: %s %s %s",
			c.Number, c.Address, c.Purpose, c.Offered, c.Answered, c.Resumed, c.Tickets, c.Requests,
			resealv1.Label(c.Ending), resealv1.Label(c.Close), c.Error)
	}
	for _, v := range r.Versions {
		fmt.Fprintf(&b, "\n%v", v)
	}
	fmt.Fprintf(&b, "\nkeep-alive %v\nshared %v same %v notes %q\n%s\n%v", r.KeepAlive, r.Shared, r.SameCertificate, r.Notes, r.Advice, r.Pool)
	return b.String()
}

// version is what was found out about one version.
func version(t *testing.T, r *Report, want resealv1.TLSVersion) *resealv1.ProbeVersion {
	t.Helper()
	for _, v := range r.Versions {
		if v.Version == want {
			return v
		}
	}
	t.Fatalf("nothing about %v", want)
	return nil
}

// survives writes what a version's sessions live through: "close_notify=yes ...".
func survives(v *resealv1.ProbeVersion) string {
	var parts []string
	for _, s := range v.Survives {
		parts = append(parts, resealv1.Label(s.Ending)+"="+resealv1.Label(s.Answer))
	}
	return strings.Join(parts, " ")
}

// resolveTo makes every name resolve to addresses.
func resolveTo(addresses ...string) func(context.Context, string) ([]netip.Addr, error) {
	return func(context.Context, string) ([]netip.Addr, error) {
		var parsed []netip.Addr
		for _, address := range addresses {
			parsed = append(parsed, netip.MustParseAddr(address))
		}
		return parsed, nil
	}
}

const (
	tls12 = resealv1.TLSVersion_TLS_VERSION_TLS1_2
	tls13 = resealv1.TLSVersion_TLS_VERSION_TLS1_3
)
