package trust

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	revokedPrefix = "trust/revoked/"

	// maxRevoked bounds the list that every replica holds in memory: some 3 MiB.
	maxRevoked = 10_000
	// maxReason bounds what is said of a revocation, in bytes.
	maxReason = 1024
	// sweepInterval is how often revocations are forgotten that are no longer needed.
	sweepInterval = time.Hour
)

// revocation is what the store holds under trust/revoked/<role>/<name>. It is on no
// lease, so that backups have it. It is about all certificates of the identity but
// those of an enrolment since: then there is a record of the edge or user again, and
// the enrolment that it names is good. So a certificate that was issued, somewhere,
// while its owner was revoked is no good either.
type revocation struct {
	At     time.Time `json:"at"`
	By     string    `json:"by"`
	Reason string    `json:"reason,omitempty"`
	// Until is when no certificate is left that has not expired.
	Until time.Time `json:"until"`
}

func (r revocation) message(of Identity) *resealv1.Revocation {
	return &resealv1.Revocation{
		Role: of.Role, Name: of.Name, RevokedAt: timestamppb.New(r.At), RevokedBy: r.By, Reason: r.Reason,
		ForgottenAt: timestamppb.New(r.Until),
	}
}

// refusal is what a caller hears whose identity was revoked.
func (r revocation) refusal(of Identity) error {
	text := fmt.Sprintf("%s was revoked on %s by %s", of, r.At.Format(time.RFC3339), r.By)
	if r.Reason != "" {
		text += fmt.Sprintf(" (%s)", r.Reason)
	}
	return status.Error(codes.Unauthenticated, text+"; its certificate is no longer good")
}

// revokedKey is the key of a revocation below the prefix.
func revokedKey(of Identity) string { return revokedPrefix + of.String() }

// parseRevoked reads the rest of a key after revokedPrefix.
func parseRevoked(path string) (Identity, bool) {
	kind, name, _ := strings.Cut(path, "/")
	role, ok := rolePaths[kind]
	return Identity{Role: role, Name: name}, ok
}

// refused is the status for a caller whose identity was revoked, nil for others.
func (t *Trust) refused(who caller) error {
	if who.certificate == nil {
		return nil
	}
	entry, revoked := t.registry.revocation(who.identity, who.certificate.Subject.SerialNumber)
	if !revoked || time.Now().After(entry.Until) {
		return nil
	}
	return entry.refusal(who.identity)
}

// RevokeUser implements resealv1.EnrollmentServiceServer.
func (t *Trust) RevokeUser(ctx context.Context, req *resealv1.RevokeUserRequest) (*resealv1.RevokeUserResponse, error) {
	entry, err := newRevocation(ctx, req.GetReason())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	for range writeAttempts {
		user, err := t.user(ctx, req.GetName())
		if err != nil {
			return nil, t.storeError(ctx, err)
		}
		if user == nil {
			return nil, status.Errorf(codes.NotFound, "there is no user %q (resealctl user list)", req.GetName())
		}
		guards, err := t.afterUser(ctx, user)
		if err != nil {
			return nil, err
		}
		entry.Until = user.ExpiresAt.Add(maxBackdate)
		done, err := t.putRevocation(ctx, user.identity(), entry, t.prefix+usersPrefix+user.name, user.revision, guards...)
		if err != nil {
			return nil, err
		}
		if done {
			return &resealv1.RevokeUserResponse{Revocation: entry.message(user.identity())}, nil
		}
	}
	return nil, status.Errorf(codes.Unavailable, "user %q is being changed by others; try again", req.GetName())
}

// afterUser are the guards that an administrator is left without a user. The error
// is a status: it is the last one.
func (t *Trust) afterUser(ctx context.Context, user *storedUser) ([]clientv3.Cmp, error) {
	if user.Role != resealv1.Role_ROLE_ADMIN {
		return nil, nil
	}
	other, err := t.administrator(ctx, user.name)
	switch {
	case err != nil:
		return nil, t.storeError(ctx, err)
	case other == nil:
		return nil, status.Errorf(codes.FailedPrecondition,
			"%s is the last administrator with a certificate that has not expired; make another one first: resealctl user create NAME --role admin", user.identity())
	}
	return []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(t.prefix+usersPrefix+other.name), "=", other.revision)}, nil
}

// administrator is the administrator, other than the one named, whose certificate
// lasts longest; nil when there is none whose has not expired.
func (t *Trust) administrator(ctx context.Context, except string) (*storedUser, error) {
	users, err := t.users(ctx)
	if err != nil {
		return nil, err
	}
	var found *storedUser
	latest := time.Now()
	for i := range users {
		if u := &users[i]; u.Role == resealv1.Role_ROLE_ADMIN && u.name != except && u.ExpiresAt.After(latest) {
			found, latest = u, u.ExpiresAt
		}
	}
	return found, nil
}

