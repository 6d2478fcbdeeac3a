package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// fakeEpoch is when everything in the fake began. It lies ahead, where every age
// is 0s, so that output is stable.
var fakeEpoch = time.Date(2099, 1, 2, 3, 4, 5, 0, time.UTC)

// fakeAuthority signs certificates for one test run.
type fakeAuthority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newFakeAuthority() (*fakeAuthority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &fakeAuthority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, err
}

// issue makes a certificate with one URI.
func (f *fakeAuthority) issue(uri string, ends time.Time) (certPEM, keyPEM []byte, err error) {
	id, err := url.Parse(uri)
	if err != nil {
		return nil, nil, err
	}
	return f.sign(&x509.Certificate{NotAfter: ends, URIs: []*url.URL{id}})
}

// sign fills in what all certificates have.
func (f *fakeAuthority) sign(template *x509.Certificate) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template.NotBefore = time.Now().Add(-48 * time.Hour)
	certPEM, err = f.certify(template, key.Public())
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	return certPEM, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), err
}

// certify signs a certificate for a key that somebody else has.
func (f *fakeAuthority) certify(template *x509.Certificate, key any) (certPEM []byte, err error) {
	template.SerialNumber = big.NewInt(2)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, f.cert, key, f.key)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), err
}

// fakeServer is a control plane in memory: enough of the contract in the .proto
// to see that the command does its part.
type fakeServer struct {
	resealv1.UnimplementedAdminServiceServer
	resealv1.UnimplementedFleetServiceServer
	resealv1.UnimplementedTallyServiceServer
	resealv1.UnimplementedEnrollmentServiceServer
	fakeKeyrings

	authority *fakeAuthority
	address   string
	server    *grpc.Server

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced when something changes
	watchers  int           // streams that were sent what there is
	revision  int64
	resources map[string]*resealv1.Resource
	history   []*resealv1.Revision
	states    map[int64]map[string]*resealv1.Resource
	edges     []*resealv1.Edge
	stats     *resealv1.GetStatsResponse
	samples   int
	tokens    []*resealv1.JoinToken
	users     []*resealv1.User
	renewing  bool // users can renew their certificates
	renewals  int

	revocations []*resealv1.Revocation

	unwell bool // every call is answered UNAVAILABLE
	// unanswered are replicas that did not answer this one.
	unanswered []*resealv1.UnansweredReplica
}

// startFake serves on loopback until the test ends.
func startFake(authority *fakeAuthority, trustDomain string) (*fakeServer, error) {
	certPEM, keyPEM, err := authority.issue("spiffe://"+trustDomain+"/controlplane", time.Now().Add(time.Hour))
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	clients := x509.NewCertPool()
	clients.AddCert(authority.cert)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	f := &fakeServer{
		authority: authority, address: listener.Addr().String(), changed: make(chan struct{}),
		resources: map[string]*resealv1.Resource{}, states: map[int64]map[string]*resealv1.Resource{},
		edges: fakeEdges(), stats: fakeStats(),
	}
	f.server = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(&tls.Config{
			Certificates: []tls.Certificate{cert}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert,
		})),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := f.admit(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			_ = grpc.SetHeader(ctx, metadata.Pairs(versionHeader, "v1.2.3"))
			return handle(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := f.admit(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return handle(srv, stream)
		}),
	)
	resealv1.RegisterAdminServiceServer(f.server, f)
	resealv1.RegisterFleetServiceServer(f.server, f)
	resealv1.RegisterTallyServiceServer(f.server, f)
	resealv1.RegisterEnrollmentServiceServer(f.server, f)
	resealv1.RegisterKeyringServiceServer(f.server, f)
	grpc_health_v1.RegisterHealthServer(f.server, health.NewServer())
	go f.server.Serve(listener)
	return f, nil
}

func newFake(t *testing.T) *fakeServer {
	t.Helper()
	authority, err := newFakeAuthority()
	if err != nil {
		t.Fatal(err)
	}
	f, err := startFake(authority, "reseal")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.server.Stop)
	return f
}

func (f *fakeServer) admit(ctx context.Context, method string) error {
	f.mu.Lock()
	unwell := f.unwell
	f.mu.Unlock()
	who, err := callerOf(ctx)
	switch {
	case unwell:
		return status.Error(codes.Unavailable, "etcd does not answer")
	case err != nil:
		return status.Error(codes.Unauthenticated, err.Error())
	case method != grpc_health_v1.Health_Check_FullMethodName && !who.mayCall(method):
		return status.Errorf(codes.PermissionDenied, "%s may not do this", who)
	}
	return nil
}

func callerOf(ctx context.Context) (identity, error) {
	p, _ := peer.FromContext(ctx)
	return certificateIdentity(p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0])
}

// notify wakes the watchers. The caller holds mu.
func (f *fakeServer) notify() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// change runs edit and wakes the watchers.
func (f *fakeServer) change(edit func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	edit()
	f.notify()
}

