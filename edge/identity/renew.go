package identity

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	mathrand "math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	firstRenewDelay = time.Second
	maxRenewDelay   = time.Minute
)

// Run renews the certificate about halfway through its life, with a new key, until
// ctx ends. What fails is tried again with backoff; in between the old
// certificate is used. One that has expired meanwhile is replaced by proof of its key,
// for as long as the control plane allows (its --expired-grace), or by enrolling: Run
// reads the token file again and again, and a new join token in it comes first.
//
// Errors: ErrNotEnrolled when neither Ensure nor Load found a certificate.
func (i *Identity) Run(ctx context.Context) error {
	if i.current.Load() == nil {
		return ErrNotEnrolled
	}
	delay := firstRenewDelay
	for {
		wait := max(time.Until(i.due()), firstRenewDelay)
		if delay > firstRenewDelay {
			wait = delay/2 + mathrand.N(delay/2) // after a failure
		}
		if err := sleep(ctx, wait); err != nil {
			return nil
		}
		err := i.tend(ctx)
		if err == nil {
			delay = firstRenewDelay
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		delay = min(2*delay, maxRenewDelay)
		i.cfg.Logger.Error("the edge's certificate can't be renewed yet", "edge", i.cfg.ID, "not_after", i.NotAfter(), "error", err, "next_attempt_within", delay)
	}
}

// due is when the next thing is to be done.
func (i *Identity) due() time.Time {
	h := i.current.Load()
	if notAfter := h.certificate.Leaf.NotAfter; h.renewAt.After(notAfter) {
		return notAfter
	}
	return h.renewAt
}

// tend does what is due: it renews, enrols again or writes what could not be
// written.
func (i *Identity) tend(ctx context.Context) error {
	if err := i.acquire(ctx); err != nil {
		return err
	}
	defer i.release()
	if i.unsaved {
		return i.save(i.stored)
	}
	if i.current.Load().expired() == nil {
		return i.renew(ctx, i.renewAt)
	}
	token, tokenErr := i.readToken()
	if tokenErr == nil && token.text != i.refused && !i.usedBefore(token) {
		return i.enrol(ctx, token)
	}
	return i.renew(ctx, i.comeBackAt)
}

// renewal asks one replica for the next certificate.
type renewal func(ctx context.Context, address string, request []byte) (certificatePEM, caPEM string, err error)

func (i *Identity) renew(ctx context.Context, ask renewal) error {
	key, der, err := newKey()
	if err != nil {
		return err
	}
	request, err := newRequest(key)
	if err != nil {
		return err
	}
	next := i.stored
	next.PrivateKey, next.PendingKey = der, nil
	err = i.askReplicas(func(address string) error {
		next.CertificatePEM, next.CAPEM, err = ask(ctx, address, request)
		return err
	})
	if err != nil {
		return err
	}
	h, err := next.held()
	if err != nil {
		return fmt.Errorf("the control plane's answer: %w", err)
	}
	if err := h.expired(); err != nil {
		return fmt.Errorf("the control plane's answer, by this machine's clock: %w", err)
	}
	i.current.Store(h)
	i.cfg.Logger.Info("certificate renewed", "edge", i.cfg.ID, "not_after", h.certificate.Leaf.NotAfter)
	if err := i.save(next); err != nil {
		// It is used all the same; a full disk must not cost the connection.
		i.stored, i.unsaved = next, true
		return err
	}
	return nil
}

// renewAt renews with the certificate that is still valid.
func (i *Identity) renewAt(ctx context.Context, address string, request []byte) (certificatePEM, caPEM string, err error) {
	client, done, err := i.connect(address, i.ClientTLS())
	if err != nil {
		return "", "", err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := client.Renew(ctx, &resealv1.RenewRequest{CertificateRequest: request})
	if err != nil {
		return "", "", err
	}
	return answer.GetCertificatePem(), answer.GetCaPem(), nil
}

// comeBackAt renews by proof of the key of the certificate that has expired, which no
// TLS handshake can show any more.
func (i *Identity) comeBackAt(ctx context.Context, address string, request []byte) (certificatePEM, caPEM string, err error) {
	last := i.current.Load().certificate
	digest := sha256.Sum256(resealv1.ComeBackProof(request))
	signature, err := last.PrivateKey.(crypto.Signer).Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return "", "", err
	}
	config := i.ClientTLS()
	config.GetClientCertificate = nil
	client, done, err := i.connect(address, config)
	if err != nil {
		return "", "", err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := client.Enroll(ctx, &resealv1.EnrollRequest{
		Id: i.cfg.ID, CertificateRequest: request,
		Expired: &resealv1.ExpiredCertificate{Certificate: last.Leaf.Raw, Signature: signature},
	})
	switch status.Code(err) {
	case codes.OK:
		i.cfg.Logger.Info("came back with an expired certificate", "edge", i.cfg.ID, "expired", last.Leaf.NotAfter)
		return answer.GetCertificatePem(), answer.GetCaPem(), nil
	case codes.PermissionDenied, codes.Unauthenticated:
		return "", "", fmt.Errorf("%w on %s, and the control plane does not take it any more: %s; %s",
			ErrExpired, last.Leaf.NotAfter.Format(time.RFC3339), status.Convert(err).Message(), i.advice())
	}
	return "", "", err
}
