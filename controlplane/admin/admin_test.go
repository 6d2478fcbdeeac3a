package admin_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/reseal/reseal/controlplane/admin"
	"github.com/reseal/reseal/controlplane/store"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// dial serves cfg over a connection in memory.
func dial(t *testing.T, cfg admin.Config) resealv1.AdminServiceClient {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	resealv1.RegisterAdminServiceServer(server, admin.New(cfg))
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(listener) })
	conn, err := grpc.NewClient("passthrough:///admin",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		wg.Wait()
	})
	return resealv1.NewAdminServiceClient(conn)
}

var errForeignSeal = errors.New("sealed elsewhere")

// A seal that is good enough for a test: it hides and it checks the context.
func sealForTest(plaintext, context []byte) ([]byte, error) {
	sum := sha256.Sum256(context)
	hidden := bytes.Clone(plaintext)
	for i := range hidden {
		hidden[i] ^= 0x5a
	}
	return append(sum[:], hidden...), nil
}

func openForTest(sealed, context []byte) ([]byte, error) {
	sum := sha256.Sum256(context)
	hidden, ok := bytes.CutPrefix(sealed, sum[:])
	if !ok {
		return nil, errForeignSeal
	}
	plaintext := bytes.Clone(hidden)
	for i := range plaintext {
		plaintext[i] ^= 0x5a
	}
	return plaintext, nil
}

func violation(r *resealv1.Resource, field, description string) *resealv1.Violation {
	return &resealv1.Violation{Resource: r.Ref(), Field: field, Description: description}
}

// noPort stands in for the field checks of the manifest package.
func noPort(r *resealv1.Resource) []*resealv1.Violation {
	var found []*resealv1.Violation
	for i, endpoint := range r.GetBackendPool().GetEndpoints() {
		if !strings.Contains(endpoint.GetAddress(), ":") {
			found = append(found, violation(r, "spec.endpoints["+strconv.Itoa(i)+"].address", strconv.Quote(endpoint.GetAddress())+" has no port"))
		}
	}
	return found
}

// noPool stands in for the checks of references.
func noPool(s *resealv1.Snapshot) []*resealv1.Violation {
	var found []*resealv1.Violation
	for _, listener := range s.Kind("Listener") {
		if name := listener.GetListener().GetPool(); name != "" && s.Get("BackendPool", name) == nil {
			found = append(found, violation(listener, "spec.pool", "there is no BackendPool "+strconv.Quote(name)))
		}
	}
	return found
}

// serve runs a real store on etcd behind the service.
func serve(t *testing.T) (resealv1.AdminServiceClient, *store.Store) {
	t.Helper()
	s := store.New(store.Config{
		Client: etcd, Prefix: newPrefix(), Seal: sealForTest, Open: openForTest, Validate: noPool,
		Logger: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	<-s.Ready()
	return dial(t, admin.Config{
		Store:  s,
		Author: func(context.Context) string { return "spiffe://reseal/operator/alice" },
		Codes: []admin.ErrorCode{
			{Is: store.ErrNotFound, Code: codes.NotFound},
			{Is: store.ErrNotKept, Code: codes.FailedPrecondition},
			{Is: store.ErrTooLarge, Code: codes.ResourceExhausted},
			{Is: store.ErrUnavailable, Code: codes.Unavailable},
		},
		Validate: noPort,
		Logger:   slog.New(slog.DiscardHandler),
	}), s
}

func pool(name string, addresses ...string) *resealv1.Resource {
	spec := &resealv1.BackendPool{}
	for _, address := range addresses {
		spec.Endpoints = append(spec.Endpoints, &resealv1.Endpoint{Address: address})
	}
	return &resealv1.Resource{Metadata: &resealv1.Metadata{Name: name}, Spec: &resealv1.Resource_BackendPool{BackendPool: spec}}
}

func labelled(r *resealv1.Resource, name, value string) *resealv1.Resource {
	r.Metadata.Labels = map[string]string{name: value}
	return r
}

func certificate(name, key string) *resealv1.Resource {
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec:     &resealv1.Resource_Certificate{Certificate: &resealv1.Certificate{CertificatePem: "PEM", PrivateKeyPem: key}},
	}
}

func listener(name, pool string) *resealv1.Resource {
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec:     &resealv1.Resource_Listener{Listener: &resealv1.Listener{Address: ":443", Pool: pool}},
	}
}

