package trust

import (
	"context"
	"errors"
	"fmt"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// localName is what the administrator of the first start is called, and its
// context.
const localName = "local"

// adoptLocal enters the administrator of a context file among the users, if it is
// not there yet: it was made by a version that kept none, or while the store took no
// writes. One that takes none now is no reason not to start. It returns false when
// the administrator was revoked.
func (t *Trust) adoptLocal(ctx context.Context, c clientContext) (bool, error) {
	certificate, err := c.certificate()
	if err != nil {
		return false, err
	}
	user, err := t.user(ctx, localName)
	if err != nil {
		return false, err
	}
	enrolment := certificate.Subject.SerialNumber
	if user == nil || user.Enrolment != enrolment {
		of := Identity{Role: resealv1.Role_ROLE_ADMIN, Name: localName}
		if found, err := t.client.Get(ctx, t.prefix+revokedKey(of)); err != nil || len(found.Kvs) > 0 {
			return false, err
		}
	}
	if user != nil {
		return true, nil
	}
	made := storedUser{name: localName, userRecord: userRecord{
		Role: resealv1.Role_ROLE_ADMIN, Enrolment: enrolment, TTL: defaultOperatorTTL,
		CreatedAt: certificate.NotBefore.UTC(), CreatedBy: "controlplane", ExpiresAt: certificate.NotAfter,
	}}
	if err := t.putUser(ctx, made); err != nil && !errors.Is(err, errTaken) {
		t.warnNotEntered(err)
	}
	return true, nil
}

// needsLocal tells whether the administrator of the first start may be made: not
// after it was revoked, unless there is no other any more. Whoever has the data
// directory could make one anyway.
func (t *Trust) needsLocal(ctx context.Context) (bool, error) {
	user, err := t.user(ctx, localName)
	if err != nil || user != nil {
		return user != nil, err
	}
	other, err := t.administrator(ctx, localName)
	if err == nil && other != nil {
		t.logger.Info("no admin context is written: its administrator was revoked, and there are others", "for_example", other.name)
	}
	return other == nil, err
}

// makeLocal makes a certificate for the administrator of the first start. All of
// its certificates are of one enrolment, so that they can be taken back together.
func (t *Trust) makeLocal(ctx context.Context) (certPEM, keyPEM []byte, err error) {
	for range writeAttempts {
		user, err := t.user(ctx, localName)
		if err != nil {
			return nil, nil, err
		}
		if user == nil {
			user = &storedUser{name: localName, userRecord: userRecord{
				Role: resealv1.Role_ROLE_ADMIN, Enrolment: newCredential().id, TTL: defaultOperatorTTL,
				CreatedAt: time.Now().UTC(), CreatedBy: "controlplane",
			}}
		}
		certificate, keyPEM, err := t.makeUser(*user)
		if err != nil {
			return nil, nil, err
		}
		user.ExpiresAt = certificate.NotAfter
		err = t.putUser(ctx, *user)
		if errors.Is(err, errTaken) {
			continue // another replica or a renewal came first
		}
		if err != nil {
			t.warnNotEntered(err)
		}
		return certificatePEM(certificate.Raw), keyPEM, nil
	}
	return nil, nil, fmt.Errorf("user %q is being changed by others", localName)
}

func (t *Trust) warnNotEntered(err error) {
	t.logger.Warn("the administrator of the first start could not be entered among the users; that is tried again at the next start", "error", err)
}
