package share_test

import (
	"bufio"
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
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/reseal/reseal/controlplane/sessions"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/session"
	"github.com/reseal/reseal/edge/share"
	"github.com/reseal/reseal/integration/process"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// world is a control plane's relay with an authority, which edges join.
type world struct {
	t     *testing.T
	key   *ecdsa.PrivateKey
	ca    *x509.Certificate
	roots *x509.CertPool

	mu       sync.Mutex
	listener *bufconn.Listener
	relay    *sessions.Server
	stop     func()
	allowed  func(labels map[string]string) []string
	serial   int64
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, roots: x509.NewCertPool(), allowed: func(map[string]string) []string { return []string{"p"} }}
	w.key = newKey(t)
	w.ca = &x509.Certificate{
		Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	w.ca = w.issue(w.ca, w.key)
	w.roots.AddCert(w.ca)
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (w *world) issue(template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	w.t.Helper()
	w.serial++
	template.SerialNumber = big.NewInt(w.serial)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, w.ca, &key.PublicKey, w.key)
	if err != nil {
		w.t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	return certificate
}

// start starts the relay, anew.
func (w *world) start() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stop != nil {
		w.stop()
	}
	relay := sessions.New(sessions.Config{
		Edge: func(ctx context.Context) (string, map[string]string, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			if id := md.Get("edge"); len(id) == 1 {
				return id[0], nil, nil
			}
			return "", nil, errors.New("who is it?")
		},
		Pools: func(labels map[string]string) []string {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.allowed(labels)
		},
		Revision: func() int64 { return 1 },
		Roots:    func() *x509.CertPool { return w.roots },
	})
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	resealv1.RegisterSessionServiceServer(server, relay)
	ctx, cancel := context.WithCancel(context.Background())
	var group errgroup.Group
	group.Go(func() error { return relay.Run(ctx) })
	group.Go(func() error { return server.Serve(listener) })
	w.listener, w.relay = listener, relay
	w.stop = func() {
		cancel()
		server.Stop()
		if err := group.Wait(); err != nil {
			w.t.Error(err)
		}
	}
}

func (w *world) dial(edge string) resealv1.SessionServiceClient {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:relay",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			w.mu.Lock()
			listener := w.listener
			w.mu.Unlock()
			return listener.DialContext(ctx)
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
			streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return streamer(metadata.AppendToOutgoingContext(ctx, "edge", edge), desc, cc, method, opts...)
		}))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return resealv1.NewSessionServiceClient(conn)
}

// edge is one node: its sessions, and its share in the relay.
type edge struct {
	w      *world
	id     string
	store  *session.Store
	share  *share.Share
	client *tls.Config
	stop   func()
}

const identity = "g|backend|example.test"

// join starts an edge and waits, as its start does, for what others hold.
func (w *world) join(id string, store *session.Store, client *tls.Config) *edge {
	w.t.Helper()
	e := w.edge(id, store, client)
	e.serve(e.pool())
	return e
}

