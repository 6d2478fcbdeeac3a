package trust

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxRequestSize bounds a certificate request, in bytes.
const maxRequestSize = 16 << 10

// errRefused does not say whether the token is unknown, used, revoked or
// expired: whoever guesses learns nothing.
var errRefused = status.Error(codes.PermissionDenied, "the join token was refused: it is unknown, used, revoked or expired")

var errTooMany = status.Error(codes.ResourceExhausted, "too many enrolments from this address failed just now; try again in some seconds")

// Enroll implements resealv1.EnrollmentServiceServer. Whoever reaches the port can
// call it. A token that this replica does not know is looked for in the store, a
// limited number of times for each address; a token that it knows is never held up by
// that. Few calls are worked on at the same time.
func (t *Trust) Enroll(ctx context.Context, req *resealv1.EnrollRequest) (*resealv1.EnrollResponse, error) {
	opened := t.opened.Load()
	if opened == nil {
		return nil, status.Error(codes.Unavailable, ErrNotOpen.Error())
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if req.GetToken() == "" && req.GetExpired() != nil {
		response, err := t.comeBack(ctx, opened.authority, req)
		if err != nil {
			t.logger.Warn("an edge can't come back", "edge", req.GetId(), "error", err)
		}
		return response, err
	}
	secret, ok := parseCredential(req.GetToken(), opened.authority.hash())
	if !ok {
		return nil, errRefused
	}
	known := t.knownToken(secret)
	if known == nil && !t.guesses.allow(sourceOf(ctx)) {
		return nil, errTooMany
	}
	end, err := t.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	response, err := t.enroll(ctx, opened.authority, secret, known, req)
	switch status.Code(err) {
	case codes.PermissionDenied, codes.InvalidArgument, codes.AlreadyExists:
		t.logger.Warn("enrolment refused", "token", secret.id, "edge", req.GetId(), "error", err)
	}
	return response, err
}

// turn waits until an enrolment may be worked on. end is called when it has been.
func (t *Trust) turn(ctx context.Context) (end func(), err error) {
	select {
	case t.enrolling <- struct{}{}:
		return func() { <-t.enrolling }, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// knownToken returns the token that belongs to secret, if this replica knows it.
func (t *Trust) knownToken(secret credential) *storedToken {
	token, ok := t.registry.token(secret.id)
	// The same work whether there is a token or not.
	want := make([]byte, sha256.Size)
	if ok {
		want = token.SecretHash
	}
	if equal := subtle.ConstantTimeCompare(want, secret.hash()); !ok || equal != 1 {
		return nil
	}
	return &token
}

// enroll uses the token that belongs to secret, starting with what is known of it,
// nil for nothing.
func (t *Trust) enroll(ctx context.Context, authority *authority, secret credential, known *storedToken, req *resealv1.EnrollRequest) (*resealv1.EnrollResponse, error) {
	var request certificateRequest
	for {
		token, err := known, error(nil)
		if known = nil; token == nil {
			if token, err = t.findToken(ctx, secret); err != nil {
				return nil, err
			}
		}
		if !token.invites(req.GetId()) {
			return nil, invalid("id", fmt.Errorf("the join token is for edge %q, not for %q", token.Edge, req.GetId()))
		}
		// Only now: verifying a signature costs more than what comes before.
		if request, err = parseRequest(req.GetCertificateRequest()); err != nil {
			return nil, invalid("certificate_request", err)
		}
		response, err := t.redeem(ctx, authority, token, req.GetId(), request)
		if errors.Is(err, errTaken) {
			continue // what is known may be old; a token is used once, or gone, or by one more
		}
		return response, err
	}
}

// findToken returns the token that belongs to secret, or a status.
func (t *Trust) findToken(ctx context.Context, secret credential) (*storedToken, error) {
	token, err := t.token(ctx, secret.id)
	if err != nil {
		return nil, t.storeError(ctx, err)
	}
	// The same work whether there is a token or not.
	want := make([]byte, sha256.Size)
	if token != nil {
		want = token.SecretHash
	}
	if equal := subtle.ConstantTimeCompare(want, secret.hash()); token == nil || equal != 1 {
		return nil, errRefused
	}
	return token, nil
}

// redeem trades a token for a certificate of an edge that it invites. Errors: errTaken
// when the token is another one by now, or a status.
func (t *Trust) redeem(ctx context.Context, authority *authority, token *storedToken, id string, request certificateRequest) (*resealv1.EnrollResponse, error) {
	now := time.Now().UTC()
	if token.several() {
		return t.redeemOne(ctx, authority, token, id, request, now)
	}
	if token.repeats(now, request.keyHash) {
		return t.admit(authority, token, id, token.id, request, "edge enrolled again with the same key")
	}
	if !token.open(now) {
		return nil, errRefused
	}
	if err := t.useToken(ctx, *token, request.keyHash, now); err != nil {
		return nil, t.useError(ctx, err)
	}
	return t.admit(authority, token, id, token.id, request, "edge enrolled")
}

// redeemOne redeems one of the uses of a token for several edges. Such a token replaces
// no edge: whoever has it could take the place of any.
func (t *Trust) redeemOne(ctx context.Context, authority *authority, token *storedToken, id string, request certificateRequest, now time.Time) (*resealv1.EnrollResponse, error) {
	there, err := t.edge(ctx, id)
	switch {
	case err != nil:
		return nil, t.storeError(ctx, err)
	case there != nil && there.repeats(token.id, now, request.keyHash):
		return t.admit(authority, token, id, there.Enrolment, request, "edge enrolled again with the same key")
	case there != nil:
		return nil, status.Errorf(codes.AlreadyExists, "edge %q is enrolled, and a join token for several edges replaces none; make one for it alone: resealctl token create --id %s", id, id)
	case !token.open(now):
		return nil, errRefused
	}
	edge := edgeRecord{Labels: token.Labels, Enrolment: token.id + "-" + newCredential().id, UsedKey: request.keyHash, EnrolledAt: now, InvitedBy: token.CreatedBy}
	if err := t.useOne(ctx, *token, id, edge); err != nil {
		return nil, t.useError(ctx, err)
	}
	return t.admit(authority, token, id, edge.Enrolment, request, "edge enrolled")
}

func (t *Trust) useError(ctx context.Context, err error) error {
	if errors.Is(err, errTaken) {
		return err
	}
	return t.storeError(ctx, err)
}

func (t *Trust) admit(authority *authority, token *storedToken, id, enrolment string, request certificateRequest, message string) (*resealv1.EnrollResponse, error) {
	certificate, err := t.issueEdge(authority, id, enrolment, request.publicKey)
	if err != nil {
		return nil, err
	}
	t.logger.Info(message, "edge", id, "labels", token.Labels, "token", token.id, "invited_by", token.CreatedBy, "not_after", certificate.NotAfter)
	return t.enrolled(authority, certificate), nil
}

func (t *Trust) enrolled(authority *authority, certificate *x509.Certificate) *resealv1.EnrollResponse {
	return &resealv1.EnrollResponse{
		CertificatePem: string(certificatePEM(certificate.Raw)),
		CaPem:          string(authority.pem()),
		TrustDomain:    t.trustDomain,
	}
}

// Renew implements resealv1.EnrollmentServiceServer.
func (t *Trust) Renew(ctx context.Context, req *resealv1.RenewRequest) (*resealv1.RenewResponse, error) {
	who, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	opened := t.opened.Load()
	if opened == nil {
		return nil, status.Error(codes.Unavailable, ErrNotOpen.Error())
	}
	if who.identity.Role != resealv1.Role_ROLE_EDGE {
		return nil, status.Errorf(codes.PermissionDenied, "%s is not an edge", who.identity)
	}
	request, err := parseRequest(req.GetCertificateRequest())
	if err != nil {
		return nil, invalid("certificate_request", err)
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	certificate, err := t.renewEdge(ctx, opened.authority, who, request)
	if err != nil {
		return nil, err
	}
	t.logger.Debug("edge certificate renewed", "edge", who.identity.Name, "not_after", certificate.NotAfter)
	return &resealv1.RenewResponse{
		CertificatePem: string(certificatePEM(certificate.Raw)),
		CaPem:          string(opened.authority.pem()),
	}, nil
}

// renewEdge issues the next certificate of an edge that has proved who it is. The error is
// a status.
func (t *Trust) renewEdge(ctx context.Context, authority *authority, who caller, request certificateRequest) (*x509.Certificate, error) {
	record, err := t.edge(ctx, who.identity.Name)
	if err != nil {
		return nil, t.storeError(ctx, err)
	}
	if record == nil || record.Enrolment != who.certificate.Subject.SerialNumber {
		t.logger.Warn("renewal refused", "edge", who.identity.Name, "enrolled", record != nil)
		return nil, status.Errorf(codes.PermissionDenied, "%s was removed or enrolled anew with another join token; this certificate can't be renewed", who.identity)
	}
	return t.issueEdge(authority, who.identity.Name, record.Enrolment, request.publicKey)
}

func (t *Trust) issueEdge(authority *authority, id, enrolment string, key crypto.PublicKey) (*x509.Certificate, error) {
	certificate, err := authority.issue(leaf{
		uri:       t.uri("edge/" + id),
		publicKey: key,
		ttl:       t.edgeCertTTL,
		// Also a server's, for the edge's own administration page.
		usages:    []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		enrolment: enrolment,
	})
	if err != nil {
		t.logger.Error("issue an edge certificate", "edge", id, "error", err)
		return nil, status.Error(codes.Internal, "the certificate could not be issued; see the control plane's log")
	}
	return certificate, nil
}

// certificateRequest is what counts of a PKCS #10 request.
type certificateRequest struct {
	publicKey crypto.PublicKey
	keyHash   []byte // SHA-256 of the SubjectPublicKeyInfo
}

// parseRequest reads a request and verifies that its sender holds the key.
func parseRequest(der []byte) (certificateRequest, error) {
	if len(der) > maxRequestSize {
		return certificateRequest{}, fmt.Errorf("%d bytes, at most %d are allowed", len(der), maxRequestSize)
	}
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return certificateRequest{}, errors.New("not a PKCS #10 certificate request in DER")
	}
	// Before the signature: the cost of RSA grows with the key.
	if err := checkPublicKey(request.PublicKey); err != nil {
		return certificateRequest{}, err
	}
	if err := request.CheckSignature(); err != nil {
		return certificateRequest{}, errors.New("its signature was not made with its key")
	}
	sum := sha256.Sum256(request.RawSubjectPublicKeyInfo)
	return certificateRequest{publicKey: request.PublicKey, keyHash: sum[:]}, nil
}

func checkPublicKey(key crypto.PublicKey) error {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() || key.Curve == elliptic.P384() {
			return nil
		}
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits >= 2048 && bits <= 8192 {
			return nil
		}
	}
	return errors.New("its key must be ECDSA P-256 or P-384, Ed25519, or RSA with 2048 to 8192 bits")
}
