package trust

import (
	"context"
	"crypto/x509"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// errProof does not say what is wrong: only who holds the certificate's key hears more.
var errProof = status.Error(codes.PermissionDenied, "the expired certificate was refused: it is of no edge that is enrolled here, or the proof of its key is wrong")

// comeBack gives an edge a certificate in place of one that has expired, whose key it
// proves to hold. What costs little comes first: only for who names an edge's enrolment
// are signatures verified.
func (t *Trust) comeBack(ctx context.Context, authority *authority, req *resealv1.EnrollRequest) (*resealv1.EnrollResponse, error) {
	if t.expiredGrace <= 0 {
		return nil, status.Error(codes.PermissionDenied, "this control plane takes no expired certificates (--expired-grace)")
	}
	who, err := t.expired(req.GetExpired().GetCertificate())
	if err != nil || who.identity.Name != req.GetId() {
		return nil, errProof
	}
	switch record, known := t.registry.edge(req.GetId()); {
	case known && record.Enrolment != who.certificate.Subject.SerialNumber:
		return nil, errProof
	case !known && !t.guesses.allow(sourceOf(ctx)):
		return nil, errTooMany
	}
	end, err := t.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if !proven(who.certificate, authority, req) {
		return nil, errProof
	}
	if err := t.refused(who); err != nil {
		return nil, err
	}
	expired := who.certificate.NotAfter
	if over := expired.Add(t.expiredGrace); time.Now().After(over) {
		return nil, status.Errorf(codes.PermissionDenied, "the certificate of %s expired on %s and could be replaced until %s (--expired-grace)",
			who.identity, expired.Format(time.RFC3339), over.Format(time.RFC3339))
	}
	request, err := parseRequest(req.GetCertificateRequest())
	if err != nil {
		return nil, invalid("certificate_request", err)
	}
	certificate, err := t.renewEdge(ctx, authority, who, request)
	if err != nil {
		return nil, err
	}
	t.logger.Info("edge came back with an expired certificate", "edge", req.GetId(), "expired", expired, "not_after", certificate.NotAfter)
	return t.enrolled(authority, certificate), nil
}

// expired reads a certificate of an edge. Nothing of it is verified.
func (t *Trust) expired(der []byte) (caller, error) {
	if len(der) > maxRequestSize {
		return caller{}, errors.New("it is too large")
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return caller{}, err
	}
	identity, err := t.identity(certificate)
	if err == nil && identity.Role != resealv1.Role_ROLE_EDGE {
		err = errors.New("it is not an edge's")
	}
	return caller{identity: identity, certificate: certificate}, err
}

var proofAlgorithms = map[x509.PublicKeyAlgorithm]x509.SignatureAlgorithm{
	x509.ECDSA:   x509.ECDSAWithSHA256,
	x509.Ed25519: x509.PureEd25519,
	x509.RSA:     x509.SHA256WithRSA,
}

// proven reports whether a certificate was issued here, and the request made by who
// holds its key.
func proven(certificate *x509.Certificate, authority *authority, req *resealv1.EnrollRequest) bool {
	roots := x509.NewCertPool()
	roots.AddCert(authority.certificate)
	_, err := certificate.Verify(x509.VerifyOptions{
		Roots:       roots,
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		CurrentTime: certificate.NotAfter, // it may have expired since
	})
	if err != nil {
		return false
	}
	signed := resealv1.ComeBackProof(req.GetCertificateRequest())
	return certificate.CheckSignature(proofAlgorithms[certificate.PublicKeyAlgorithm], signed, req.GetExpired().GetSignature()) == nil
}
