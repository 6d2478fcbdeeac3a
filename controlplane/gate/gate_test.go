package gate

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a gRPC server behind a gate, with a certificate that its clients use too.
type server struct {
	gate        *Gate
	addr        string
	certificate tls.Certificate
}

func serve(t *testing.T, limits Limits) *server {
	t.Helper()
	certificate := selfSigned(t)
	roots := x509.NewCertPool()
	roots.AddCert(certificate.Leaf)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := New(limits, slog.New(slog.DiscardHandler))
	s := grpc.NewServer(grpc.Creds(g.Credentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{certificate}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: roots,
	}))))
	healthpb.RegisterHealthServer(s, health.NewServer())
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = g.Run(ctx) })
	running.Go(func() { _ = s.Serve(g.Listener(inner)) })
	t.Cleanup(func() {
		cancel()
		s.Stop()
		running.Wait()
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.all != 0 || g.count != 0 || len(g.anonymous) != 0 {
			t.Errorf("%d connections are counted in the end, %d of them anonymous", g.all, g.count)
		}
	})
	return &server{g, inner.Addr().String(), certificate}
}

func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// anonymous opens a connection without a certificate; with TLS if shaken is set.
func (s *server) anonymous(t *testing.T, shaken bool) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if !shaken {
		return c
	}
	secured := tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13})
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if err := secured.Handshake(); err != nil {
		return c // it was ended for a newer one
	}
	_, _ = secured.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	return secured
}

func (s *server) known(t *testing.T) healthpb.HealthClient {
	t.Helper()
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		InsecureSkipVerify: true, Certificates: []tls.Certificate{s.certificate}, MinVersion: tls.VersionTLS13,
	})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return healthpb.NewHealthClient(conn)
}

func check(t *testing.T, client healthpb.HealthClient) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("a caller with a certificate: %v", err)
	}
}

func (g *Gate) counts() (all, anonymous int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.all, g.count
}

// TestKnownCallersGetIn: many more anonymous connections than there is room for, in
// any state, keep nobody out who has a certificate, and end none of theirs.
func TestKnownCallersGetIn(t *testing.T) {
	limits := Limits{All: 40, Anonymous: 12, PerSource: 8}
	s := serve(t, limits)
	first := s.known(t)
	check(t, first)
	for i := range 60 {
		s.anonymous(t, i%2 == 0)
		if all, anonymous := s.gate.counts(); all > limits.All || anonymous > limits.PerSource {
			t.Fatalf("%d connections, %d of them anonymous", all, anonymous)
		}
	}
	for range 5 {
		check(t, s.known(t))
	}
	check(t, first)
}

// TestFull: when all have certificates, the newest is turned away.
func TestFull(t *testing.T) {
	s := serve(t, Limits{All: 3, Anonymous: 2, PerSource: 2})
	for range 3 {
		check(t, s.known(t))
	}
	c := s.anonymous(t, false)
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("one more than there is room for: %v", err)
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// TestMaxBytes: an anonymous caller can't make the server buffer without end.
func TestMaxBytes(t *testing.T) {
	s := serve(t, Limits{})
	c := s.anonymous(t, true)
	data := make([]byte, 64<<10)
	sent := 0
	for sent < 8*MaxBytes {
		n, err := c.Write(data)
		if sent += n; err != nil {
			return
		}
	}
	t.Errorf("%d bytes were taken", sent)
}

// TestOverdue ends those that are silent, and those that are old; known ones never.
func TestOverdue(t *testing.T) {
	g := New(Limits{}, slog.New(slog.DiscardHandler))
	enter := func() *conn {
		ours, theirs := net.Pipe()
		t.Cleanup(func() { ours.Close(); theirs.Close() })
		return g.enter(ours)
	}
	silent, busy, old, known := enter(), enter(), enter(), enter()
	known.shook(true)
	now := time.Now().Add(IdleTimeout + time.Second)
	busy.heard.Store(now.UnixNano())
	old.heard.Store(now.UnixNano())
	old.since = now.Add(-Lifetime - time.Second)
	ended := g.overdue(now)
	if len(ended) != 2 || ended[0] != silent || ended[1] != old {
		t.Errorf("%d are overdue", len(ended))
	}
	for _, c := range []*conn{silent, busy, old, known, known} {
		_ = c.Close()
	}
	if all, anonymous := g.counts(); all != 0 || anonymous != 0 {
		t.Errorf("%d, %d are left", all, anonymous)
	}
}

// TestOtherSourcesKeepTheirs: room is made by whoever has the most.
func TestOtherSourcesKeepTheirs(t *testing.T) {
	g := New(Limits{All: 100, Anonymous: 5, PerSource: 4}, slog.New(slog.DiscardHandler))
	var all []*conn
	enter := func(ip string) *conn {
		ours, theirs := net.Pipe()
		t.Cleanup(func() { ours.Close(); theirs.Close() })
		c := g.enter(from{ours, &net.TCPAddr{IP: net.ParseIP(ip)}})
		all = append(all, c)
		return c
	}
	lonely := enter("2001:db8:1::1")
	for range 10 {
		enter("2001:db8:2::1")
		enter("2001:db8:2::2")
	}
	second := enter("192.0.2.1")
	g.mu.Lock()
	if !lonely.anonymous || !second.anonymous || g.count > 5 {
		t.Errorf("who has one lost it, or there are too many: %d", g.count)
	}
	g.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
	if got := sourceOf(&net.TCPAddr{IP: net.ParseIP("::ffff:192.0.2.1")}); got != netip.MustParsePrefix("192.0.2.1/32") {
		t.Errorf("a mapped address is %v", got)
	}
}

type from struct {
	net.Conn
	address net.Addr
}

func (f from) RemoteAddr() net.Addr { return f.address }
