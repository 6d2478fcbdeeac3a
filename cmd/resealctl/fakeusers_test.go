package main

import (
	"context"
	"crypto/x509"
	"net/url"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// certifyUser signs what a PKCS #10 request asks for.
func (f *fakeServer) certifyUser(role resealv1.Role, name string, request []byte, ttl time.Duration) (string, error) {
	parsed, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return "", status.Error(codes.InvalidArgument, "certificate_request: not a PKCS #10 certificate request in DER")
	}
	uri := &url.URL{Scheme: "spiffe", Host: "reseal", Path: "/" + resealv1.Label(role) + "/" + name}
	certPEM, err := f.authority.certify(&x509.Certificate{URIs: []*url.URL{uri}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ttl + 30*time.Second)}, parsed.PublicKey)
	return string(certPEM), err
}

func (f *fakeServer) CreateUser(ctx context.Context, req *resealv1.CreateUserRequest) (*resealv1.CreateUserResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if slices.ContainsFunc(f.users, func(u *resealv1.User) bool { return u.GetName() == req.GetName() }) {
		return nil, status.Errorf(codes.AlreadyExists, "user %q exists", req.GetName())
	}
	certPEM, err := f.certifyUser(req.GetRole(), req.GetName(), req.GetCertificateRequest(), req.GetTtl().AsDuration())
	if err != nil {
		return nil, err
	}
	who, _ := callerOf(ctx)
	user := &resealv1.User{
		Name: req.GetName(), Role: req.GetRole(), CreatedBy: strings.Replace(who.String(), " ", "/", 1), Ttl: req.GetTtl(),
		CreatedAt: timestamppb.New(fakeEpoch), ExpiresAt: timestamppb.New(time.Now().Add(req.GetTtl().AsDuration() + 30*time.Second)),
	}
	f.users = append(f.users, user)
	return &resealv1.CreateUserResponse{User: proto.CloneOf(user), CertificatePem: certPEM, CaPem: string(f.authority.pem), TrustDomain: "reseal"}, nil
}

func (f *fakeServer) ListUsers(context.Context, *resealv1.ListUsersRequest) (*resealv1.ListUsersResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &resealv1.ListUsersResponse{Users: slices.Clone(f.users)}, nil
}

func (f *fakeServer) RenewUser(ctx context.Context, req *resealv1.RenewUserRequest) (*resealv1.RenewUserResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.renewing {
		return nil, status.Error(codes.FailedPrecondition, "no user that can renew")
	}
	f.renewals++
	who, _ := callerOf(ctx)
	certPEM, err := f.certifyUser(who.role, who.name, req.GetCertificateRequest(), 24*time.Hour)
	return &resealv1.RenewUserResponse{CertificatePem: certPEM, CaPem: string(f.authority.pem)}, err
}

func (f *fakeServer) revoke(ctx context.Context, role resealv1.Role, name, reason string) *resealv1.Revocation {
	who, _ := callerOf(ctx)
	r := &resealv1.Revocation{Role: role, Name: name, Reason: reason, RevokedBy: strings.Replace(who.String(), " ", "/", 1),
		RevokedAt: timestamppb.New(fakeEpoch), ForgottenAt: timestamppb.New(time.Now().Add(24*time.Hour + 30*time.Second))}
	f.revocations = append(f.revocations, r)
	return r
}

func (f *fakeServer) RevokeUser(ctx context.Context, req *resealv1.RevokeUserRequest) (*resealv1.RevokeUserResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := slices.IndexFunc(f.users, func(u *resealv1.User) bool { return u.GetName() == req.GetName() })
	if at < 0 {
		return nil, status.Error(codes.NotFound, "no such user")
	}
	user := f.users[at]
	f.users = slices.Delete(f.users, at, at+1)
	return &resealv1.RevokeUserResponse{Revocation: f.revoke(ctx, user.GetRole(), user.GetName(), req.GetReason())}, nil
}

func (f *fakeServer) RevokeEdge(ctx context.Context, req *resealv1.RevokeEdgeRequest) (*resealv1.RevokeEdgeResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.ContainsFunc(f.edges, func(e *resealv1.Edge) bool { return e.GetId() == req.GetId() }) {
		return nil, status.Error(codes.NotFound, "no such edge")
	}
	response := &resealv1.RevokeEdgeResponse{Revocation: f.revoke(ctx, resealv1.Role_ROLE_EDGE, req.GetId(), req.GetReason())}
	response.HeldKeys = []*resealv1.HeldKeys{{Keyring: "default", Epochs: []uint64{7, 8}, TicketAge: durationpb.New(133 * time.Minute)}}
	return response, nil
}

func (f *fakeServer) ListRevocations(context.Context, *resealv1.ListRevocationsRequest) (*resealv1.ListRevocationsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &resealv1.ListRevocationsResponse{Revocations: slices.Clone(f.revocations)}, nil
}

func (f *fakeServer) ReadAudit(req *resealv1.ReadAuditRequest, stream grpc.ServerStreamingServer[resealv1.ReadAuditResponse]) error {
	var response resealv1.ReadAuditResponse
	for _, e := range []*resealv1.AuditEntry{
		{Number: 7, Time: timestamppb.New(fakeEpoch), User: "admin/alice", Source: "10.0.0.1:1", Action: "AdminService.Apply", Outcome: "OK", Message: "moved",
			Revision: 12, Hash: "aa", Resources: []*resealv1.AuditedResource{{Resource: "BackendPool/jetty", Change: "configured", Before: "01", After: "02", Diff: "-a\n+b\n"}}},
		{Number: 8, Time: timestamppb.New(fakeEpoch), User: "viewer/vera", Source: "10.0.0.2:1", Action: "AdminService.Apply", Outcome: "PERMISSION_DENIED",
			Error: "not you", Suppressed: 3, Previous: "ab", Broken: true},
	} {
		about := req.GetResource() == "" || e.GetResources() != nil && e.GetResources()[0].GetResource() == req.GetResource()
		if about && (req.GetUser() == "" || strings.HasSuffix(e.GetUser(), "/"+req.GetUser())) {
			response.Entries = append(response.Entries, e)
		}
	}
	if len(response.GetEntries()) == 0 {
		return nil
	}
	return stream.Send(&response)
}
