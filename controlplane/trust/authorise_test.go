package trust

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	anonymous = resealv1.Role_ROLE_ANONYMOUS
	edgeRole  = resealv1.Role_ROLE_EDGE
	viewer    = resealv1.Role_ROLE_VIEWER
	operating = resealv1.Role_ROLE_OPERATOR
	admin     = resealv1.Role_ROLE_ADMIN
)

// satisfiedBy are the callers that each role in an allow option admits.
var satisfiedBy = map[resealv1.Role][]string{
	anonymous: {"anonymous"},
	edgeRole:  {"edge"},
	viewer:    {"viewer", "operator", "admin"},
	operating: {"operator", "admin"},
	admin:     {"admin"},

	resealv1.Role_ROLE_REPLICA: {"replica"},
}

func resealMethods(t *testing.T) []protoreflect.MethodDescriptor {
	t.Helper()
	var methods []protoreflect.MethodDescriptor
	protoregistry.GlobalFiles.RangeFilesByPackage("reseal.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			for j := range file.Services().Get(i).Methods().Len() {
				methods = append(methods, file.Services().Get(i).Methods().Get(j))
			}
		}
		return true
	})
	if len(methods) < 18 {
		t.Fatalf("only %d methods are registered", len(methods))
	}
	return methods
}

func fullName(method protoreflect.MethodDescriptor) string {
	return "/" + string(method.Parent().FullName()) + "/" + string(method.Name())
}

// call makes an empty call and returns how it ended.
func call(ctx context.Context, conn *grpc.ClientConn, method protoreflect.MethodDescriptor) error {
	if !method.IsStreamingClient() && !method.IsStreamingServer() {
		return conn.Invoke(ctx, fullName(method), &emptypb.Empty{}, &emptypb.Empty{})
	}
	desc := &grpc.StreamDesc{ClientStreams: method.IsStreamingClient(), ServerStreams: method.IsStreamingServer()}
	stream, err := conn.NewStream(ctx, desc, fullName(method))
	if err != nil {
		return err
	}
	if err := stream.SendMsg(&emptypb.Empty{}); err != nil && err != io.EOF {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return stream.RecvMsg(&emptypb.Empty{})
}

func callers(t *testing.T, s *server) map[string]*grpc.ClientConn {
	t.Helper()
	return map[string]*grpc.ClientConn{
		"anonymous":    s.dial(t),
		"edge":         s.dial(t, edgeCertificate(t, s.trust, "e1", "")),
		"viewer":       s.dial(t, operator(t, s.trust, viewer, "v")),
		"operator":     s.dial(t, operator(t, s.trust, operating, "o")),
		"admin":        s.dial(t, operator(t, s.trust, admin, "a")),
		"controlplane": s.dial(t, *s.trust.server.Load()),
		"replica":      s.dial(t, replicaCertificateOf(t, s.trust, "r1")),
	}
}

func TestRoleMatrix(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	for name, options := range map[string][]grpc.ServerOption{
		"interceptors": nil,
		"tap":          {grpc.InTapHandle(trust.Tap)},
	} {
		t.Run(name, func(t *testing.T) {
			conns := callers(t, serve(t, trust, false, options...))
			for _, method := range resealMethods(t) {
				allow, _ := proto.GetExtension(method.Options(), resealv1.E_Allow).([]resealv1.Role)
				if len(allow) == 0 {
					t.Errorf("%s has no allow option", method.FullName())
				}
				admitted := map[string]bool{}
				for _, role := range allow {
					for _, who := range satisfiedBy[role] {
						admitted[who] = true
					}
				}
				for who, conn := range conns {
					want := codes.PermissionDenied
					switch {
					case admitted[who]:
						want = codes.Unimplemented
					case who == "anonymous":
						want = codes.Unauthenticated
					}
					if err := call(t.Context(), conn, method); status.Code(err) != want {
						t.Errorf("%s calls %s: %v, want %s", who, method.FullName(), err, want)
					}
				}
			}
		})
	}
}

// The options themselves, for the methods where a slip would hurt most.
func TestSensitiveMethods(t *testing.T) {
	for method, want := range map[string]resealv1.Role{
		"/reseal.v1.AdminService/Apply":            operating,
		"/reseal.v1.AdminService/Delete":           operating,
		"/reseal.v1.AdminService/Rollback":         operating,
		"/reseal.v1.FeedService/Sync":              edgeRole,
		"/reseal.v1.TallyService/Report":           edgeRole,
		"/reseal.v1.EnrollmentService/Renew":       edgeRole,
		"/reseal.v1.EnrollmentService/CreateToken": admin,
		"/reseal.v1.EnrollmentService/ListTokens":  admin,
		"/reseal.v1.EnrollmentService/RevokeToken": admin,
		"/reseal.v1.BackupService/Backup":          admin,
		"/reseal.v1.ReplicaService/Relay":          resealv1.Role_ROLE_REPLICA,
	} {
		if got := allowedRoles()[method]; len(got) != 1 || got[0] != want {
			t.Errorf("%s admits %v, want %s", method, got, want)
		}
	}
}

func TestAdmits(t *testing.T) {
	for role := range resealv1.Role_name {
		if admits(nil, resealv1.Role(role)) {
			t.Errorf("a method without option admits %s", resealv1.Role(role))
		}
		if admits([]resealv1.Role{resealv1.Role_ROLE_UNSPECIFIED}, resealv1.Role(role)) {
			t.Errorf("ROLE_UNSPECIFIED admits %s", resealv1.Role(role))
		}
	}
}

func TestRefusalsSayWhy(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	conns := callers(t, s)
	_, err := resealv1.NewAdminServiceClient(conns["viewer"]).Apply(t.Context(), &resealv1.ApplyRequest{})
	wantCode(t, err, codes.PermissionDenied, "viewer/v", "role needed: operator", "reseal.v1.AdminService/Apply")
	_, err = resealv1.NewAdminServiceClient(conns["anonymous"]).List(t.Context(), &resealv1.ListRequest{})
	wantCode(t, err, codes.Unauthenticated, "role: viewer", "certificate")
	_, err = resealv1.NewEnrollmentServiceClient(conns["operator"]).CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: "x"})
	wantCode(t, err, codes.PermissionDenied, "operator/o", "admin")
}

