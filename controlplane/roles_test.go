package controlplane

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// bench is a whole control plane, and callers of it.
type bench struct {
	t       *testing.T
	plane   *ControlPlane
	address string
	roots   *x509.CertPool
	local   *grpc.ClientConn // the administrator of the first start
}

func newBench(t *testing.T) *bench {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t.TempDir())
	cfg.Listen = free.Addr().String()
	cfg.AuditLog = filepath.Join(cfg.DataDir, "audit.json")
	_ = free.Close()
	b := &bench{t: t, address: cfg.Listen, roots: x509.NewCertPool()}
	b.plane, _ = start(t, cfg)
	var file struct {
		Contexts []struct {
			CAPEM          string `yaml:"caPem"`
			CertificatePEM string `yaml:"certificatePem"`
			PrivateKeyPEM  string `yaml:"privateKeyPem"`
		}
	}
	if err := yaml.Unmarshal([]byte(read(t, filepath.Join(cfg.DataDir, "admin.yaml"))), &file); err != nil {
		t.Fatal(err)
	}
	c := file.Contexts[0]
	b.roots.AppendCertsFromPEM([]byte(c.CAPEM))
	pair, err := tls.X509KeyPair([]byte(c.CertificatePEM), []byte(c.PrivateKeyPEM))
	if err != nil {
		t.Fatal(err)
	}
	b.local = b.dial(pair)
	return b
}

func (b *bench) dial(certificates ...tls.Certificate) *grpc.ClientConn {
	b.t.Helper()
	conn, err := grpc.NewClient(b.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // who the server is is not what is tested
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if len(certificates) == 0 {
				return &tls.Certificate{}, nil
			}
			return &certificates[0], nil
		},
	})))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// key makes a key, and the request for its certificate.
func (b *bench) key() (*ecdsa.PrivateKey, []byte) {
	b.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.t.Fatal(err)
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		b.t.Fatal(err)
	}
	return key, request
}

func (b *bench) pair(certPEM string, key *ecdsa.PrivateKey) tls.Certificate {
	block, _ := pem.Decode([]byte(certPEM))
	return tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: key}
}

func (b *bench) user(role resealv1.Role, name string) tls.Certificate {
	b.t.Helper()
	key, request := b.key()
	made, err := resealv1.NewEnrollmentServiceClient(b.local).CreateUser(b.t.Context(), &resealv1.CreateUserRequest{
		Name: name, Role: role, CertificateRequest: request, Ttl: durationpb.New(time.Hour)})
	if err != nil {
		b.t.Fatal(err)
	}
	return b.pair(made.GetCertificatePem(), key)
}

func (b *bench) edge(id string) tls.Certificate {
	b.t.Helper()
	token, err := resealv1.NewEnrollmentServiceClient(b.local).CreateToken(b.t.Context(), &resealv1.CreateTokenRequest{Id: id})
	if err != nil {
		b.t.Fatal(err)
	}
	key, request := b.key()
	answer, err := resealv1.NewEnrollmentServiceClient(b.dial()).Enroll(b.t.Context(), &resealv1.EnrollRequest{Token: token.GetToken(), Id: id, CertificateRequest: request})
	if err != nil {
		b.t.Fatal(err)
	}
	return b.pair(answer.GetCertificatePem(), key)
}

// foreign is a certificate for the same identity that another authority signed.
func (b *bench) foreign(of tls.Certificate) tls.Certificate {
	b.t.Helper()
	leaf, err := x509.ParseCertificate(of.Certificate[0])
	if err != nil {
		b.t.Fatal(err)
	}
	key, _ := b.key()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: leaf.NotAfter, URIs: leaf.URIs, ExtKeyUsage: leaf.ExtKeyUsage}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		b.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// selfSigned makes a certificate of a site, and its key, in PEM.
