package trust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	usersPrefix = "trust/users/"

	// Short, so that a copied context file is soon worth nothing; whoever works with
	// it renews it without noticing.
	defaultUserTTL = 24 * time.Hour
	minUserTTL     = time.Minute
	maxUserTTL     = defaultOperatorTTL
	// maxUsers bounds what a list of them reads, which is one answer of the store.
	maxUsers = 1000

	// writeAttempts bounds how often a write is tried again because another came
	// first. In each round one of them wins.
	writeAttempts = 8
)

// userRecord is what the store holds of a user, under trust/users/<name>. Without
// it a user can't renew. Of a user whose certificate is revoked there is none.
type userRecord struct {
	Role resealv1.Role `json:"role"`
	// Enrolment is in all certificates of the user. Another user of the same name,
	// later, has another one.
	Enrolment string        `json:"enrolment"`
	TTL       time.Duration `json:"ttl"`
	CreatedAt time.Time     `json:"createdAt"`
	CreatedBy string        `json:"createdBy"`
	// ExpiresAt is when the last certificate that was issued ends.
	ExpiresAt time.Time `json:"expiresAt"`
	RenewedAt time.Time `json:"renewedAt,omitzero"`
}

// storedUser is a userRecord with where it was found.
type storedUser struct {
	userRecord
	name     string
	revision int64 // of its key
}

func (u *storedUser) identity() Identity { return Identity{Role: u.Role, Name: u.name} }

func (u *storedUser) message() *resealv1.User {
	message := &resealv1.User{
		Name:      u.name,
		Role:      u.Role,
		CreatedAt: timestamppb.New(u.CreatedAt),
		CreatedBy: u.CreatedBy,
		ExpiresAt: timestamppb.New(u.ExpiresAt),
		Ttl:       durationpb.New(u.TTL),
	}
	if !u.RenewedAt.IsZero() {
		message.RenewedAt = timestamppb.New(u.RenewedAt)
	}
	return message
}

// isPerson tells whether a role is one of users.
func isPerson(role resealv1.Role) bool {
	return role >= resealv1.Role_ROLE_VIEWER && role <= resealv1.Role_ROLE_ADMIN
}