func ref(kind, name string) *resealv1.ResourceRef {
	return &resealv1.ResourceRef{Kind: kind, Name: name}
}

func diff(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func apply(t *testing.T, client resealv1.AdminServiceClient, resources ...*resealv1.Resource) *resealv1.ApplyResponse {
	t.Helper()
	resp, err := client.Apply(t.Context(), &resealv1.ApplyRequest{Resources: resources})
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// fields are the field violations of a status.
func fields(t *testing.T, err error) []string {
	t.Helper()
	if status.Code(err) != codes.InvalidArgument {
		t.Fatalf("got %v, want InvalidArgument", err)
	}
	found := []string{}
	for _, detail := range status.Convert(err).Details() {
		if bad, ok := detail.(*errdetails.BadRequest); ok {
			for _, violation := range bad.FieldViolations {
				if violation.Description == "" {
					t.Errorf("%s has no description", violation.Field)
				}
				found = append(found, violation.Field)
			}
		}
	}
	return found
}

func names(resources []*resealv1.Resource) []string {
	found := []string{}
	for _, resource := range resources {
		found = append(found, resource.Ref().Key())
	}
	return found
}

func TestApplyGetListDelete(t *testing.T) {
	client, _ := serve(t)
	made := apply(t, client, labelled(pool("b", "10.0.0.1:1"), "team", "x"), pool("a", "10.0.0.2:1"), certificate("c", "SECRET-KEY"))
	got, err := client.Get(t.Context(), &resealv1.GetRequest{Resource: ref("BackendPool", "b")})
	if err != nil {
		t.Fatal(err)
	}
	diff(t, "Get", got.Resource, made.Changes[0].After)

	cases := []struct {
		name string
		req  *resealv1.ListRequest
		want []string
	}{
		{"all", &resealv1.ListRequest{}, []string{"BackendPool/a", "BackendPool/b", "Certificate/c", "Keyring/default"}},
		{"a kind", &resealv1.ListRequest{Kind: "BackendPool"}, []string{"BackendPool/a", "BackendPool/b"}},
		{"a label", &resealv1.ListRequest{MatchLabels: map[string]string{"team": "x"}}, []string{"BackendPool/b"}},
		{"another value", &resealv1.ListRequest{MatchLabels: map[string]string{"team": "y"}}, []string{}},
		{"an empty value is a value", &resealv1.ListRequest{MatchLabels: map[string]string{"nothing": ""}}, []string{}},
		{"nothing of a kind", &resealv1.ListRequest{Kind: "Route"}, []string{}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			resp, err := client.List(t.Context(), c.req)
			if err != nil {
				t.Fatal(err)
			}
			diff(t, "List", names(resp.Resources), c.want)
			if resp.Revision != made.Revision {
				t.Errorf("revision %d, want %d", resp.Revision, made.Revision)
			}
		})
	}
	if _, err := client.Delete(t.Context(), &resealv1.DeleteRequest{Resources: []*resealv1.ResourceRef{ref("BackendPool", "a")}}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Get(t.Context(), &resealv1.GetRequest{Resource: ref("BackendPool", "a")}); status.Code(err) != codes.NotFound {
		t.Errorf("Get of a deleted resource: %v", err)
	}
	back, err := client.Rollback(t.Context(), &resealv1.RollbackRequest{Message: "oops"})
	if err != nil || back.RolledBackTo != made.Revision {
		t.Fatalf("Rollback: %v, %v", back, err)
	}
	history, err := client.ListRevisions(t.Context(), &resealv1.ListRevisionsRequest{Limit: 2})
	if err != nil || len(history.Revisions) != 2 {
		t.Fatalf("ListRevisions: %v, %v", history, err)
	}
	if newest := history.Revisions[0]; newest.Author != "spiffe://reseal/operator/alice" || newest.Message != "oops" || newest.RolledBackTo != made.Revision {
		t.Errorf("newest revision: %v", newest)
	}
}

// Whatever is read, a secret is not in it.
func TestSecretsAreNeverRead(t *testing.T) {
	client, _ := serve(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := client.Watch(ctx, &resealv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	add := func(what string, text string, err error) {
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		texts = append(texts, text)
	}
	first, err := stream.Recv()
	add("watch", prototext.Format(first), err)
	applied, err := client.Apply(t.Context(), &resealv1.ApplyRequest{Resources: []*resealv1.Resource{certificate("c", "FIRST-KEY")}})
	add("apply", prototext.Format(applied), err)
	second, err := stream.Recv()
	add("watch", prototext.Format(second), err)
	dry, err := client.Apply(t.Context(), &resealv1.ApplyRequest{DryRun: true, Resources: []*resealv1.Resource{certificate("c", "SECOND-KEY")}})
	add("dry run", prototext.Format(dry), err)
	got, err := client.Get(t.Context(), &resealv1.GetRequest{Resource: ref("Certificate", "c")})
	add("get", prototext.Format(got), err)
	list, err := client.List(t.Context(), &resealv1.ListRequest{})
	add("list", prototext.Format(list), err)
	apply(t, client, certificate("c", "SECOND-KEY"))
	back, err := client.Rollback(t.Context(), &resealv1.RollbackRequest{})
	add("rollback", prototext.Format(back), err)
	deleted, err := client.Delete(t.Context(), &resealv1.DeleteRequest{Resources: []*resealv1.ResourceRef{ref("Certificate", "c")}})
	add("delete", prototext.Format(deleted), err)
	history, err := client.ListRevisions(t.Context(), &resealv1.ListRevisionsRequest{})
	add("history", prototext.Format(history), err)
	redacted := 0
	for _, text := range texts {
		redacted += strings.Count(text, resealv1.SecretMarker)
		for _, secret := range []string{"FIRST-KEY", "SECOND-KEY", "sealed:"} {
			if strings.Contains(text, secret) {
				t.Errorf("%q in %s", secret, text)
			}
		}
	}
	if redacted < 10 {
		t.Errorf("only %d redacted values were looked at", redacted)
	}
	diff(t, "changed secrets", back.Changes[0].ChangedSecrets, []string{"spec.privateKeyPem"})
}

func TestRefusals(t *testing.T) {
	client, s := serve(t)
	before := apply(t, client, pool("a", "10.0.0.1:1"), listener("l", "a")).Revision
	send := func(req *resealv1.ApplyRequest) error {
		_, err := client.Apply(t.Context(), req)
		return err
	}
	of := func(resources ...*resealv1.Resource) *resealv1.ApplyRequest {
		return &resealv1.ApplyRequest{Resources: resources}
	}
	remove := func(refs ...*resealv1.ResourceRef) error {
		_, err := client.Delete(t.Context(), &resealv1.DeleteRequest{Resources: refs})
		return err
	}
	get := func(ref *resealv1.ResourceRef) error {
		_, err := client.Get(t.Context(), &resealv1.GetRequest{Resource: ref})
		return err
	}
	list := func(kind string) error {
		_, err := client.List(t.Context(), &resealv1.ListRequest{Kind: kind})
		return err
	}
	watch := func(kind string) error {
		stream, err := client.Watch(t.Context(), &resealv1.WatchRequest{Kind: kind})
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	rollback := func(req *resealv1.RollbackRequest) error {
		_, err := client.Rollback(t.Context(), req)
		return err
	}
	history := func(req *resealv1.ListRevisionsRequest) error {
		_, err := client.ListRevisions(t.Context(), req)
		return err
	}
	long := strings.Repeat("x", 1025)
	cases := []struct {
		name string
		err  error
		want []string
	}{
		{"all fields of all resources", send(of(pool("a", "10.0.0.1", "10.0.0.2:1", "10.0.0.3"), pool("b", "10.0.0.4"))),
			[]string{"BackendPool/a: spec.endpoints[0].address", "BackendPool/a: spec.endpoints[2].address", "BackendPool/b: spec.endpoints[0].address"}},
		{"references", send(of(listener("l", "x"), listener("m", "y"))), []string{"Listener/l: spec.pool", "Listener/m: spec.pool"}},
		{"resource as a whole", send(of(pool("b", "10.0.0.1:1"), pool("b", "10.0.0.1:1"))), []string{"BackendPool/b"}},
		{"redacted value", send(of(certificate("c", resealv1.SecretMarker))), []string{"Certificate/c: spec.privateKeyPem"}},
		{"no kind, no name", send(of(&resealv1.Resource{Metadata: &resealv1.Metadata{Name: "n"}}, pool(""))), []string{"/n", "BackendPool/"}},
		{"nothing", send(of()), []string{"resources"}},
		{"too many", send(of(make([]*resealv1.Resource, 10_001)...)), []string{"resources"}},
		{"long message", send(&resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a")}, Message: long}), []string{"message"}},
		{"negative revision", send(&resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a")}, ExpectedRevision: -1}), []string{"expected_revision"}},
		{"delete nothing", remove(), []string{"resources"}},
		{"delete by a bad ref", remove(ref("Pod", "a"), ref("Route", "")), []string{"Pod/a", "Route/"}},
		{"delete what is used", remove(ref("BackendPool", "a")), []string{"Listener/l: spec.pool"}},
		{"delete the default Keyring", remove(ref("Keyring", "default")), []string{"Keyring/default"}},
		{"get without ref", get(nil), []string{"/"}},
		{"get of a bad kind", get(ref("Pod", "a")), []string{"Pod/a"}},
		{"list of a bad kind", list("backendpool"), []string{"kind"}},
		{"watch of a bad kind", watch("Pod"), []string{"kind"}},
		{"rollback to a negative revision", rollback(&resealv1.RollbackRequest{ToRevision: -1}), []string{"to_revision"}},
		{"rollback with a long message", rollback(&resealv1.RollbackRequest{Message: long}), []string{"message"}},
		{"history with a negative limit", history(&resealv1.ListRevisionsRequest{Limit: -1}), []string{"limit"}},
		{"history of a negative revision", history(&resealv1.ListRevisionsRequest{Revision: -1}), []string{"revision"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { diff(t, "field violations", fields(t, c.err), c.want) })
	}
	others := []struct {
		name string
		err  error
		want codes.Code
	}{
		{"get", get(ref("Route", "x")), codes.NotFound},
		{"delete", remove(ref("Route", "x")), codes.NotFound},
		{"rollback", rollback(&resealv1.RollbackRequest{ToRevision: 1}), codes.FailedPrecondition},
		{"history", history(&resealv1.ListRevisionsRequest{Revision: 1}), codes.FailedPrecondition},
	}
	for _, c := range others {
		if status.Code(c.err) != c.want {
			t.Errorf("%s: %v, want %v", c.name, c.err, c.want)
		}
	}
	if got := s.Snapshot().Revision(); got != before {
		t.Errorf("refusals led from revision %d to %d", before, got)
	}
}

func TestConflictNamesTheCurrentRevision(t *testing.T) {
	client, _ := serve(t)
	old := apply(t, client, pool("a", "10.0.0.1:1")).Revision
	current := strconv.FormatInt(apply(t, client, pool("a", "10.0.0.2:1")).Revision, 10)
	_, err := client.Apply(t.Context(), &resealv1.ApplyRequest{ExpectedRevision: old, Resources: []*resealv1.Resource{pool("a", "10.0.0.3:1")}})
	if status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), current) {
		t.Fatalf("got %v, want Aborted with %s", err, current)
	}
	found := ""
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			found = info.Metadata["revision"]
		}
	}
	if found != current {
		t.Errorf("the ErrorInfo names revision %q, want %q", found, current)
	}
}

// recv receives with a bound, so that a missing message fails the test.
func recv(t *testing.T, stream grpc.ServerStreamingClient[resealv1.WatchResponse]) *resealv1.WatchResponse {
	t.Helper()
	type result struct {
		resp *resealv1.WatchResponse
		err  error
	}
	got := make(chan result, 1)
	go func() {
		resp, err := stream.Recv()
		got <- result{resp, err}
	}()
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	select {
	case r := <-got:
		if r.err != nil {
			t.Fatal(r.err)
		}
		return r.resp
	case <-timer.C:
		t.Fatal("no message")
		return nil
	}
}

func TestWatch(t *testing.T) {
	client, s := serve(t)
	apply(t, client, labelled(pool("a", "10.0.0.1:1"), "team", "x"), labelled(pool("b", "10.0.0.1:1"), "team", "y"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := client.Watch(ctx, &resealv1.WatchRequest{Kind: "BackendPool", MatchLabels: map[string]string{"team": "x"}})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(what string, reset bool, resources []string, deletes []*resealv1.ResourceRef) {
		t.Helper()
		resp := recv(t, stream)
		diff(t, what, names(resp.Resources), resources)
		diff(t, what+": deletes", resp.Deletes, deletes)
		if resp.Reset_ != reset || resp.Revision != s.Snapshot().Revision() {
			t.Errorf("%s: reset %v, revision %d, want %v, %d", what, resp.Reset_, resp.Revision, reset, s.Snapshot().Revision())
		}
	}
	gone := func(name string) []*resealv1.ResourceRef { return []*resealv1.ResourceRef{ref("BackendPool", name)} }
	expect("at first", true, []string{"BackendPool/a"}, nil)
	apply(t, client, labelled(pool("a", "10.0.0.2:1"), "team", "x"))
	expect("a change", false, []string{"BackendPool/a"}, nil)
	// What isn't selected is passed over.
	apply(t, client, labelled(pool("b", "10.0.0.2:1"), "team", "y"))
	apply(t, client, labelled(listener("l", "a"), "team", "x"))
	apply(t, client, labelled(pool("b", "10.0.0.2:1"), "team", "x"))
	expect("one joins the selection", false, []string{"BackendPool/b"}, nil)
	apply(t, client, labelled(pool("a", "10.0.0.2:1"), "team", "z"), labelled(pool("c", "10.0.0.2:1"), "team", "x"))
	expect("one leaves it, one is made", false, []string{"BackendPool/c"}, gone("a"))
	if _, err := client.Delete(t.Context(), &resealv1.DeleteRequest{Resources: gone("b")}); err != nil {
		t.Fatal(err)
	}
	expect("a delete", false, []string{}, gone("b"))
	cancel()
	if _, err := stream.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("after the end: %v", err)
	}
}

// A watcher that applies every message holds what a list holds.
func TestWatchAddsUpToTheList(t *testing.T) {
	client, _ := serve(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := client.Watch(ctx, &resealv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	last := int64(0)
	for i := range 30 {
		name := strconv.Itoa(i % 7)
		if i%5 == 4 {
			resp, err := client.Delete(t.Context(), &resealv1.DeleteRequest{Resources: []*resealv1.ResourceRef{ref("BackendPool", strconv.Itoa((i-1)%7))}})
			if err != nil {
				t.Fatal(err)
			}
			last = resp.Revision
			continue
		}
		last = apply(t, client, pool(name, "10.0.0."+strconv.Itoa(i)+":1")).Revision
	}
	held := map[string]*resealv1.Resource{}
	for {
		resp := recv(t, stream)
		if resp.Reset_ {
			clear(held)
		}
		for _, resource := range resp.Resources {
			held[resource.Ref().Key()] = resource
		}
		for _, ref := range resp.Deletes {
			if held[ref.Key()] == nil {
				t.Errorf("%s was deleted but never there", ref.Key())
			}
			delete(held, ref.Key())
		}
		if resp.Revision == last {
			break
		}
	}
	list, err := client.List(t.Context(), &resealv1.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]*resealv1.Resource{}
	for _, resource := range list.Resources {
		want[resource.Ref().Key()] = resource
	}
	diff(t, "held", held, want)
}