func selfSigned(t *testing.T, key *ecdsa.PrivateKey) (keyPEM, certPEM string) {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"site.example"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// expired is a certificate that was one of the fleet's until now.
func (b *bench) expired(role resealv1.Role) tls.Certificate {
	b.t.Helper()
	certPEM, keyPEM, err := b.plane.trust.IssueOperator(role, "late", time.Second)
	if err != nil {
		b.t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		b.t.Fatal(err)
	}
	time.Sleep(time.Until(pair.Leaf.NotAfter) + 10*time.Millisecond)
	return pair
}

// methods are all of reseal.v1.
func methods() []protoreflect.MethodDescriptor {
	var found []protoreflect.MethodDescriptor
	protoregistry.GlobalFiles.RangeFilesByPackage("reseal.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			for j := range file.Services().Get(i).Methods().Len() {
				found = append(found, file.Services().Get(i).Methods().Get(j))
			}
		}
		return true
	})
	return found
}

// call makes a call and returns how it ended. A stream that goes on is cut off.
func call(ctx context.Context, conn *grpc.ClientConn, method protoreflect.MethodDescriptor, message proto.Message) error {
	ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	name := "/" + string(method.Parent().FullName()) + "/" + string(method.Name())
	if !method.IsStreamingClient() && !method.IsStreamingServer() {
		return conn.Invoke(ctx, name, message, &emptypb.Empty{})
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, name)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(message); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_ = stream.CloseSend()
	for {
		if err := stream.RecvMsg(&emptypb.Empty{}); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// TestWhoMayCallWhat drives every method with every kind of caller: who may not gets
// the exact code, and who may gets an answer of the method itself.
func TestWhoMayCallWhat(t *testing.T) {
	b := newBench(t)
	enrollment := resealv1.NewEnrollmentServiceClient(b.local)
	revoked := map[string]tls.Certificate{
		"revoked edge": b.edge("gone"), "revoked viewer": b.user(resealv1.Role_ROLE_VIEWER, "gone-v"),
		"revoked operator": b.user(resealv1.Role_ROLE_OPERATOR, "gone-o"), "revoked admin": b.user(resealv1.Role_ROLE_ADMIN, "gone-a"),
	}
	if _, err := enrollment.RevokeEdge(t.Context(), &resealv1.RevokeEdgeRequest{Id: "gone"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"gone-v", "gone-o", "gone-a"} {
		if _, err := enrollment.RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	edge, viewer, admin := b.edge("e1"), b.user(resealv1.Role_ROLE_VIEWER, "v"), b.user(resealv1.Role_ROLE_ADMIN, "a")
	callers := map[string]*grpc.ClientConn{
		"anonymous": b.dial(), "edge": b.dial(edge), "viewer": b.dial(viewer),
		"operator": b.dial(b.user(resealv1.Role_ROLE_OPERATOR, "o")), "admin": b.dial(admin),
	}
	outside := map[string]*grpc.ClientConn{
		"expired viewer": b.dial(b.expired(resealv1.Role_ROLE_VIEWER)), "expired admin": b.dial(b.expired(resealv1.Role_ROLE_ADMIN)),
		"edge of another authority": b.dial(b.foreign(edge)), "admin of another authority": b.dial(b.foreign(admin)),
	}
	admits := map[resealv1.Role][]string{
		resealv1.Role_ROLE_ANONYMOUS: {"anonymous"}, resealv1.Role_ROLE_EDGE: {"edge"}, resealv1.Role_ROLE_VIEWER: {"viewer", "operator", "admin"},
		resealv1.Role_ROLE_OPERATOR: {"operator", "admin"}, resealv1.Role_ROLE_ADMIN: {"admin"},
	}
	for who, certificate := range revoked {
		callers[who] = b.dial(certificate)
	}
	own := map[protoreflect.Name]proto.Message{"Report": &resealv1.ReportRequest{Edge: "e1", BootId: "b"}, "Hold": &resealv1.HoldRequest{Edge: "e1"}}
	for _, method := range methods() {
		var message proto.Message = &emptypb.Empty{}
		if own[method.Name()] != nil {
			message = own[method.Name()]
		}
		if strings.HasSuffix(string(method.Name()), "Rollout") && method.Name() != "GetRollout" {
			// These answer, or not, by whether one is under way; so do their roles in
			// trust's own test.
			continue
		}
		allow, _ := proto.GetExtension(method.Options(), resealv1.E_Allow).([]resealv1.Role)
		admitted := map[string]bool{}
		for _, role := range allow {
			for _, who := range admits[role] {
				admitted[who] = true
			}
		}
		for who, conn := range callers {
			got := status.Code(call(t.Context(), conn, method, message))
			want := codes.PermissionDenied
			if _, gone := revoked[who]; gone || who == "anonymous" {
				want = codes.Unauthenticated
			}
			switch {
			case !admitted[who] && got != want:
				t.Errorf("%s calls %s: %s, want %s", who, method.FullName(), got, want)
			case admitted[who] && (got == codes.Unauthenticated || got == codes.Unimplemented || got == codes.Unknown || got == codes.Internal ||
				got == codes.PermissionDenied && method.Name() != "Enroll"): // with an empty token
				t.Errorf("%s calls %s: %s, want an answer", who, method.FullName(), got)
			}
		}
		for who, conn := range outside {
			if got := status.Code(call(t.Context(), conn, method, message)); got != codes.Unavailable {
				t.Errorf("%s calls %s: %s, want no connection", who, method.FullName(), got)
			}
		}
	}
}

// TestEdgeSpeaksAsItself: an edge that names another one gets nothing of it.
func TestEdgeSpeaksAsItself(t *testing.T) {
	b := newBench(t)
	b.edge("e2")
	conn := b.dial(b.edge("e1"))
	for name, message := range map[string]proto.Message{
		"reseal.v1.FeedService.Sync":    &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Hello{Hello: &resealv1.Hello{Edge: "e2", BootId: "b"}}},
		"reseal.v1.KeyringService.Hold": &resealv1.HoldRequest{Edge: "e2"},
		"reseal.v1.TallyService.Report": &resealv1.ReportRequest{Edge: "e2", BootId: "b"},
		"reseal.v1.SessionService.Exchange": &resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Join{
			Join: &resealv1.ExchangeJoin{Edge: "e2", BootId: "b"}}},
	} {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := call(t.Context(), conn, found.(protoreflect.MethodDescriptor), message); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRevokedStreams: what a user watches, and the streams of an edge, end within a
// second, with the reason.
func TestRevokedStreams(t *testing.T) {
	b := newBench(t)
	watch, err := resealv1.NewAdminServiceClient(b.dial(b.user(resealv1.Role_ROLE_VIEWER, "vera"))).Watch(t.Context(), &resealv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	link, err := resealv1.NewLinkServiceClient(b.dial(b.edge("e1"))).Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	linked := make(chan error, 1)
	go func() {
		_, err := link.Recv()
		linked <- err
	}()
	enrollment := resealv1.NewEnrollmentServiceClient(b.local)
	begun := time.Now()
	if _, err := enrollment.RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: "vera", Reason: "left us"}); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = watch.Recv()
	}
	if took := time.Since(begun); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "left us") || took > time.Second {
		t.Errorf("the watch ended with %v after %s", err, took)
	}
	begun = time.Now()
	answer, err := enrollment.RevokeEdge(t.Context(), &resealv1.RevokeEdgeRequest{Id: "e1"})
	if err != nil {
		t.Fatal(err)
	}
	if err, took := <-linked, time.Since(begun); err == nil || took > time.Second {
		t.Errorf("the link ended with %v after %s", err, took)
	}
	// It was not connected as one that holds keys, so it may have any.
	if keys := answer.GetHeldKeys(); len(keys) != 1 || keys[0].GetKeyring() != "default" || len(keys[0].GetEpochs()) == 0 {
		t.Errorf("held keys %v", keys)
	}
}
