package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a state directory.
type memory struct {
	mu    sync.Mutex
	files map[string][]byte
	fail  error // of Write
}

func (m *memory) Read(name string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if data, ok := m.files[name]; ok {
		return bytes.Clone(data), nil
	}
	return nil, fs.ErrNotExist
}

func (m *memory) Write(name string, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	if m.files == nil {
		m.files = map[string][]byte{}
	}
	m.files[name] = bytes.Clone(data)
	return nil
}

func (m *memory) failWith(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

// plane is a control plane: an authority and what it answers.
type plane struct {
	resealv1.UnimplementedEnrollmentServiceServer

	t           testing.TB
	trustDomain string
	ttl         time.Duration
	key         *ecdsa.PrivateKey
	ca          *x509.Certificate

	mu     sync.Mutex
	fail   func(call int) error // nil: none
	lose   bool                 // carry out, then answer UNAVAILABLE
	edit   func(*resealv1.EnrollResponse)
	issue  func(*x509.Certificate)
	grace  bool // take expired certificates
	calls  int
	back   int      // came back with an expired certificate
	keys   []string // public keys of the requests
	tokens []string
	peers  []string // URIs of the callers of Renew
}

func newPlane(t testing.TB) *plane {
	p := &plane{t: t, trustDomain: "reseal", ttl: 24 * time.Hour, key: ecKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, p.key.Public(), p.key)
	if err != nil {
		t.Fatal(err)
	}
	if p.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return p
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func toPEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func (p *plane) hash() string {
	sum := sha256.Sum256(p.ca.Raw)
	return hex.EncodeToString(sum[:])
}

func (p *plane) token(n string) string { return p.hash() + ".id" + n + ".secret" + n }

// sign issues a certificate; edit may make it strange.
func (p *plane) sign(path string, key crypto.PublicKey, ttl time.Duration, edit func(*x509.Certificate)) []byte {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-min(time.Minute, ttl/20)),
		NotAfter:     time.Now().Add(ttl),
		URIs:         []*url.URL{{Scheme: "spiffe", Host: p.trustDomain, Path: path}},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if edit != nil {
		edit(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, key, p.key)
	if err != nil {
		p.t.Error(err)
	}
	return der
}

func (p *plane) certificate(path string, ttl time.Duration) tls.Certificate {
	key := ecKey(p.t)
	return tls.Certificate{Certificate: [][]byte{p.sign(path, key.Public(), ttl, nil)}, PrivateKey: key}
}

// answer is what Enroll and Renew have in common.
func (p *plane) answer(request []byte, id string) (string, error) {
	p.calls++
	if p.fail != nil {
		if err := p.fail(p.calls); err != nil {
			return "", err
		}
	}
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return "", status.Error(codes.InvalidArgument, err.Error())
	}
	p.keys = append(p.keys, hex.EncodeToString(csr.RawSubjectPublicKeyInfo))
	if p.lose {
		p.lose = false
		return "", status.Error(codes.Unavailable, "the answer is lost")
	}
	return toPEM(p.sign("/edge/"+id, csr.PublicKey, p.ttl, p.issue)), nil
}

func (p *plane) Enroll(_ context.Context, req *resealv1.EnrollRequest) (*resealv1.EnrollResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case req.GetExpired() == nil:
		p.tokens = append(p.tokens, req.GetToken())
	case !p.grace:
		return nil, status.Error(codes.PermissionDenied, "too late")
	default:
		p.back++
	}
	certificate, err := p.answer(req.GetCertificateRequest(), req.GetId())
	if err != nil {
		return nil, err
	}
	response := &resealv1.EnrollResponse{CertificatePem: certificate, CaPem: toPEM(p.ca.Raw), TrustDomain: p.trustDomain}
	if p.edit != nil {
		p.edit(response)
	}
	return response, nil
}

func (p *plane) Renew(ctx context.Context, req *resealv1.RenewRequest) (*resealv1.RenewResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if caller, ok := peer.FromContext(ctx); ok {
		if info, ok := caller.AuthInfo.(credentials.TLSInfo); ok && len(info.State.VerifiedChains) > 0 {
			p.peers = append(p.peers, info.State.PeerCertificates[0].URIs[0].String())
		}
	}
	certificate, err := p.answer(req.GetCertificateRequest(), "e1")
	if err != nil {
		return nil, err
	}
	return &resealv1.RenewResponse{CertificatePem: certificate, CaPem: toPEM(p.ca.Raw)}, nil
}

func (p *plane) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

// serve starts the control plane on loopback with the given certificate, nil:
// as it should be.
func (p *plane) serve(t *testing.T, certificate *tls.Certificate) string {
	t.Helper()
	if certificate == nil {
		made := p.certificate("/controlplane", time.Hour)
		made.Certificate = append(made.Certificate, p.ca.Raw)
		certificate = &made
	}
	roots := x509.NewCertPool()
	roots.AddCert(p.ca)
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{*certificate}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: roots,
	})))
	resealv1.RegisterEnrollmentServiceServer(server, p)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

// direct calls the control plane without any network, for tests in fake time, as edges
// do: what they don't call it does not have.
type direct struct {
	resealv1.EnrollmentServiceClient
	p *plane
}

func (d direct) connect(string, *tls.Config) (resealv1.EnrollmentServiceClient, func(), error) {
	return d, func() {}, nil
}

func (d direct) Enroll(ctx context.Context, req *resealv1.EnrollRequest, _ ...grpc.CallOption) (*resealv1.EnrollResponse, error) {
	return d.p.Enroll(ctx, req)
}

func (d direct) Renew(ctx context.Context, req *resealv1.RenewRequest, _ ...grpc.CallOption) (*resealv1.RenewResponse, error) {
	return d.p.Renew(ctx, req)
}

func writeToken(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// testConfig is edge e1 with a token of p.
func testConfig(t *testing.T, p *plane, addresses ...string) Config {
	t.Helper()
	path := filepath.Join(t.TempDir(), "token")
	writeToken(t, path, p.token("1"))
	return Config{ID: "e1", TokenFile: path, ControlPlane: addresses, State: &memory{}}
}

// newDirect is an Identity that reaches p without network.
func newDirect(t *testing.T, p *plane, cfg Config) *Identity {
	t.Helper()
	if len(cfg.ControlPlane) == 0 {
		cfg.ControlPlane = []string{"direct"}
	}
	i := New(cfg)
	i.connect = direct{p: p}.connect
	return i
}

func ensure(t *testing.T, i *Identity) {
	t.Helper()
	if err := i.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err, want error, words ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not mention %q", err, word)
		}
	}
}

type logs struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func newLogger(l *logs) *slog.Logger { return slog.New(slog.NewJSONHandler(l, nil)) }
