package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// away is an edge whose certificate has expired.
type away struct {
	s           *server
	id          string
	key         *ecdsa.PrivateKey
	certificate []byte
}

// newAway enrols an edge and waits until its certificate has expired.
func newAway(t *testing.T, s *server, id string) *away {
	t.Helper()
	a := &away{s: s, id: id, key: newKey(t)}
	answer, err := s.enrollment(t).Enroll(t.Context(), &resealv1.EnrollRequest{
		Token: createToken(t, s, id).GetToken(), Id: id, CertificateRequest: newRequest(t, a.key),
	})
	if err != nil {
		t.Fatal(err)
	}
	certificate := parsePEM(t, answer.GetCertificatePem())
	a.certificate = certificate.Raw
	time.Sleep(time.Until(certificate.NotAfter.Add(time.Second)))
	return a
}

// request is one to come back, with a new key.
func (a *away) request(t *testing.T) *resealv1.EnrollRequest {
	t.Helper()
	request := newRequest(t, newKey(t))
	return &resealv1.EnrollRequest{Id: a.id, CertificateRequest: request, Expired: &resealv1.ExpiredCertificate{
		Certificate: a.certificate, Signature: prove(t, a.key, request),
	}}
}

func prove(t *testing.T, key *ecdsa.PrivateKey, request []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(resealv1.ComeBackProof(request))
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

// brief is a server whose edges' certificates last for a second.
func brief(t *testing.T, grace time.Duration) *server {
	t.Helper()
	cfg := testConfig(t)
	cfg.EdgeCertTTL, cfg.ExpiredGrace = time.Second, grace
	return serve(t, openTrust(t, cfg), true)
}

// TestComeBack: who holds the key of an expired certificate gets another one, for as
// long as its edge is enrolled with it; nobody else does.
func TestComeBack(t *testing.T) {
	t.Parallel()
	s := brief(t, time.Hour)
	a, other := newAway(t, s, "e1"), newAway(t, s, "e2")
	good := a.request(t)
	answer, err := s.enrollment(t).Enroll(t.Context(), good)
	if err != nil {
		t.Fatal(err)
	}
	certificate := parsePEM(t, answer.GetCertificatePem())
	if certificate.URIs[0].String() != "spiffe://reseal/edge/e1" || certificate.NotAfter.Before(time.Now().Add(-time.Second)) || answer.GetTrustDomain() != "reseal" {
		t.Errorf("got a certificate for %v until %s", certificate.URIs, certificate.NotAfter)
	}
	// An answer that was lost is asked for again.
	if _, err := s.enrollment(t).Enroll(t.Context(), good); err != nil {
		t.Errorf("a second time: %v", err)
	}

	strange := brief(t, time.Hour)
	for name, change := range map[string]func(*resealv1.EnrollRequest){
		"another key's proof":        func(r *resealv1.EnrollRequest) { r.Expired.Signature = prove(t, other.key, r.GetCertificateRequest()) },
		"proof for another request":  func(r *resealv1.EnrollRequest) { r.CertificateRequest = newRequest(t, newKey(t)) },
		"without a proof":            func(r *resealv1.EnrollRequest) { r.Expired.Signature = nil },
		"another edge's certificate": func(r *resealv1.EnrollRequest) { r.Expired.Certificate = other.certificate },
		"as another edge":            func(r *resealv1.EnrollRequest) { r.Id = "e2" },
		"of another fleet":           func(r *resealv1.EnrollRequest) { proto.Reset(r); proto.Merge(r, newAway(t, strange, "e1").request(t)) },
		"without a certificate":      func(r *resealv1.EnrollRequest) { r.Expired.Certificate = nil },
		"with a large certificate":   func(r *resealv1.EnrollRequest) { r.Expired.Certificate = make([]byte, maxRequestSize+1) },
		"with an operator's": func(r *resealv1.EnrollRequest) {
			r.Expired.Certificate = operator(t, s.trust, resealv1.Role_ROLE_ADMIN, "e1").Certificate[0]
		},
		"with a token as well": func(r *resealv1.EnrollRequest) { r.Token = "x" },
		"with a certificate unknown": func(r *resealv1.EnrollRequest) {
			r.Expired.Certificate = edgeCertificate(t, s.trust, "e1", "0").Certificate[0]
		},
		"of an edge that is unknown": func(r *resealv1.EnrollRequest) {
			r.Id, r.Expired.Certificate = "e9", edgeCertificate(t, s.trust, "e9", "0").Certificate[0]
		},
		"with a request that is none": func(r *resealv1.EnrollRequest) { r.CertificateRequest = nil },
	} {
		t.Run(name, func(t *testing.T) {
			request := a.request(t)
			change(request)
			_, err := s.enrollment(t).Enroll(t.Context(), request)
			wantCode(t, err, codes.PermissionDenied)
		})
	}
	bad := a.request(t)
	bad.CertificateRequest = []byte("none")
	bad.Expired.Signature = prove(t, a.key, bad.GetCertificateRequest())
	_, err = s.enrollment(t).Enroll(t.Context(), bad)
	wantCode(t, err, codes.InvalidArgument, "certificate_request")

	newAway(t, s, "e1") // with another token
	_, err = s.enrollment(t).Enroll(t.Context(), a.request(t))
	wantCode(t, err, codes.PermissionDenied)
	if _, err := s.admin(t).RevokeEdge(t.Context(), &resealv1.RevokeEdgeRequest{Id: "e2", Reason: "stolen"}); err != nil {
		t.Fatal(err)
	}
	_, err = s.enrollment(t).Enroll(t.Context(), other.request(t))
	wantCode(t, err, codes.Unauthenticated, "revoked", "stolen")
}

// TestComeBackTooLate: the grace period ends, and there may be none.
func TestComeBackTooLate(t *testing.T) {
	t.Parallel()
	s := brief(t, time.Millisecond)
	_, err := s.enrollment(t).Enroll(t.Context(), newAway(t, s, "e1").request(t))
	wantCode(t, err, codes.PermissionDenied, "edge/e1 expired on", "--expired-grace")
	s = brief(t, 0)
	_, err = s.enrollment(t).Enroll(t.Context(), newAway(t, s, "e1").request(t))
	wantCode(t, err, codes.PermissionDenied, "takes no expired certificates")
}
