package trust

import (
	"crypto/tls"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// newUser makes a user and returns its certificate.
func newUser(t *testing.T, s *server, role resealv1.Role, name string, ttl time.Duration) tls.Certificate {
	t.Helper()
	key := newKey(t)
	made, err := s.admin(t).CreateUser(t.Context(), &resealv1.CreateUserRequest{
		Name: name, Role: role, CertificateRequest: newRequest(t, key), Ttl: durationpb.New(ttl),
	})
	wantCode(t, err, codes.OK)
	leaf := parsePEM(t, made.GetCertificatePem())
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// backdate makes a user's record say that its certificate has expired.
func backdate(t *testing.T, trust *Trust, name string) {
	t.Helper()
	user, err := trust.user(t.Context(), name)
	if err != nil || user == nil {
		t.Fatalf("user %s: %v, %v", name, user, err)
	}
	user.ExpiresAt = time.Now().Add(-time.Second)
	if err := trust.putUser(t.Context(), *user); err != nil {
		t.Fatal(err)
	}
}

func TestUsers(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	vera := newUser(t, s, viewer, "vera", time.Hour)
	if uri := vera.Leaf.URIs[0].String(); uri != "spiffe://reseal/viewer/vera" {
		t.Errorf("it is for %s", uri)
	}
	if left := time.Until(vera.Leaf.NotAfter); left > time.Hour || left < 59*time.Minute {
		t.Errorf("it lives %s", left)
	}
	newUser(t, s, operating, "oscar", 24*time.Hour)

	list, err := s.admin(t).ListUsers(t.Context(), &resealv1.ListUsersRequest{})
	wantCode(t, err, codes.OK)
	var names []string
	for _, user := range list.GetUsers() {
		names = append(names, user.GetName())
	}
	if !slices.Equal(names, []string{"oscar", "vera"}) {
		t.Fatalf("users are %v", names)
	}
	if user := list.GetUsers()[1]; user.GetRole() != viewer || user.GetCreatedBy() != "admin/root" ||
		user.GetTtl().AsDuration() != time.Hour || !user.GetExpiresAt().AsTime().Equal(vera.Leaf.NotAfter) || user.GetRenewedAt() != nil {
		t.Errorf("wrong user %v", user)
	}
	_, err = s.enrollment(t, vera).ListUsers(t.Context(), &resealv1.ListUsersRequest{})
	wantCode(t, err, codes.PermissionDenied, "viewer/vera")
}

func TestCreateUserChecks(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	good := func() *resealv1.CreateUserRequest {
		return &resealv1.CreateUserRequest{Name: "vera", Role: viewer, CertificateRequest: newRequest(t, newKey(t))}
	}
	for want, edit := range map[string]func(*resealv1.CreateUserRequest){
		"name: \"\"":          func(r *resealv1.CreateUserRequest) { r.Name = "" },
		"name: \"a/b\"":       func(r *resealv1.CreateUserRequest) { r.Name = "a/b" },
		"name: \"local\"":     func(r *resealv1.CreateUserRequest) { r.Name = localName },
		"role: it must":       func(r *resealv1.CreateUserRequest) { r.Role = edgeRole },
		"ttl: 59s":            func(r *resealv1.CreateUserRequest) { r.Ttl = durationpb.New(59 * time.Second) },
		"ttl: 8761h":          func(r *resealv1.CreateUserRequest) { r.Ttl = durationpb.New(8761 * time.Hour) },
		"certificate_request": func(r *resealv1.CreateUserRequest) { r.CertificateRequest = []byte("no") },
	} {
		request := good()
		edit(request)
		_, err := s.admin(t).CreateUser(t.Context(), request)
		wantCode(t, err, codes.InvalidArgument, want)
	}
	_, err := s.admin(t).CreateUser(t.Context(), good())
	wantCode(t, err, codes.OK)
	_, err = s.admin(t).CreateUser(t.Context(), good())
	wantCode(t, err, codes.AlreadyExists, "vera", "viewer", "revoke it first")
	// One that can't come back by itself is replaced.
	backdate(t, s.trust, "vera")
	request := good()
	request.Role = operating
	made, err := s.admin(t).CreateUser(t.Context(), request)
	wantCode(t, err, codes.OK)
	if left := time.Until(made.GetUser().GetExpiresAt().AsTime()); made.GetUser().GetRole() != operating || left < 23*time.Hour {
		t.Errorf("wrong user %v", made.GetUser())
	}
}

func TestRenewUser(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	vera := newUser(t, s, viewer, "vera", time.Hour)
	key := newKey(t)
	renewed, err := s.enrollment(t, vera).RenewUser(t.Context(), &resealv1.RenewUserRequest{CertificateRequest: newRequest(t, key)})
	wantCode(t, err, codes.OK)
	leaf := parsePEM(t, renewed.GetCertificatePem())
	if leaf.URIs[0].String() != "spiffe://reseal/viewer/vera" || leaf.SerialNumber.Cmp(vera.Leaf.SerialNumber) == 0 || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("wrong certificate for %v", leaf.URIs)
	}
	list, err := s.admin(t).ListUsers(t.Context(), &resealv1.ListUsersRequest{})
	wantCode(t, err, codes.OK)
	if user := list.GetUsers()[0]; user.GetRenewedAt() == nil || !user.GetExpiresAt().AsTime().Equal(leaf.NotAfter) {
		t.Errorf("the renewal is not noted: %v", user)
	}
	_, err = s.enrollment(t, vera).RenewUser(t.Context(), &resealv1.RenewUserRequest{})
	wantCode(t, err, codes.InvalidArgument)

	request := &resealv1.RenewUserRequest{CertificateRequest: newRequest(t, key)}
	for name, caller := range map[string]tls.Certificate{
		"of no user":   operator(t, s.trust, viewer, "nobody"),
		"older":        operator(t, s.trust, viewer, "vera"),
		"another role": operator(t, s.trust, admin, "vera"),
	} {
		_, err := s.enrollment(t, caller).RenewUser(t.Context(), request)
		if wantCode(t, err, codes.FailedPrecondition, "resealctl user create"); t.Failed() {
			t.Fatal(name)
		}
	}
	_, err = s.enrollment(t, edgeCertificate(t, s.trust, "e1", "")).RenewUser(t.Context(), request)
	wantCode(t, err, codes.PermissionDenied)
}

// TestLocalAdministrator: the administrator of the first start is a user like others,
// also one whom an earlier version made.
func TestLocalAdministrator(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	s := serve(t, trust, true)
	path := filepath.Join(t.TempDir(), "admin.yaml")
	write := func() tls.Certificate {
		t.Helper()
		if err := trust.WriteAdminContext(path, []string{s.addr}); err != nil {
			t.Fatal(err)
		}
		c := readContext(t, path).Contexts[0]
		certificate, err := tls.X509KeyPair([]byte(c.CertificatePEM), []byte(c.PrivateKeyPEM))
		if err != nil {
			t.Fatal(err)
		}
		return certificate
	}
	renew := func(certificate tls.Certificate) {
		t.Helper()
		_, err := s.enrollment(t, certificate).RenewUser(t.Context(), &resealv1.RenewUserRequest{CertificateRequest: newRequest(t, newKey(t))})
		wantCode(t, err, codes.OK)
	}
	renew(write())
	// A store that knows no users, as earlier versions left it.
	if _, err := trust.client.Delete(t.Context(), trust.prefix+usersPrefix+localName); err != nil {
		t.Fatal(err)
	}
	renew(write())
	user, err := trust.user(t.Context(), localName)
	if err != nil || user == nil || user.Role != admin || user.CreatedBy != "controlplane" {
		t.Fatalf("user %+v, %v", user, err)
	}
	// Another file, for example of another replica: both are of one user.
	first := write()
	path = filepath.Join(t.TempDir(), "admin.yaml")
	renew(write())
	renew(first)
}
