package controlplane

import (
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// audited are the entries that a request selects.
func (b *bench) audited(request *resealv1.ReadAuditRequest) []*resealv1.AuditEntry {
	b.t.Helper()
	stream, err := resealv1.NewAdminServiceClient(b.local).ReadAudit(b.t.Context(), request)
	if err != nil {
		b.t.Fatal(err)
	}
	var all []*resealv1.AuditEntry
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return all
		}
		if err != nil {
			b.t.Fatal(err)
		}
		all = append(all, response.GetEntries()...)
	}
}

// TestAudit: changes of resources are recorded in their own transaction, other changes and
// refused calls after them; secrets never.
func TestAudit(t *testing.T) {
	b := newBench(t)
	admin := resealv1.NewAdminServiceClient(b.local)
	pool := &resealv1.Resource{Metadata: &resealv1.Metadata{Name: "jetty"}, Spec: &resealv1.Resource_BackendPool{BackendPool: &resealv1.BackendPool{
		Endpoints: []*resealv1.Endpoint{{Address: "127.0.0.1:1"}}}}}
	apply := func(message string) int64 {
		t.Helper()
		answer, err := admin.Apply(t.Context(), &resealv1.ApplyRequest{Resources: []*resealv1.Resource{proto.CloneOf(pool)}, Message: message})
		if err != nil {
			t.Fatal(err)
		}
		return answer.GetRevision()
	}
	first := apply("new")
	pool.GetBackendPool().Endpoints[0].Address = "127.0.0.1:2"
	second := apply("moved")
	if apply("nothing changes") != second {
		t.Fatal("something changed")
	}
	all := b.audited(&resealv1.ReadAuditRequest{Resource: "backendpool/JETTY"})
	if len(all) != 2 {
		t.Fatalf("entries %v", all)
	}
	for i, want := range []struct {
		revision       int64
		message, about string
	}{{first, "new", "created"}, {second, "moved", "configured"}} {
		e := all[i]
		if e.GetRevision() != want.revision || e.GetMessage() != want.message || e.GetUser() != "admin/local" || e.GetAction() != "AdminService.Apply" ||
			e.GetOutcome() != "OK" || !strings.HasPrefix(e.GetSource(), "127.0.0.1:") || e.GetResources()[0].GetChange() != want.about || e.GetBroken() {
			t.Errorf("entry %d is %v, want %+v", i, e, want)
		}
	}
	before, after := all[0].GetResources()[0], all[1].GetResources()[0]
	if before.GetBefore() != "" || before.GetAfter() == "" || before.GetAfter() == after.GetAfter() || after.GetBefore() != before.GetAfter() {
		t.Errorf("hashes %v, %v", before, after)
	}
	if diff := after.GetDiff(); !strings.Contains(diff, "127.0.0.1:1") || !strings.Contains(diff, "127.0.0.1:2") || strings.Contains(diff, "kind") {
		t.Errorf("diff:\n%s", diff)
	}

	// Refused, and other changes.
	viewer := resealv1.NewAdminServiceClient(b.dial(b.user(resealv1.Role_ROLE_VIEWER, "vera")))
	_, err := viewer.Apply(t.Context(), &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool}})
	if status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for len(b.audited(&resealv1.ReadAuditRequest{User: "vera"})) == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the refused call is not recorded")
		}
		time.Sleep(20 * time.Millisecond)
	}
	refused := b.audited(&resealv1.ReadAuditRequest{User: "viewer/vera"})
	if len(refused) != 1 || refused[0].GetOutcome() != "PERMISSION_DENIED" || refused[0].GetRevision() != 0 {
		t.Errorf("refused: %v", refused)
	}
	made := b.audited(&resealv1.ReadAuditRequest{Resource: "user/vera"})
	if len(made) != 1 || made[0].GetAction() != "EnrollmentService.CreateUser" {
		t.Errorf("made: %v", made)
	}
	// What is no longer wanted, and who may look.
	if got := b.audited(&resealv1.ReadAuditRequest{User: "nobody"}); len(got) != 0 {
		t.Errorf("of nobody: %v", got)
	}
	stream, err := viewer.ReadAudit(t.Context(), &resealv1.ReadAuditRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a viewer reads the log: %v", err)
	}
}

// TestAuditFollow: who follows gets what is there, and what comes.
func TestAuditFollow(t *testing.T) {
	b := newBench(t)
	b.edge("e1")
	stream, err := resealv1.NewAdminServiceClient(b.local).ReadAudit(t.Context(), &resealv1.ReadAuditRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	var actions []string
	next := func(n int) {
		t.Helper()
		for len(actions) < n {
			response, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range response.GetEntries() {
				actions = append(actions, e.GetUser()+" "+e.GetAction())
			}
		}
	}
	next(2)
	if _, err := resealv1.NewEnrollmentServiceClient(b.local).RevokeEdge(t.Context(), &resealv1.RevokeEdgeRequest{Id: "e1"}); err != nil {
		t.Fatal(err)
	}
	next(3)
	want := []string{"admin/local EnrollmentService.CreateToken", "anonymous EnrollmentService.Enroll", "admin/local EnrollmentService.RevokeEdge"}
	if !slices.Equal(actions, want) {
		t.Errorf("got %q", actions)
	}
}

// TestAuditHoldsNoSecrets: neither the private key of a certificate nor a join token is
// anywhere in the file.
func TestAuditHoldsNoSecrets(t *testing.T) {
	b := newBench(t)
	key, _ := b.key()
	keyPEM, certPEM := selfSigned(t, key)
	_, err := resealv1.NewAdminServiceClient(b.local).Apply(t.Context(), &resealv1.ApplyRequest{Resources: []*resealv1.Resource{{
		Metadata: &resealv1.Metadata{Name: "site"},
		Spec:     &resealv1.Resource_Certificate{Certificate: &resealv1.Certificate{CertificatePem: certPEM, PrivateKeyPem: keyPEM}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	token, err := resealv1.NewEnrollmentServiceClient(b.local).CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: "e1"})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(b.plane.cfg.DataDir, "audit.json")
	var text string
	for deadline := time.Now().Add(10 * time.Second); strings.Count(text, "\n") < 2; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the file holds:\n%s", text)
		}
		if matches, _ := filepath.Glob(path); len(matches) > 0 {
			text = read(t, path)
		}
	}
	parts := strings.Split(token.GetToken(), ".")
	secrets := append(strings.Fields(strings.NewReplacer("-----BEGIN PRIVATE KEY-----", "", "-----END PRIVATE KEY-----", "").Replace(keyPEM)), parts[len(parts)-1])
	for _, secret := range secrets {
		if strings.Contains(text, secret) {
			t.Errorf("the audit log holds a secret:\n%s", text)
		}
	}
	if !strings.Contains(text, "Certificate/site") || !strings.Contains(text, "edge/e1") {
		t.Errorf("the file holds:\n%s", text)
	}
}