// edge starts an edge that does not know yet what it will serve.
func (w *world) edge(id string, store *session.Store, client *tls.Config) *edge {
	w.t.Helper()
	e := &edge{w: w, id: id, store: store, client: client}
	w.serial++
	boot := fmt.Sprintf("%s-%d", id, w.serial)
	key := newKey(w.t)
	certificate := w.issue(&x509.Certificate{
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "reseal", Path: "/edge/" + id}},
	}, key)
	e.share = share.New(share.Config{
		Edge: id, BootID: boot, Labels: map[string]string{"edge": id}, Client: w.dial(id), Sessions: store,
		Credentials: func() (*x509.Certificate, *ecdsa.PrivateKey, *x509.CertPool, bool) {
			return certificate, key, w.roots, true
		},
		Logger: slog.New(slog.NewTextHandler(w.t.Output(), nil)),
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.share.Run(ctx) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(e.stop)
	return e
}

func (e *edge) pool() share.Pool {
	return share.Pool{Name: "p", Group: "g", TLS: func(identity exchange.Identity) *tls.Config {
		cfg := e.client.Clone()
		cfg.ServerName = string(identity[strings.LastIndexByte(string(identity), '|')+1:])
		return cfg
	}}
}

// serve gives the edge its pools and waits as an edge does.
func (e *edge) serve(pools ...share.Pool) {
	e.w.t.Helper()
	e.share.Update(pools)
	select {
	case <-e.share.Ready():
	case <-time.After(10 * time.Second):
		e.w.t.Fatalf("%s is not ready", e.id)
	}
}

func (e *edge) holds() bool {
	some, _, _ := e.store.Holds("g")
	return some
}

// restart stops an edge and starts it with what it kept.
func (e *edge) restart() *edge {
	e.w.t.Helper()
	e.stop()
	store := session.New(session.Config{})
	if _, err := store.Import(e.store.Export(time.Now(), true), time.Now()); err != nil {
		e.w.t.Fatal(err)
	}
	return e.w.join(e.id, store, e.client)
}

// visit makes one connection with a request.
func (e *edge) visit(address string) resealv1.Mechanism {
	e.w.t.Helper()
	attempt, err := e.store.Reserve(e.w.t.Context(), identity, exchange.Terms{Wait: 2 * time.Second, TicketWait: 2 * time.Second})
	if err != nil {
		e.w.t.Fatal(err)
	}
	conn, err := net.Dial("tcp", address)
	if err != nil {
		e.w.t.Fatal(err)
	}
	defer conn.Close()
	tc, mechanism, _, err := attempt.Handshake(e.w.t.Context(), conn, e.client)
	if err != nil {
		e.w.t.Fatal(err)
	}
	fmt.Fprint(tc, "GET / HTTP/1.0\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(tc), nil)
	if err != nil {
		e.w.t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, response.Body)
	response.Body.Close()
	tc.Close()
	return mechanism
}

// backend is a TLS server that counts.
type backend struct {
	address string
	client  *tls.Config

	mu      sync.Mutex
	full    int
	resumed int
	tickets map[string]*tls.SessionState // of a server that takes each once
	twice   int                          // tickets that were offered again
}

func (b *backend) count() (full, resumed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.full, b.resumed
}

func serverCertificate(t *testing.T) (tls.Certificate, *tls.Config) {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"example.test"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, &tls.Config{RootCAs: roots, ServerName: "example.test"}
}

// goBackend is a server of crypto/tls.
func goBackend(t *testing.T, version uint16, once bool) *backend {
	certificate, client := serverCertificate(t)
	b := &backend{client: client, tickets: map[string]*tls.SessionState{}}
	cfg := &tls.Config{Certificates: []tls.Certificate{certificate}, MaxVersion: version}
	if once {
		cfg.WrapSession, cfg.UnwrapSession = b.wrap, b.unwrap
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.address = listener.Addr().String()
	server := &http.Server{
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo),
		Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			b.mu.Lock()
			defer b.mu.Unlock()
			if r.TLS.DidResume {
				b.resumed++
			} else {
				b.full++
			}
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-done })
	return b
}

func (b *backend) wrap(_ tls.ConnectionState, state *tls.SessionState) ([]byte, error) {
	name := make([]byte, 16)
	_, _ = rand.Read(name)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tickets[string(name)] = state
	return name, nil
}

func (b *backend) unwrap(name []byte, _ tls.ConnectionState) (*tls.SessionState, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	state := b.tickets[string(name)]
	if state == nil {
		b.twice++
		return nil, nil
	}
	b.tickets[string(name)] = nil
	return state, nil
}

// opensslBackend gives out TLS 1.2 session IDs and no tickets.
func opensslBackend(t *testing.T) *backend {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: run integration/setup.sh")
	}
	certificate, client := serverCertificate(t)
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "server.pem")
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	address, err := process.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	b := &backend{address: address, client: client}
	cmd := exec.Command(openssl, "s_server", "-accept", b.address, "-cert", file, "-key", file, "-www", "-quiet", "-no_ticket", "-tls1_2")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for range 200 {
		conn, err := net.Dial("tcp", b.address)
		if err == nil {
			conn.Close()
			return b
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("openssl s_server does not listen")
	return nil
}

// Eight edges that are started one after another, the first warmed by one
// request, and each restarted once, cost the backend one full handshake.
func TestFleetPaysOnce(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T) *backend{
		"session IDs":     opensslBackend,
		"TLS 1.2 tickets": func(t *testing.T) *backend { return goBackend(t, tls.VersionTLS12, false) },
		"TLS 1.3":         func(t *testing.T) *backend { return goBackend(t, tls.VersionTLS13, false) },
		"single use":      func(t *testing.T) *backend { return goBackend(t, tls.VersionTLS13, true) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, w := start(t), newWorld(t)
			full := 0
			visit := func(e *edge) {
				if e.visit(b.address) == 0 {
					full++
				}
			}
			var edges []*edge
			for i := range 8 {
				edges = append(edges, w.join(fmt.Sprintf("e%d", i), session.New(session.Config{}), b.client))
				visit(edges[i])
				settle()
			}
			for i, e := range edges {
				edges[i] = e.restart()
				visit(edges[i])
				settle()
			}
			if full != 1 {
				t.Errorf("%d full handshakes", full)
			}
			if seen, resumed := b.count(); b.tickets != nil && (seen != 1 || resumed != 15 || b.twice != 0) {
				t.Errorf("the backend saw %d full, %d resumed, %d tickets twice", seen, resumed, b.twice)
			}
		})
	}
}

