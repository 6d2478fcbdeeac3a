package trust

import (
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// runTrust has a Trust follow the store until the test ends.
func runTrust(t *testing.T, trust *Trust) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- trust.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	<-trust.Ready()
}

// twoReplicas are of one fleet, the second following the first.
func twoReplicas(t *testing.T) (a, b *server) {
	t.Helper()
	cfg := testConfig(t)
	first := openTrust(t, cfg)
	cfg.Client = newClient(t)
	second := openTrust(t, cfg)
	runTrust(t, first)
	runTrust(t, second)
	return serve(t, first, true), serve(t, second, true)
}

// enrolled is the certificate of an edge that used a new join token.
func enrolled(t *testing.T, s *server, id string) tls.Certificate {
	t.Helper()
	token, err := s.admin(t).CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: id})
	wantCode(t, err, codes.OK)
	key := newKey(t)
	answer, err := s.enrollment(t).Enroll(t.Context(), &resealv1.EnrollRequest{Token: token.GetToken(), Id: id, CertificateRequest: newRequest(t, key)})
	wantCode(t, err, codes.OK)
	return tls.Certificate{Certificate: [][]byte{parsePEM(t, answer.GetCertificatePem()).Raw}, PrivateKey: key}
}

func renewEdge(t *testing.T, s *server, certificate tls.Certificate) error {
	t.Helper()
	_, err := s.enrollment(t, certificate).Renew(t.Context(), &resealv1.RenewRequest{CertificateRequest: newRequest(t, newKey(t))})
	return err
}

// listed asks for what any user may.
func listed(t *testing.T, s *server, certificate tls.Certificate) error {
	t.Helper()
	_, err := resealv1.NewAdminServiceClient(s.dial(t, certificate)).List(t.Context(), &resealv1.ListRequest{})
	return err
}

// TestRevokedUser: what was revoked at one replica is refused at all, until the name is
// given to another.
func TestRevokedUser(t *testing.T) {
	a, b := twoReplicas(t)
	vera := newUser(t, a, viewer, "vera", time.Hour)
	wantCode(t, listed(t, b, vera), codes.Unimplemented)
	answer, err := a.admin(t).RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: "vera", Reason: "left us"})
	wantCode(t, err, codes.OK)
	if r := answer.GetRevocation(); r.GetRole() != viewer || r.GetName() != "vera" || r.GetRevokedBy() != "admin/root" || r.GetReason() != "left us" ||
		r.GetForgottenAt().AsTime().Before(vera.Leaf.NotAfter) {
		t.Errorf("wrong revocation %v", r)
	}
	wantCode(t, listed(t, a, vera), codes.Unauthenticated, "viewer/vera was revoked on", "by admin/root (left us)")
	eventually(t, "refused at the other replica", func() bool {
		err := listed(t, b, vera)
		return err != nil && strings.Contains(err.Error(), "left us")
	})
	_, err = b.enrollment(t, vera).RenewUser(t.Context(), &resealv1.RenewUserRequest{CertificateRequest: newRequest(t, newKey(t))})
	wantCode(t, err, codes.Unauthenticated, "was revoked")
	if err := b.trust.CheckRevoked(vera.Leaf); err == nil {
		t.Error("the page would be shown")
	}

	// Another user of the name, or of another role, is another one.
	other := newUser(t, b, operating, "vera", time.Hour)
	wantCode(t, listed(t, b, other), codes.Unimplemented)
	_, err = b.admin(t).RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: "vera"})
	wantCode(t, err, codes.OK)
	again := newUser(t, b, viewer, "vera", time.Hour)
	wantCode(t, listed(t, b, again), codes.Unimplemented)
	wantCode(t, listed(t, b, other), codes.Unauthenticated)
	wantCode(t, listed(t, b, vera), codes.Unauthenticated, "left us")

	list, err := a.admin(t).ListRevocations(t.Context(), &resealv1.ListRevocationsRequest{})
	wantCode(t, err, codes.OK)
	if got := list.GetRevocations(); len(got) != 2 || got[0].GetRole() != viewer || got[1].GetRole() != operating {
		t.Errorf("revocations %v", got)
	}
}

func TestRevokedEdge(t *testing.T) {
	a, b := twoReplicas(t)
	var cut []Identity
	told := make(chan struct{}, 8)
	b.trust.revoked = func(of Identity) { cut = append(cut, of); told <- struct{}{} }
	a.trust.heldKeys = func(context.Context, string, map[string]string) []*resealv1.HeldKeys {
		return []*resealv1.HeldKeys{{Keyring: "default"}}
	}
	first := enrolled(t, a, "e1")
	wantCode(t, renewEdge(t, b, first), codes.OK)
	answer, err := a.admin(t).RevokeEdge(t.Context(), &resealv1.RevokeEdgeRequest{Id: "e1"})
	wantCode(t, err, codes.OK)
	if len(answer.GetHeldKeys()) != 1 {
		t.Errorf("held keys %v", answer.GetHeldKeys())
	}
	<-told
	if len(cut) != 1 || cut[0].String() != "edge/e1" {
		t.Errorf("cut off: %v", cut)
	}
	for _, s := range []*server{a, b} {
		wantCode(t, renewEdge(t, s, first), codes.Unauthenticated, "edge/e1 was revoked on")
	}
	_, err = a.admin(t).RevokeEdge(t.Context(), &resealv1.RevokeEdgeRequest{Id: "e1"})
	wantCode(t, err, codes.NotFound)

	// The id comes back by another token, and only so.
	second := enrolled(t, b, "e1")
	wantCode(t, renewEdge(t, b, second), codes.OK)
	eventually(t, "enrolled at the other replica", func() bool { return renewEdge(t, a, second) == nil })
	for _, s := range []*server{a, b} {
		wantCode(t, renewEdge(t, s, first), codes.Unauthenticated)
	}
}

