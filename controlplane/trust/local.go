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
// writes. One that takes none now is no reason not to start.
func (t *Trust) adoptLocal(ctx context.Context, c clientContext) error {
	user, err := t.user(ctx, localName)
	if err != nil || user != nil {
		return err
	}
	certificate, err := c.certificate()
	if err != nil {
		return err
	}
	made := storedUser{name: localName, userRecord: userRecord{
		Role: resealv1.Role_ROLE_ADMIN, Enrolment: certificate.Subject.SerialNumber, TTL: defaultOperatorTTL,
		CreatedAt: certificate.NotBefore.UTC(), CreatedBy: "controlplane", ExpiresAt: certificate.NotAfter,
	}}
	if err := t.putUser(ctx, made); err != nil && !errors.Is(err, errTaken) {
		t.warnNotEntered(err)
	}
	return nil
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