func TestHealthAndReflection(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), false)
	for who, conn := range callers(t, s) {
		if _, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Errorf("%s: health: %v", who, err)
		}
		stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		if err == nil || err == io.EOF {
			_, err = stream.Recv()
		}
		want := codes.OK
		switch who {
		case "anonymous":
			want = codes.Unauthenticated
		case "controlplane", "replica":
			want = codes.PermissionDenied
		}
		if status.Code(err) != want {
			t.Errorf("%s: reflection: %v, want %s", who, err, want)
		}
		_ = stream.CloseSend()
	}
}

func TestForeignAuthority(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), false)
	other := openTrust(t, testConfig(t))
	conn := s.dial(t, operator(t, other, admin, "a"))
	_, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	wantCode(t, err, codes.Unavailable)

	// And a certificate that signed itself.
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{s.trust.uri("admin/a")}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	conn = s.dial(t, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
	_, err = resealv1.NewAdminServiceClient(conn).List(t.Context(), &resealv1.ListRequest{})
	wantCode(t, err, codes.Unavailable)
}

// signed is a certificate of the authority that edit made strange.
func signed(t *testing.T, trust *Trust, edit func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	authority := trust.opened.Load().authority
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{trust.uri("admin/a")}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	edit(template)
	der, err := x509.CreateCertificate(rand.Reader, template, authority.certificate, key.Public(), authority.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestStrangeCertificates(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), false)
	path := func(text string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			uri, err := url.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = []*url.URL{uri}
		}
	}
	cases := map[string]struct {
		edit func(*x509.Certificate)
		want codes.Code
	}{
		"as it should be":  {func(*x509.Certificate) {}, codes.Unimplemented},
		"two URIs":         {func(c *x509.Certificate) { c.URIs = append(c.URIs, s.trust.uri("admin/b")) }, codes.Unauthenticated},
		"the same twice":   {func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, codes.Unauthenticated},
		"no URI":           {func(c *x509.Certificate) { c.URIs = nil }, codes.Unauthenticated},
		"also a DNS name":  {func(c *x509.Certificate) { c.DNSNames = []string{"a"} }, codes.Unauthenticated},
		"also an address":  {func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(1, 2, 3, 4)} }, codes.Unauthenticated},
		"also mail":        {func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b"} }, codes.Unauthenticated},
		"no usage":         {func(c *x509.Certificate) { c.ExtKeyUsage = nil }, codes.Unauthenticated},
		"any usage":        {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }, codes.Unauthenticated},
		"for servers":      {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, codes.Unavailable},
		"expired":          {func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, codes.Unavailable},
		"in the future":    {func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }, codes.Unavailable},
		"an authority":     {func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }, codes.Unauthenticated},
		"other domain":     {path("spiffe://other/admin/a"), codes.Unauthenticated},
		"domain prefix":    {path("spiffe://reseal.evil/admin/a"), codes.Unauthenticated},
		"other scheme":     {path("https://reseal/admin/a"), codes.Unauthenticated},
		"user":             {path("spiffe://x@reseal/admin/a"), codes.Unauthenticated},
		"port":             {path("spiffe://reseal:1/admin/a"), codes.Unauthenticated},
		"query":            {path("spiffe://reseal/admin/a?b"), codes.Unauthenticated},
		"fragment":         {path("spiffe://reseal/admin/a#b"), codes.Unauthenticated},
		"no name":          {path("spiffe://reseal/admin/"), codes.Unauthenticated},
		"no path":          {path("spiffe://reseal"), codes.Unauthenticated},
		"deeper":           {path("spiffe://reseal/admin/a/b"), codes.Unauthenticated},
		"dots":             {path("spiffe://reseal/admin/.."), codes.Unauthenticated},
		"escaped":          {path("spiffe://reseal/admin/%61"), codes.Unauthenticated},
		"unknown role":     {path("spiffe://reseal/root/a"), codes.Unauthenticated},
		"upper case":       {path("spiffe://reseal/Admin/a"), codes.Unauthenticated},
		"long name":        {path("spiffe://reseal/admin/" + strings.Repeat("a", 64)), codes.Unauthenticated},
		"of control plane": {path("spiffe://reseal/controlplane"), codes.PermissionDenied},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			client := resealv1.NewAdminServiceClient(s.dial(t, signed(t, s.trust, c.edit)))
			_, err := client.Get(t.Context(), &resealv1.GetRequest{})
			wantCode(t, err, c.want)
		})
	}
}