// CreateUser implements resealv1.EnrollmentServiceServer.
func (t *Trust) CreateUser(ctx context.Context, req *resealv1.CreateUserRequest) (*resealv1.CreateUserResponse, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	opened := t.opened.Load()
	if opened == nil {
		return nil, status.Error(codes.Unavailable, ErrNotOpen.Error())
	}
	ttl := defaultUserTTL
	if req.GetTtl() != nil {
		ttl = req.GetTtl().AsDuration()
	}
	if err := checkUserRequest(req, ttl); err != nil {
		return nil, err
	}
	request, err := parseRequest(req.GetCertificateRequest())
	if err != nil {
		return nil, invalid("certificate_request", err)
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	now := time.Now().UTC()
	user := storedUser{name: req.GetName(), userRecord: userRecord{
		Role: req.GetRole(), Enrolment: newCredential().id, TTL: ttl, CreatedAt: now, CreatedBy: who.identity.String(),
	}}
	if user.revision, err = t.vacant(ctx, user.name, now); err != nil {
		return nil, err
	}
	certificate, err := t.issueUser(opened.authority, user, request.publicKey)
	if err != nil {
		return nil, err
	}
	user.ExpiresAt = certificate.NotAfter
	switch err := t.putUser(ctx, user); {
	case errors.Is(err, errTaken):
		return nil, status.Errorf(codes.AlreadyExists, "user %q was made by another call just now", user.name)
	case err != nil:
		return nil, t.storeError(ctx, err)
	}
	t.logger.Info("user created", "user", user.identity().String(), "not_after", user.ExpiresAt, "by", user.CreatedBy)
	return &resealv1.CreateUserResponse{
		User:           user.message(),
		CertificatePem: string(certificatePEM(certificate.Raw)),
		CaPem:          string(opened.authority.pem()),
		TrustDomain:    t.trustDomain,
	}, nil
}

func checkUserRequest(req *resealv1.CreateUserRequest, ttl time.Duration) error {
	if err := checkName(req.GetName()); err != nil {
		return invalid("name", err)
	}
	if req.GetName() == localName {
		return invalid("name", fmt.Errorf("%q is the administrator of the first start; choose another name", localName))
	}
	if !isPerson(req.GetRole()) {
		return invalid("role", errors.New("it must be viewer, operator or admin"))
	}
	if err := req.GetTtl().CheckValid(); req.GetTtl() != nil && err != nil {
		return invalid("ttl", err)
	}
	if ttl < minUserTTL || ttl > maxUserTTL {
		return invalid("ttl", fmt.Errorf("%s is not between %s and %s", ttl, minUserTTL, maxUserTTL))
	}
	return nil
}

// vacant returns the revision at which there is no user of the name, or one that
// can't renew any more. The error is a status.
func (t *Trust) vacant(ctx context.Context, name string, now time.Time) (int64, error) {
	found, err := t.user(ctx, name)
	switch {
	case err != nil:
		return 0, t.storeError(ctx, err)
	case found != nil && now.Before(found.ExpiresAt):
		return 0, status.Errorf(codes.AlreadyExists,
			"user %q exists, with role %s and a certificate until %s; revoke it first, or choose another name",
			name, resealv1.Label(found.Role), found.ExpiresAt.Format(time.RFC3339))
	case found != nil:
		return found.revision, nil
	}
	held, err := t.client.Get(ctx, t.prefix+usersPrefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return 0, t.storeError(ctx, err)
	}
	if held.Count >= maxUsers {
		return 0, status.Errorf(codes.ResourceExhausted, "there are %d users already; revoke some (resealctl user list)", held.Count)
	}
	return 0, nil
}

// ListUsers implements resealv1.EnrollmentServiceServer.
func (t *Trust) ListUsers(ctx context.Context, _ *resealv1.ListUsersRequest) (*resealv1.ListUsersResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	users, err := t.users(ctx)
	if err != nil {
		return nil, t.storeError(ctx, err)
	}
	response := &resealv1.ListUsersResponse{}
	for i := range users {
		response.Users = append(response.Users, users[i].message())
	}
	return response, nil
}

// RenewUser implements resealv1.EnrollmentServiceServer.
func (t *Trust) RenewUser(ctx context.Context, req *resealv1.RenewUserRequest) (*resealv1.RenewUserResponse, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	opened := t.opened.Load()
	if opened == nil {
		return nil, status.Error(codes.Unavailable, ErrNotOpen.Error())
	}
	request, err := parseRequest(req.GetCertificateRequest())
	if err != nil {
		return nil, invalid("certificate_request", err)
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	for range writeAttempts {
		user, err := t.user(ctx, who.identity.Name)
		if err != nil {
			return nil, t.storeError(ctx, err)
		}
		if user == nil || user.Role != who.identity.Role || user.Enrolment != who.certificate.Subject.SerialNumber {
			t.logger.Warn("renewal refused", "user", who.identity.String(), "known", user != nil)
			return nil, status.Errorf(codes.FailedPrecondition, "%s is no user that can renew: it was revoked, made anew, or its certificate comes from an earlier version; "+
				"an administrator can make a user: resealctl user create", who.identity)
		}
		certificate, err := t.issueUser(opened.authority, *user, request.publicKey)
		if err != nil {
			return nil, err
		}
		user.RenewedAt = time.Now().UTC()
		if certificate.NotAfter.After(user.ExpiresAt) {
			user.ExpiresAt = certificate.NotAfter
		}
		switch err := t.putUser(ctx, *user); {
		case errors.Is(err, errTaken):
			continue // another renewal, or a revocation, came first
		case err != nil:
			return nil, t.storeError(ctx, err)
		}
		t.logger.Info("user renewed", "user", who.identity.String(), "not_after", certificate.NotAfter)
		return &resealv1.RenewUserResponse{
			CertificatePem: string(certificatePEM(certificate.Raw)),
			CaPem:          string(opened.authority.pem()),
		}, nil
	}
	return nil, status.Errorf(codes.Unavailable, "%s is being renewed by others; try again", who.identity)
}

// putUser stores a user, if its key is still at the revision at which it was read.
// Errors: errTaken when it is not.
func (t *Trust) putUser(ctx context.Context, user storedUser) error {
	value, err := json.Marshal(user.userRecord)
	if err != nil {
		return err
	}
	key := t.prefix + usersPrefix + user.name
	answer, err := t.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", user.revision)).
		Then(clientv3.OpPut(key, string(value))).
		Commit()
	switch {
	case err != nil:
		return err
	case !answer.Succeeded:
		return errTaken
	}
	t.registry.putUser(user.name, user.userRecord)
	return nil
}

// user reads one user; nil when there is none.
func (t *Trust) user(ctx context.Context, name string) (*storedUser, error) {
	answer, err := t.client.Get(ctx, t.prefix+usersPrefix+name)
	if err != nil || len(answer.Kvs) == 0 {
		return nil, err
	}
	user, err := t.parseUser(answer.Kvs[0])
	return &user, err
}

// users reads all users, sorted by name.
func (t *Trust) users(ctx context.Context) ([]storedUser, error) {
	answer, err := t.client.Get(ctx, t.prefix+usersPrefix, clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	users := make([]storedUser, len(answer.Kvs))
	for i, kv := range answer.Kvs {
		if users[i], err = t.parseUser(kv); err != nil {
			return nil, err
		}
	}
	return users, nil
}

func (t *Trust) parseUser(kv *mvccpb.KeyValue) (storedUser, error) {
	user := storedUser{name: strings.TrimPrefix(string(kv.Key), t.prefix+usersPrefix), revision: kv.ModRevision}
	if err := json.Unmarshal(kv.Value, &user.userRecord); err != nil {
		return storedUser{}, fmt.Errorf("%w: %s: %w", errRecord, kv.Key, err)
	}
	return user, nil
}
