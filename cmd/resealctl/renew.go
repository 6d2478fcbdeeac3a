package main

import (
	"context"
	"crypto/tls"
	"errors"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// renewShare: a certificate is renewed when less than this part of its life is
	// left. So it survives two thirds of its life without being used, and a control
	// plane that is away for the rest.
	renewShare = 3
	// renewTimeout bounds what a renewal delays a command.
	renewTimeout = 3 * time.Second
)

// renew gets the user's next certificate, when it is time, and writes it to the file
// that the context is in. Nothing that goes wrong stops the command: the certificate
// that there is still works.
func (a *app) renew(c *client) {
	t := c.target
	if a.noRenewal || !t.fromFile || !t.renewalDue(time.Now()) {
		return
	}
	if err := checkReplaceable(t.path); err != nil {
		a.warnf("Warning: the certificate of %s ends %s and can't be renewed, since the file can't be written: %v\n", t, t.ends(), err)
		return
	}
	request, keyPEM, err := newCertificateRequest()
	if err != nil {
		a.warnRenewal(t, err)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), min(renewTimeout, c.timeout))
	defer cancel()
	response, err := c.enrollment.RenewUser(unexplained(ctx), &resealv1.RenewUserRequest{CertificateRequest: request})
	switch status.Code(err) {
	case codes.OK:
		err = a.saveRenewed(t, response, keyPEM)
	case codes.InvalidArgument, codes.Internal:
	default:
		// Who is not reached, or refuses, is so in the command's own call, which says
		// so; and certificates of earlier versions, of no user, are valid for a year.
		return
	}
	if err != nil {
		a.warnRenewal(t, err)
	}
}

func (a *app) warnRenewal(t *target, err error) {
	a.warnf("Warning: the certificate of %s ends %s and could not be renewed: %v\n", t, t.ends(), err)
}

// renewalDue tells whether little of the certificate's life is left.
func (t *target) renewalDue(now time.Time) bool {
	certs, err := parseCertificates(t.certPEM)
	if err != nil {
		return false
	}
	life, left := certs[0].NotAfter.Sub(certs[0].NotBefore), certs[0].NotAfter.Sub(now)
	return left > 0 && left < life/renewShare
}

// ends says when the certificate ends.
func (t *target) ends() string {
	who, err := t.identity()
	if err != nil {
		return "at a time that can't be read"
	}
	return expiry(who.expires)
}

// checkReplaceable tries whether a file can be replaced.
func checkReplaceable(path string) error {
	switch info, err := os.Stat(path); {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return errors.New("it is not a regular file")
	}
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	temp, err := os.CreateTemp(filepath.Dir(path), ".config-*")
	if err != nil {
		return err
	}
	return errors.Join(temp.Close(), os.Remove(temp.Name()))
}

// saveRenewed puts a new certificate into the context, if it still has the old one:
// another run may have been faster.
func (a *app) saveRenewed(t *target, response *resealv1.RenewUserResponse, keyPEM []byte) error {
	if _, err := tls.X509KeyPair([]byte(response.GetCertificatePem()), keyPEM); err != nil {
		return err
	}
	file, err := a.readContexts(t.path)
	if err != nil {
		return err
	}
	held := file.find(t.name)
	if held == nil || held.CertificatePEM != string(t.certPEM) {
		return nil
	}
	held.CertificatePEM, held.PrivateKeyPEM = response.GetCertificatePem(), string(keyPEM)
	return writeContexts(t.path, file)
}