// TestRevokedLoaded: a replica that starts knows what was revoked before it serves.
func TestRevokedLoaded(t *testing.T) {
	cfg := testConfig(t)
	a := serve(t, openTrust(t, cfg), true)
	vera := newUser(t, a, viewer, "vera", time.Hour)
	_, err := a.admin(t).RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: "vera"})
	wantCode(t, err, codes.OK)
	later := openTrust(t, cfg)
	runTrust(t, later)
	wantCode(t, listed(t, serve(t, later, true), vera), codes.Unauthenticated, "was revoked")
}

func TestLastAdministrator(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	s := serve(t, trust, true)
	path := filepath.Join(t.TempDir(), "admin.yaml")
	write := func() clientContext {
		t.Helper()
		if err := trust.WriteAdminContext(path, []string{s.addr}); err != nil {
			t.Fatal(err)
		}
		return readContext(t, path).Contexts[0]
	}
	pair := func(c clientContext) tls.Certificate {
		t.Helper()
		certificate, err := tls.X509KeyPair([]byte(c.CertificatePEM), []byte(c.PrivateKeyPEM))
		if err != nil {
			t.Fatal(err)
		}
		return certificate
	}
	first := write()
	local := s.enrollment(t, pair(first))
	revoke := func(name string) error {
		_, err := s.admin(t).RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: name})
		return err
	}
	wantCode(t, revoke("local"), codes.FailedPrecondition, "last administrator", "resealctl user create")
	newUser(t, s, operating, "oscar", time.Hour) // is none
	wantCode(t, revoke("local"), codes.FailedPrecondition)
	newUser(t, s, admin, "alice", time.Hour)
	backdate(t, trust, "alice")
	wantCode(t, revoke("local"), codes.FailedPrecondition)
	newUser(t, s, admin, "alice", time.Hour)
	wantCode(t, revoke("local"), codes.OK)
	_, err := local.ListUsers(t.Context(), &resealv1.ListUsersRequest{})
	wantCode(t, err, codes.Unauthenticated, "admin/local was revoked")
	wantCode(t, revoke("alice"), codes.FailedPrecondition)

	// No start makes it anew, with the file or without.
	if write().CertificatePEM != first.CertificatePEM {
		t.Error("a start made the revoked administrator anew")
	}
	path = filepath.Join(t.TempDir(), "admin.yaml")
	if err := trust.WriteAdminContext(path, nil); err != nil || fileExists(path) {
		t.Errorf("a start made the revoked administrator anew: %v", err)
	}
	// Unless nobody is left who could let anybody in.
	backdate(t, trust, "alice")
	saved := pair(write())
	_, err = s.enrollment(t, saved).ListUsers(t.Context(), &resealv1.ListUsersRequest{})
	wantCode(t, err, codes.OK)
	_, err = local.ListUsers(t.Context(), &resealv1.ListUsersRequest{})
	wantCode(t, err, codes.Unauthenticated)
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// TestTwoLastAdministrators: of two who revoke each other at once, one stays.
func TestTwoLastAdministrators(t *testing.T) {
	a, b := twoReplicas(t)
	for round := range 10 {
		one, two := fmt.Sprint("one-", round), fmt.Sprint("two-", round)
		newUser(t, a, admin, one, time.Hour)
		newUser(t, a, admin, two, time.Hour)
		errs := make(chan error, 2)
		for s, name := range map[*server]string{a: one, b: two} {
			client := s.admin(t)
			go func() {
				_, err := client.RevokeUser(context.Background(), &resealv1.RevokeUserRequest{Name: name})
				errs <- err
			}()
		}
		first, second := <-errs, <-errs
		if (first == nil) == (second == nil) {
			t.Fatalf("round %d: %v and %v", round, first, second)
		}
		left, err := a.trust.users(t.Context())
		if err != nil || len(left) != 1 {
			t.Fatalf("left are %v, %v", left, err)
		}
		if _, err := a.trust.client.Delete(t.Context(), a.trust.prefix+usersPrefix, clientv3.WithPrefix()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRevocationsAreForgotten(t *testing.T) {
	trust := openTrust(t, testConfig(t))
	s := serve(t, trust, true)
	newUser(t, s, viewer, "short", time.Minute)
	newUser(t, s, viewer, "long", time.Hour)
	for _, name := range []string{"short", "long"} {
		_, err := s.admin(t).RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: name})
		wantCode(t, err, codes.OK)
	}
	if err := trust.forget(t.Context(), time.Now().Add(time.Minute+maxBackdate+time.Second)); err != nil {
		t.Fatal(err)
	}
	list, err := s.admin(t).ListRevocations(t.Context(), &resealv1.ListRevocationsRequest{})
	wantCode(t, err, codes.OK)
	if got := list.GetRevocations(); len(got) != 1 || got[0].GetName() != "long" {
		t.Errorf("revocations %v", got)
	}
}

func TestRevokeChecks(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	for _, name := range []string{"", "nobody", "a/b", "../edges/e1"} {
		_, err := s.admin(t).RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: name})
		wantCode(t, err, codes.NotFound)
		_, err = s.admin(t).RevokeEdge(t.Context(), &resealv1.RevokeEdgeRequest{Id: name})
		wantCode(t, err, codes.NotFound)
	}
	for _, reason := range []string{strings.Repeat("x", maxReason+1), "a\nb"} {
		_, err := s.admin(t).RevokeUser(t.Context(), &resealv1.RevokeUserRequest{Name: "vera", Reason: reason})
		wantCode(t, err, codes.InvalidArgument, "reason")
	}
}
