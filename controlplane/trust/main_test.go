package trust

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/reseal/reseal/controlplane/etcd/etcdtest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// etcd is one real embedded server for all tests; each has a prefix of its own.
var etcd *embed.Etcd

func TestMain(m *testing.M) { goleak.VerifyTestMain(withEtcd{m}) }

type withEtcd struct{ m *testing.M }

func (w withEtcd) Run() int {
	dir, err := os.MkdirTemp("", "trust")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if etcd, err = etcdtest.Start(etcdtest.Config(dir)); err != nil {
		panic(err)
	}
	defer etcd.Close()
	return w.m.Run()
}

func newClient(t *testing.T) *clientv3.Client {
	t.Helper()
	client := v3client.New(etcd.Server)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

var prefixes atomic.Int64

func newPrefix() string { return fmt.Sprintf("/test/%d/", prefixes.Add(1)) }

// logs collects what is logged, for the tests that look for secrets.
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

func newLogger(l *logs) *slog.Logger {
	return slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// testConfig is a configuration with a store and a KEK file of its own.
func testConfig(t *testing.T) Config {
	t.Helper()
	return Config{Client: newClient(t), Prefix: newPrefix(), KEKFile: filepath.Join(t.TempDir(), "kek")}
}

func openTrust(t *testing.T, cfg Config) *Trust {
	t.Helper()
	trust := New(cfg)
	if err := trust.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	return trust
}

// server is a control plane's gRPC server on loopback.
type server struct {
	trust *Trust
	addr  string
}

// serve starts a server with all services of reseal.v1. Only enrolment is
// implemented, and only if enrolment is set: what is admitted elsewhere answers
// UNIMPLEMENTED.
func serve(t *testing.T, trust *Trust, enrolment bool, options ...grpc.ServerOption) *server {
	t.Helper()
	options = append([]grpc.ServerOption{
		grpc.Creds(trust.Credentials()),
		grpc.ChainUnaryInterceptor(trust.UnaryInterceptor),
		grpc.ChainStreamInterceptor(trust.StreamInterceptor),
	}, options...)
	s := grpc.NewServer(options...)
	resealv1.RegisterAdminServiceServer(s, resealv1.UnimplementedAdminServiceServer{})
	resealv1.RegisterFeedServiceServer(s, resealv1.UnimplementedFeedServiceServer{})
	resealv1.RegisterFleetServiceServer(s, resealv1.UnimplementedFleetServiceServer{})
	resealv1.RegisterTallyServiceServer(s, resealv1.UnimplementedTallyServiceServer{})
	resealv1.RegisterKeyringServiceServer(s, resealv1.UnimplementedKeyringServiceServer{})
	resealv1.RegisterSessionServiceServer(s, resealv1.UnimplementedSessionServiceServer{})
	resealv1.RegisterPreviewServiceServer(s, resealv1.UnimplementedPreviewServiceServer{})
	resealv1.RegisterObservationServiceServer(s, resealv1.UnimplementedObservationServiceServer{})
	resealv1.RegisterLinkServiceServer(s, resealv1.UnimplementedLinkServiceServer{})
	resealv1.RegisterBackupServiceServer(s, resealv1.UnimplementedBackupServiceServer{})
	resealv1.RegisterReplicaServiceServer(s, resealv1.UnimplementedReplicaServiceServer{})
	if enrolment {
		resealv1.RegisterEnrollmentServiceServer(s, trust)
	} else {
		resealv1.RegisterEnrollmentServiceServer(s, resealv1.UnimplementedEnrollmentServiceServer{})
	}
	healthpb.RegisterHealthServer(s, health.NewServer())
	reflection.Register(s)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(listener) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &server{trust: trust, addr: listener.Addr().String()}
}

// clientTLS verifies the server as clients do: by authority and URI.
func clientTLS(trust *Trust, certificates ...tls.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(trust.CAPEM())
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Sent even when the server does not ask for one of its issuer.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if len(certificates) == 0 {
				return &tls.Certificate{}, nil
			}
			return &certificates[0], nil
		},
		InsecureSkipVerify: true, // VerifyConnection does it
		VerifyConnection: func(state tls.ConnectionState) error {
			leaf := state.PeerCertificates[0]
			if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://"+trust.trustDomain+"/controlplane" {
				return fmt.Errorf("server is %v", leaf.URIs)
			}
			_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
	}
}

func (s *server) dial(t *testing.T, certificates ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(s.trust, certificates...))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (s *server) enrollment(t *testing.T, certificates ...tls.Certificate) resealv1.EnrollmentServiceClient {
	t.Helper()
	return resealv1.NewEnrollmentServiceClient(s.dial(t, certificates...))
}

// admin is a client with an administrator's certificate.
func (s *server) admin(t *testing.T) resealv1.EnrollmentServiceClient {
	t.Helper()
	return s.enrollment(t, operator(t, s.trust, resealv1.Role_ROLE_ADMIN, "root"))
}

func operator(t *testing.T, trust *Trust, role resealv1.Role, name string) tls.Certificate {
	t.Helper()
	certPEM, keyPEM, err := trust.IssueOperator(role, name, 0)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// edgeCertificate is one as Enroll gives it.
func edgeCertificate(t *testing.T, trust *Trust, id, enrolment string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	certificate, err := trust.issueEdge(trust.opened.Load().authority, id, enrolment, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newRequest(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func parsePEM(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	block, rest := pem.Decode([]byte(text))
	if block == nil || len(bytes.TrimSpace(rest)) != 0 {
		t.Fatalf("not one PEM block: %q", text)
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

func wantCode(t *testing.T, err error, want codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != want {
		t.Fatalf("error is %v, want code %s", err, want)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not mention %q", err, word)
		}
	}
}

// faulty is a store whose transactions fail: before they do anything, or with a
// lost answer.
type faulty struct {
	clientv3.KV
	before, after atomic.Int32 // how many still fail
}

func (f *faulty) Txn(ctx context.Context) clientv3.Txn { return &faultyTxn{f.KV.Txn(ctx), f} }

type faultyTxn struct {
	clientv3.Txn
	faults *faulty
}

func (f *faultyTxn) If(cs ...clientv3.Cmp) clientv3.Txn   { f.Txn = f.Txn.If(cs...); return f }
func (f *faultyTxn) Then(ops ...clientv3.Op) clientv3.Txn { f.Txn = f.Txn.Then(ops...); return f }
func (f *faultyTxn) Else(ops ...clientv3.Op) clientv3.Txn { f.Txn = f.Txn.Else(ops...); return f }

func (f *faultyTxn) Commit() (*clientv3.TxnResponse, error) {
	if f.faults.before.Add(-1) >= 0 {
		return nil, status.Error(codes.Unavailable, "no leader")
	}
	answer, err := f.Txn.Commit()
	if f.faults.after.Add(-1) >= 0 {
		return nil, context.DeadlineExceeded
	}
	return answer, err
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 15 s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