// RevokeEdge implements resealv1.EnrollmentServiceServer.
func (t *Trust) RevokeEdge(ctx context.Context, req *resealv1.RevokeEdgeRequest) (*resealv1.RevokeEdgeResponse, error) {
	entry, err := newRevocation(ctx, req.GetReason())
	if err != nil {
		return nil, err
	}
	notFound := status.Errorf(codes.NotFound, "no edge %q is enrolled", req.GetId())
	if checkName(req.GetId()) != nil {
		return nil, notFound
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	entry.Until = entry.At.Add(t.edgeCertTTL + maxBackdate)
	of, key := Identity{Role: resealv1.Role_ROLE_EDGE, Name: req.GetId()}, t.prefix+edgesPrefix+req.GetId()
	for range writeAttempts {
		found, err := t.client.Get(ctx, key)
		if err != nil {
			return nil, t.storeError(ctx, err)
		}
		if len(found.Kvs) == 0 {
			return nil, notFound
		}
		var record edgeRecord
		_ = json.Unmarshal(found.Kvs[0].Value, &record) // one that can't be read can be taken back
		var keys []*resealv1.HeldKeys
		if t.heldKeys != nil { // before it is gone, and with it what is known of it
			keys = t.heldKeys(ctx, of.Name, record.Labels)
		}
		done, err := t.putRevocation(ctx, of, entry, key, found.Kvs[0].ModRevision)
		if err != nil {
			return nil, err
		}
		if done {
			return &resealv1.RevokeEdgeResponse{Revocation: entry.message(of), HeldKeys: keys}, nil
		}
	}
	return nil, status.Errorf(codes.Unavailable, "edge %q is being enrolled; try again", req.GetId())
}

func newRevocation(ctx context.Context, reason string) (revocation, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return revocation{}, err
	}
	if len(reason) > maxReason || !resealv1.Legible(reason) {
		return revocation{}, invalid("reason", fmt.Errorf("it has %d bytes; at most %d are allowed, without control characters", len(reason), maxReason))
	}
	return revocation{At: time.Now().UTC().Truncate(time.Second), By: who.identity.String(), Reason: reason}, nil
}

// putRevocation stores a revocation and removes the record of whom it is about, in
// one transaction; done is false when the record is another one by now. The error is
// a status.
func (t *Trust) putRevocation(ctx context.Context, of Identity, entry revocation, record string, revision int64, guards ...clientv3.Cmp) (done bool, err error) {
	held, err := t.client.Get(ctx, t.prefix+revokedPrefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return false, t.storeError(ctx, err)
	}
	if held.Count >= maxRevoked {
		return false, status.Errorf(codes.ResourceExhausted, "there are %d revocations; they are forgotten when the certificates that they are about have expired", held.Count)
	}
	value, err := json.Marshal(entry)
	if err != nil {
		return false, err
	}
	answer, err := t.client.Txn(ctx).
		If(append(guards, clientv3.Compare(clientv3.ModRevision(record), "=", revision))...).
		Then(clientv3.OpDelete(record), clientv3.OpPut(t.prefix+revokedKey(of), string(value))).
		Commit()
	if err != nil {
		return false, t.storeError(ctx, err)
	}
	if answer.Succeeded {
		t.logger.Warn("revoked", "identity", of.String(), "by", entry.By, "reason", entry.Reason)
		t.registry.revoke(of, entry)
		t.enforce([]Identity{of})
	}
	return answer.Succeeded, nil
}

// ListRevocations implements resealv1.EnrollmentServiceServer.
func (t *Trust) ListRevocations(ctx context.Context, _ *resealv1.ListRevocationsRequest) (*resealv1.ListRevocationsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	answer, err := t.client.Get(ctx, t.prefix+revokedPrefix, clientv3.WithPrefix())
	if err != nil {
		return nil, t.storeError(ctx, err)
	}
	response := &resealv1.ListRevocationsResponse{}
	for _, kv := range answer.Kvs {
		if of, entry, ok := t.parseRevocation(kv); ok && time.Now().Before(entry.Until) {
			response.Revocations = append(response.Revocations, entry.message(of))
		}
	}
	slices.SortFunc(response.Revocations, func(a, b *resealv1.Revocation) int {
		if a.GetRole() != b.GetRole() {
			return int(a.GetRole() - b.GetRole())
		}
		return strings.Compare(a.GetName(), b.GetName())
	})
	return response, nil
}

// parseRevocation reads an entry. One that can't be read, which a later version may
// have written, still revokes, for as long as it is there.
func (t *Trust) parseRevocation(kv *mvccpb.KeyValue) (Identity, revocation, bool) {
	of, ok := parseRevoked(strings.TrimPrefix(string(kv.Key), t.prefix+revokedPrefix))
	var entry revocation
	if err := json.Unmarshal(kv.Value, &entry); err != nil {
		entry = revocation{By: "somebody", Until: time.Now().Add(maxUserTTL)}
	}
	return of, entry, ok
}

// sweep forgets, from time to time, the revocations of certificates that have
// expired, until ctx ends. All replicas do it; one comes first.
func (t *Trust) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		if err := t.forget(ctx, time.Now()); err != nil && ctx.Err() == nil {
			t.logger.Warn("old revocations are still there; that is tried again", "error", err, "after", sweepInterval)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// forget removes the revocations that are no longer needed at a time.
func (t *Trust) forget(ctx context.Context, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	answer, err := t.client.Get(ctx, t.prefix+revokedPrefix, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	for _, kv := range answer.Kvs {
		if _, entry, ok := t.parseRevocation(kv); !ok || now.Before(entry.Until) {
			continue
		}
		key := string(kv.Key)
		_, err := t.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", kv.ModRevision)).Then(clientv3.OpDelete(key)).Commit()
		if err != nil {
			return err
		}
	}
	return nil
}