func refuse(violations []*resealv1.Violation) error {
	bad := &errdetails.BadRequest{}
	for _, v := range violations {
		field := v.GetResource().Key()
		if v.GetField() != "" {
			field += ": " + v.GetField()
		}
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: field, Description: v.GetDescription()})
	}
	st, err := status.New(codes.InvalidArgument, "not valid").WithDetails(bad)
	if err != nil {
		return err
	}
	return st.Err()
}

// commit makes next the newest revision, or only says what it would change. The
// caller holds mu.
func (f *fakeServer) commit(ctx context.Context, next map[string]*resealv1.Resource, refs []*resealv1.ResourceRef,
	expected int64, dryRun bool, message string, rolledBackTo int64) ([]*resealv1.Change, int64, error) {
	if expected != 0 && expected != f.revision {
		st, _ := status.New(codes.Aborted, "the revision is another one").WithDetails(
			&errdetails.ErrorInfo{Reason: "CONFLICT", Metadata: map[string]string{"revision": strconv.FormatInt(f.revision, 10)}})
		return nil, 0, st.Err()
	}
	var all []*resealv1.Resource
	for _, r := range next {
		all = append(all, r)
	}
	if violations := manifest.ValidateSnapshot(resealv1.NewSnapshot("c", f.revision, all)); len(violations) > 0 {
		return nil, 0, refuse(violations)
	}
	changes := f.compare(next, refs)
	if dryRun || !slices.ContainsFunc(changes, func(c *resealv1.Change) bool { return c.GetAction() != resealv1.Change_ACTION_UNCHANGED }) {
		return changes, f.revision, nil
	}
	who, _ := callerOf(ctx)
	f.revision++
	when := timestamppb.New(fakeEpoch.Add(time.Duration(f.revision) * time.Minute))
	for _, c := range changes {
		if r := c.After; r != nil && c.Action != resealv1.Change_ACTION_UNCHANGED {
			r.Metadata.Revision, r.Metadata.UpdatedAt = f.revision, when
			if c.Before == nil {
				r.Metadata.Uid, r.Metadata.CreatedAt = fmt.Sprintf("uid-%d", f.revision), when
			}
			r.Metadata.Generation++
		}
	}
	f.resources = next
	f.states[f.revision] = next
	f.history = slices.Insert(f.history, 0, &resealv1.Revision{Revision: f.revision, Author: who.String(), Message: message,
		Time: when, Changes: changes, RolledBackTo: rolledBackTo})
	f.notify()
	return changes, f.revision, nil
}

// compare says what becomes of each ref. Resources of next are copies: it
// carries over what the control plane assigns.
func (f *fakeServer) compare(next map[string]*resealv1.Resource, refs []*resealv1.ResourceRef) []*resealv1.Change {
	var changes []*resealv1.Change
	for _, ref := range refs {
		before, after := f.resources[ref.Key()], next[ref.Key()]
		c := &resealv1.Change{Resource: ref, Before: before, After: after, Action: resealv1.Change_ACTION_CONFIGURED}
		if before != nil && after != nil && before != after {
			m := proto.CloneOf(before.Metadata)
			m.Labels, m.Annotations = after.Metadata.Labels, after.Metadata.Annotations
			after.Metadata = m
			if key := after.GetCertificate().GetPrivateKeyPem(); key != "" && key != resealv1.SecretMarker {
				c.ChangedSecrets = []string{"spec.privateKeyPem"}
			}
		}
		if cert := after.GetCertificate(); cert.GetPrivateKeyPem() != "" {
			cert.PrivateKeyPem = resealv1.SecretMarker
		}
		switch {
		case before == nil:
			c.Action = resealv1.Change_ACTION_CREATED
		case after == nil:
			c.Action = resealv1.Change_ACTION_DELETED
		case len(c.ChangedSecrets) == 0 && proto.Equal(before, after):
			c.Action = resealv1.Change_ACTION_UNCHANGED
			next[ref.Key()] = before
		}
		changes = append(changes, c)
	}
	return changes
}

func (f *fakeServer) Apply(ctx context.Context, req *resealv1.ApplyRequest) (*resealv1.ApplyResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next := make(map[string]*resealv1.Resource)
	for key, r := range f.resources {
		next[key] = r
	}
	var refs []*resealv1.ResourceRef
	var violations []*resealv1.Violation
	for _, r := range req.GetResources() {
		violations = append(violations, manifest.Validate(r)...)
		refs = append(refs, r.Ref())
		next[r.Ref().Key()] = r
	}
	if len(violations) > 0 {
		return nil, refuse(violations)
	}
	changes, revision, err := f.commit(ctx, next, refs, req.GetExpectedRevision(), req.GetDryRun(), req.GetMessage(), 0)
	return &resealv1.ApplyResponse{Changes: changes, Revision: revision}, err
}