// settle gives announcements of what an edge holds the time to arrive.
func settle() { time.Sleep(300 * time.Millisecond) }

// until waits for something that happens soon, where nobody else uses the machine.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Edges that are up and cold get the session of the first that makes one, over a
// relay that was restarted too.
func TestNewSessionsReachAll(t *testing.T) {
	t.Parallel()
	b, w := opensslBackend(t), newWorld(t)
	var edges []*edge
	for i := range 4 {
		edges = append(edges, w.join(fmt.Sprintf("e%d", i), session.New(session.Config{}), b.client))
	}
	w.start() // the relay forgets all
	full := 0
	if edges[0].visit(b.address) == 0 {
		full++
	}
	for _, e := range edges {
		until(t, e.id+" got no session", func() bool { return e.holds() })
		if e.visit(b.address) != resealv1.Mechanism_MECHANISM_SESSION_ID {
			full++
		}
	}
	if full != 1 {
		t.Errorf("%d full handshakes", full)
	}
}

// Labels that select none of the pool's listeners get nothing, and what came from
// an edge that is revoked goes.
func TestOnlyEdgesOfThePool(t *testing.T) {
	t.Parallel()
	b, w := opensslBackend(t), newWorld(t)
	w.mu.Lock()
	w.allowed = func(labels map[string]string) []string {
		if labels["edge"] == "outside" {
			return []string{"other"}
		}
		return []string{"p"}
	}
	w.mu.Unlock()
	warm := w.join("warm", session.New(session.Config{}), b.client)
	warm.visit(b.address)
	settle()
	inside := w.join("inside", session.New(session.Config{}), b.client)
	outside := w.join("outside", session.New(session.Config{}), b.client)
	if !inside.holds() || outside.holds() {
		t.Fatalf("inside %t, outside %t", inside.holds(), outside.holds())
	}
	w.relay.Revoke("warm")
	until(t, "sessions of a revoked edge stay", func() bool { return !inside.holds() })
}

// What is sent says nothing to the control plane: neither the secret nor the
// session's ID stands in any message.
func TestRelaySeesNoSecret(t *testing.T) {
	t.Parallel()
	b, w := goBackend(t, tls.VersionTLS12, false), newWorld(t)
	warm := w.join("warm", session.New(session.Config{}), b.client)
	warm.visit(b.address)
	settle()
	var secrets [][]byte
	for _, containers := range warm.store.Deal("g", 1, 8) {
		secrets = append(secrets, containers[0])
	}
	if len(secrets) != 1 {
		t.Fatal(len(secrets))
	}
	got := w.watch("spy")
	until(t, "no offer came", func() bool { return len(got()) > 0 })
	for _, offer := range got() {
		for i := 0; i+32 < len(secrets[0]); i++ {
			if bytes.Contains(offer.GetCiphertext(), secrets[0][i:i+32]) {
				t.Fatal("the session is in clear")
			}
		}
	}
}

// watch joins as an edge that only looks at the offers.
func (w *world) watch(id string) func() []*resealv1.SessionOffer {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := w.dial(id).Exchange(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	certificate := w.issue(&x509.Certificate{
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "reseal", Path: "/edge/" + id}},
	}, newKey(w.t))
	if err := stream.Send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Join{Join: &resealv1.ExchangeJoin{
		Edge: id, BootId: id, Certificate: certificate.Raw, Pools: []string{"p"},
	}}}); err != nil {
		w.t.Fatal(err)
	}
	var mu sync.Mutex
	var offers []*resealv1.SessionOffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			message, err := stream.Recv()
			if err != nil {
				return
			}
			if offer := message.GetOffer(); offer != nil {
				mu.Lock()
				offers = append(offers, offer)
				mu.Unlock()
			}
		}
	}()
	w.t.Cleanup(func() { cancel(); <-done })
	return func() []*resealv1.SessionOffer {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(offers)
	}
}

// A pool that comes new to an edge that is up is waited for, too, and only that.
func TestNewPoolIsWaitedFor(t *testing.T) {
	t.Parallel()
	b, w := opensslBackend(t), newWorld(t)
	warm := w.join("warm", session.New(session.Config{}), b.client)
	warm.visit(b.address)
	settle()
	late := w.edge("late", session.New(session.Config{}), b.client)
	late.serve()
	late.serve(late.pool())
	if got := late.visit(b.address); got != resealv1.Mechanism_MECHANISM_SESSION_ID {
		t.Errorf("the first handshake: %v", got)
	}
	late.share.Update([]share.Pool{late.pool()})
	select {
	case <-late.share.Ready():
	default:
		t.Error("a pool that stays is waited for again")
	}
}
