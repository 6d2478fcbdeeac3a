package identity

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	firstRenewDelay = time.Second
	maxRenewDelay   = time.Minute
)

// Run renews the certificate about halfway through its life, with a new key, until
// ctx ends. What fails is tried again with backoff; in between the old
// certificate is used. A certificate that has expired meanwhile can only be
// replaced by enrolling: Run reads the token file again until it holds a new join
// token.
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
			wait = delay/2 + rand.N(delay/2) // after a failure
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
	expired := i.current.Load().expired()
	if expired == nil {
		return i.renew(ctx)
	}
	token, err := i.readToken()
	if err != nil {
		return fmt.Errorf("%w: %w", expired, err)
	}
	if token.text == i.refused || i.usedBefore(token) {
		return fmt.Errorf("%w, and the join token in %s can't be used again: %s", expired, i.cfg.TokenFile, i.advice())
	}
	return i.enrol(ctx, token)
}

func (i *Identity) renew(ctx context.Context) error {
	key, der, err := newKey()
	if err != nil {
		return err
	}
	request, err := newRequest(key)
	if err != nil {
		return err
	}
	var answer *resealv1.RenewResponse
	err = i.askReplicas(func(address string) error {
		answer, err = i.renewAt(ctx, address, request)
		return err
	})
	if err != nil {
		return err
	}
	next := i.stored
	next.CAPEM, next.CertificatePEM, next.PrivateKey, next.PendingKey = answer.GetCaPem(), answer.GetCertificatePem(), der, nil
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

func (i *Identity) renewAt(ctx context.Context, address string, request []byte) (*resealv1.RenewResponse, error) {
	client, done, err := i.connect(address, i.ClientTLS())
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := client.Renew(ctx, &resealv1.RenewRequest{CertificateRequest: request})
	if err == nil && answer == nil {
		err = errors.New("the control plane gave no answer")
	}
	return answer, err
}