func (f *fakeServer) Delete(ctx context.Context, req *resealv1.DeleteRequest) (*resealv1.DeleteResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next := make(map[string]*resealv1.Resource)
	for key, r := range f.resources {
		next[key] = r
	}
	for _, ref := range req.GetResources() {
		if next[ref.Key()] == nil {
			return nil, status.Errorf(codes.NotFound, "%s does not exist", ref.Key())
		}
		delete(next, ref.Key())
	}
	var large []string
	if len(req.GetResources()) > 10 {
		large = append(large, "it removes much")
	}
	if large != nil && !req.GetDryRun() && !req.GetAllowLargeChange() {
		return nil, status.Error(codes.FailedPrecondition, "this is a large change: "+large[0])
	}
	changes, revision, err := f.commit(ctx, next, req.GetResources(), req.GetExpectedRevision(), req.GetDryRun(), req.GetMessage(), 0)
	return &resealv1.DeleteResponse{Changes: changes, Revision: revision, LargeChange: large}, err
}

func (f *fakeServer) Rollback(ctx context.Context, req *resealv1.RollbackRequest) (*resealv1.RollbackResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	to := cmp.Or(req.GetToRevision(), f.revision-1)
	state, kept := f.states[to]
	if !kept {
		return nil, status.Errorf(codes.NotFound, "revision %d is not kept", to)
	}
	next := make(map[string]*resealv1.Resource)
	for key, r := range state {
		next[key] = proto.CloneOf(r)
	}
	var refs []*resealv1.ResourceRef
	for _, r := range f.sorted(f.resources, "", nil) {
		refs = append(refs, r.Ref())
	}
	for _, r := range f.sorted(next, "", nil) {
		if f.resources[r.Ref().Key()] == nil {
			refs = append(refs, r.Ref())
		}
	}
	changes, revision, err := f.commit(ctx, next, refs, req.GetExpectedRevision(), req.GetDryRun(), req.GetMessage(), to)
	changes = slices.DeleteFunc(changes, func(c *resealv1.Change) bool { return c.GetAction() == resealv1.Change_ACTION_UNCHANGED })
	return &resealv1.RollbackResponse{Changes: changes, Revision: revision, RolledBackTo: to}, err
}

func (f *fakeServer) ListRevisions(_ context.Context, req *resealv1.ListRevisionsRequest) (*resealv1.ListRevisionsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	response := &resealv1.ListRevisionsResponse{}
	for _, r := range f.history {
		full := req.GetLimit() > 0 && len(response.Revisions) == int(req.GetLimit())
		if !full && (req.GetRevision() == 0 || req.GetRevision() == r.GetRevision()) {
			response.Revisions = append(response.Revisions, r)
		}
	}
	return response, nil
}

func (f *fakeServer) Get(_ context.Context, req *resealv1.GetRequest) (*resealv1.GetResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.resources[req.GetResource().Key()]
	if r == nil {
		return nil, status.Errorf(codes.NotFound, "%s does not exist", req.GetResource().Key())
	}
	return &resealv1.GetResponse{Resource: r}, nil
}

func (f *fakeServer) sorted(from map[string]*resealv1.Resource, kind string, labels map[string]string) []*resealv1.Resource {
	var found []*resealv1.Resource
	for _, r := range from {
		if (kind == "" || r.Kind() == kind) && hasLabels(r.GetMetadata().GetLabels(), labels) {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, func(a, b *resealv1.Resource) int { return cmp.Compare(a.Ref().Key(), b.Ref().Key()) })
	return found
}

func (f *fakeServer) List(_ context.Context, req *resealv1.ListRequest) (*resealv1.ListResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &resealv1.ListResponse{Resources: f.sorted(f.resources, req.GetKind(), req.GetMatchLabels()), Revision: f.revision}, nil
}

// watch calls send at once and after each change.
func (f *fakeServer) watch(ctx context.Context, send func() error) error {
	for first := true; ; first = false {
		f.mu.Lock()
		changed := f.changed
		err := send()
		if first {
			f.watchers++
		}
		f.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

func (f *fakeServer) Watch(req *resealv1.WatchRequest, stream grpc.ServerStreamingServer[resealv1.WatchResponse]) error {
	sent := map[string]*resealv1.Resource{}
	reset := true
	return f.watch(stream.Context(), func() error {
		response := &resealv1.WatchResponse{Revision: f.revision, Reset_: reset}
		reset = false
		now := map[string]*resealv1.Resource{}
		for _, r := range f.sorted(f.resources, req.GetKind(), req.GetMatchLabels()) {
			now[r.Ref().Key()] = r
			if sent[r.Ref().Key()] != r {
				response.Resources = append(response.Resources, r)
			}
		}
		for _, r := range f.sorted(sent, "", nil) {
			if now[r.Ref().Key()] == nil {
				response.Deletes = append(response.Deletes, r.Ref())
			}
		}
		sent = now
		return stream.Send(response)
	})
}