func TestCallerOutsideOfACall(t *testing.T) {
	_, err := Caller(t.Context())
	wantCode(t, err, codes.Unauthenticated)
}

func TestIdentityString(t *testing.T) {
	for want, identity := range map[string]Identity{
		"edge/e1":      {Role: edgeRole, Name: "e1"},
		"admin/a":      {Role: admin, Name: "a"},
		"anonymous":    {Role: anonymous},
		"controlplane": {Name: "controlplane"},
	} {
		if got := identity.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A connection ends with the certificate that it was made with.
func TestConnectionEndsWithCertificate(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	short := signed(t, trust, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(2 * time.Second) })
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	creds := trust.Credentials().Clone()
	accepted, ended := make(chan error, 1), make(chan struct{})
	defer close(ended)
	go func() {
		raw, err := listener.Accept()
		if err == nil {
			var conn net.Conn
			if conn, _, err = creds.ServerHandshake(raw); err == nil {
				_, err = conn.Write([]byte("hello"))
				defer conn.Close()
			}
		}
		accepted <- err
		<-ended
	}()
	config := clientTLS(trust, short)
	config.NextProtos = []string{"h2"}
	conn, err := tls.Dial("tcp", listener.Addr().String(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(conn); err != nil || string(text) != "hello" {
		t.Errorf("%q, %v", text, err)
	}
}

func TestExpiringConnClosedEarly(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	conn := &expiringConn{Conn: near, timer: time.AfterFunc(time.Hour, func() { _ = near.Close() })}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if conn.timer.Stop() {
		t.Error("the timer still ran")
	}
}

func TestWithoutTLS(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	plain := grpc.NewServer(grpc.ChainUnaryInterceptor(trust.UnaryInterceptor))
	resealv1.RegisterEnrollmentServiceServer(plain, trust)
	done := make(chan error, 1)
	go func() { done <- plain.Serve(listener) }()
	defer func() { plain.Stop(); <-done }()
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = resealv1.NewEnrollmentServiceClient(conn).Enroll(t.Context(), &resealv1.EnrollRequest{})
	wantCode(t, err, codes.Unauthenticated, "TLS")
}

func replicaCertificateOf(t *testing.T, trust *Trust, name string) tls.Certificate {
	t.Helper()
	config, err := trust.ReplicaTLS(name)
	if err != nil {
		t.Fatal(err)
	}
	shown, err := config.GetClientCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return *shown
}

// TestReplicaTLS: a replica calls control planes of its fleet and nobody else.
func TestReplicaTLS(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	config, err := trust.ReplicaTLS("r1")
	if err != nil {
		t.Fatal(err)
	}
	shake := func(server *tls.Config) error {
		listener, err := tls.Listen("tcp", "127.0.0.1:0", server)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go func() {
			if conn, err := listener.Accept(); err == nil {
				_ = conn.(*tls.Conn).Handshake()
				_ = conn.Close()
			}
		}()
		conn, err := tls.Dial("tcp", listener.Addr().String(), config)
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	if err := shake(trust.ServerTLS()); err != nil {
		t.Errorf("a control plane of the fleet: %v", err)
	}
	edge := edgeCertificate(t, trust, "e1", "")
	if err := shake(&tls.Config{Certificates: []tls.Certificate{edge}, NextProtos: []string{"h2"}}); err == nil || !strings.Contains(err.Error(), "not for spiffe://") {
		t.Errorf("an edge that poses as a control plane: %v", err)
	}
	cfg := testConfig(t)
	cfg.KEKFile += "-other"
	other := openTrust(t, cfg)
	if err := shake(other.ServerTLS()); err == nil {
		t.Error("a control plane of another fleet is accepted")
	}
	if _, err := trust.ReplicaTLS("no/name"); err == nil {
		t.Error("a name that is no path segment is accepted")
	}
}
