package trust

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	defaultTokenTTL = time.Hour
	maxTokenTTL     = 30 * 24 * time.Hour
	maxUses         = 10_000

	maxLabels    = 64
	maxLabelSize = 253 // bytes, of a key and of a value
)

// CreateToken implements resealv1.EnrollmentServiceServer.
func (t *Trust) CreateToken(ctx context.Context, req *resealv1.CreateTokenRequest) (*resealv1.CreateTokenResponse, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	ttl := defaultTokenTTL
	if req.GetTtl() != nil {
		ttl = req.GetTtl().AsDuration()
	}
	if err := checkTokenRequest(req, ttl); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	held, err := t.client.Get(ctx, t.prefix+tokensPrefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return nil, t.storeError(ctx, err)
	}
	if held.Count >= maxTokens {
		return nil, status.Errorf(codes.ResourceExhausted, "there are %d join tokens already; revoke some (resealctl token list)", held.Count)
	}
	secret := newCredential()
	now := time.Now().UTC()
	token := storedToken{id: secret.id, joinToken: joinToken{
		Edge:       req.GetId(),
		Labels:     req.GetLabels(),
		CreatedAt:  now,
		ExpiresAt:  now.Add(ttl),
		CreatedBy:  who.identity.String(),
		SecretHash: secret.hash(),
	}}
	if token.several() {
		token.Uses = max(int(req.GetUses()), 1)
	}
	if token.revision, err = t.addToken(ctx, token.id, token.joinToken); err != nil {
		return nil, t.storeError(ctx, err)
	}
	t.registry.put(token)
	t.logger.Info("join token created", "token", token.id, "edge", token.Edge, "labels", token.Labels, "expires", token.ExpiresAt, "by", token.CreatedBy)
	return &resealv1.CreateTokenResponse{Token: secret.text(t.CAHash()), Info: token.info()}, nil
}

func checkTokenRequest(req *resealv1.CreateTokenRequest, ttl time.Duration) error {
	if err := checkName(strings.ReplaceAll(req.GetId(), "*", "x")); err != nil {
		return invalid("id", err)
	}
	switch uses := req.GetUses(); {
	case uses > maxUses:
		return invalid("uses", fmt.Errorf("%d, at most %d are allowed", uses, maxUses))
	case uses > 1 && !strings.Contains(req.GetId(), "*"):
		return invalid("uses", fmt.Errorf("%d, but %q is one edge; an id with \"*\", as %q, is for several", uses, req.GetId(), req.GetId()+"-*"))
	}
	if err := req.GetTtl().CheckValid(); req.GetTtl() != nil && err != nil {
		return invalid("ttl", err)
	}
	if ttl <= 0 || ttl > maxTokenTTL {
		return invalid("ttl", fmt.Errorf("%s is not between 0 and %s", ttl, maxTokenTTL))
	}
	if len(req.GetLabels()) > maxLabels {
		return invalid("labels", fmt.Errorf("%d labels, at most %d are allowed", len(req.GetLabels()), maxLabels))
	}
	for key, value := range req.GetLabels() {
		if key == "" || !isLabelText(key) || !isLabelText(value) {
			return invalid("labels", fmt.Errorf("%q: %q: keys have 1 to %d bytes, values at most as many, without control characters", key, value, maxLabelSize))
		}
	}
	return nil
}

func isLabelText(text string) bool {
	return len(text) <= maxLabelSize && resealv1.Legible(text)
}

// ListTokens implements resealv1.EnrollmentServiceServer.
func (t *Trust) ListTokens(ctx context.Context, _ *resealv1.ListTokensRequest) (*resealv1.ListTokensResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	tokens, err := t.openTokens(ctx)
	if err != nil {
		return nil, t.storeError(ctx, err)
	}
	response := &resealv1.ListTokensResponse{}
	for i := range tokens {
		response.Tokens = append(response.Tokens, tokens[i].info())
	}
	return response, nil
}

// RevokeToken implements resealv1.EnrollmentServiceServer.
func (t *Trust) RevokeToken(ctx context.Context, req *resealv1.RevokeTokenRequest) (*resealv1.RevokeTokenResponse, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	notFound := status.Errorf(codes.NotFound, "there is no join token %q; it may be used or expired", req.GetTokenId())
	if !isTokenID(req.GetTokenId()) {
		return nil, notFound
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	answer, err := t.client.Delete(ctx, t.prefix+tokensPrefix+req.GetTokenId())
	if err != nil {
		return nil, t.storeError(ctx, err)
	}
	if answer.Deleted == 0 {
		return nil, notFound
	}
	t.registry.drop(req.GetTokenId())
	t.logger.Info("join token revoked", "token", req.GetTokenId(), "by", who.identity.String())
	return &resealv1.RevokeTokenResponse{}, nil
}

// Edge names the calling edge, with the labels that its join token gave it, which
// replace those that it claims; nil when it gave none. It asks the store only
// about an edge that this replica does not know as it is. The error is a gRPC
// status.
func (t *Trust) Edge(ctx context.Context) (id string, labels map[string]string, err error) {
	who, err := callerOf(ctx)
	if err != nil {
		return "", nil, err
	}
	if who.identity.Role != resealv1.Role_ROLE_EDGE {
		return "", nil, status.Errorf(codes.PermissionDenied, "%s is not an edge", who.identity)
	}
	id = who.identity.Name
	record, known := t.registry.edge(id)
	if !known || record.Enrolment != who.certificate.Subject.SerialNumber {
		ctx, cancel := context.WithTimeout(ctx, storeTimeout)
		defer cancel()
		found, err := t.edge(ctx, id)
		if err != nil {
			return "", nil, t.storeError(ctx, err)
		}
		if found == nil {
			return id, nil, nil
		}
		record = *found
	}
	if record.Enrolment != who.certificate.Subject.SerialNumber {
		t.logger.Warn("an edge was refused: its id was enrolled anew", "edge", id)
		return "", nil, status.Errorf(codes.PermissionDenied, "%s was enrolled anew with another join token; this certificate is no longer good", who.identity)
	}
	if len(record.Labels) == 0 {
		return id, nil, nil
	}
	return id, record.Labels, nil
}

// storeError is what a caller hears of an error of the store.
func (t *Trust) storeError(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, errRecord):
		t.logger.LogAttrs(ctx, slog.LevelError, "the store holds a record that can't be read", slog.Any("error", err))
		return status.Error(codes.Internal, "the store holds a record that can't be read; see the control plane's log")
	case errors.Is(ctx.Err(), context.Canceled):
		return status.Error(codes.Canceled, "the call was cancelled")
	}
	t.logger.LogAttrs(ctx, slog.LevelWarn, "the store failed", slog.Any("error", err))
	return status.Error(codes.Unavailable, "the store does not answer; try again")
}

// invalid is the status for a request with a bad field.
func invalid(field string, err error) error {
	st := status.New(codes.InvalidArgument, fmt.Sprintf("%s: %v", field, err))
	detailed, detailErr := st.WithDetails(&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
		{Field: field, Description: err.Error()},
	}})
	if detailErr != nil {
		return st.Err()
	}
	return detailed.Err()
}
