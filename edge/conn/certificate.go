package conn

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/reseal/reseal/proto/rules"
)

// verifyError marks what the pool's own verification refused.
type verifyError struct{ error }

func (e verifyError) Unwrap() error { return e.error }

// Refused reports whether a handshake failed because the peer's certificate was
// refused.
func Refused(err error) bool {
	var verification *tls.CertificateVerificationError
	var hostname x509.HostnameError
	var own verifyError
	return errors.As(err, &verification) || errors.As(err, &hostname) || errors.As(err, &own)
}

// certificateError is a certificate that was refused. Its text says which one and
// why, and what to look at.
type certificateError struct {
	text string
	err  error
}

func (e *certificateError) Error() string { return e.text }
func (e *certificateError) Unwrap() error { return e.err }

// Explained names the certificate that an error of verification is about. What
// the peer wrote into it is quoted and cut.
func Explained(err error) error {
	certificate, cause, hint := refusedCertificate(err)
	if certificate == nil {
		return err
	}
	text := fmt.Sprintf("%s; the certificate: subject %s, issuer %s, %s", cause,
		quoted(certificate.Subject.String()), quoted(certificate.Issuer.String()), namesOf(certificate))
	if hint != "" {
		text += "; " + hint
	}
	return &certificateError{text, err}
}

// refusedCertificate is the certificate that was refused, why, and what can be
// done about it.
func refusedCertificate(err error) (certificate *x509.Certificate, cause, hint string) {
	var verification *tls.CertificateVerificationError
	if errors.As(err, &verification) && len(verification.UnverifiedCertificates) > 0 {
		certificate, cause = verification.UnverifiedCertificates[0], verification.Err.Error()
	}
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &name):
		hint = "set tls.serverName to one of its names, or tls.subjectAltNames to those to accept"
		if name.Certificate.Subject.CommonName != "" && namesOf(name.Certificate) == noNames {
			hint = "it has only the common name of its subject, which counts with tls.subjectCommonName: true"
		}
		return name.Certificate, "it is not for " + quoted(name.Host), hint
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		hint = "the backend needs another certificate"
		if time.Now().Before(invalid.Cert.NotBefore) {
			hint = "look at the clocks of the edge and of whoever issued it"
		}
		return invalid.Cert, fmt.Sprintf("it is valid from %s to %s only",
			invalid.Cert.NotBefore.UTC().Format(time.RFC3339), invalid.Cert.NotAfter.UTC().Format(time.RFC3339)), hint
	case errors.As(err, &invalid):
		return invalid.Cert, invalid.Error(), ""
	case errors.As(err, &unknown):
		return unknown.Cert, unknown.Error(), "tls.trust must hold the root above it, and the backend must send what stands between"
	}
	return certificate, cause, ""
}

// maxNames bounds the names of a certificate that an error repeats.
const maxNames = 5

const noNames = "without alternative names"

// namesOf says which names a certificate has.
func namesOf(certificate *x509.Certificate) string {
	names := make([]string, 0, maxNames)
	count := 0
	add := func(name string) {
		if count++; count <= maxNames {
			names = append(names, quoted(name))
		}
	}
	for _, name := range certificate.DNSNames {
		add(name)
	}
	for _, ip := range certificate.IPAddresses {
		add(ip.String())
	}
	for _, uri := range certificate.URIs {
		add(uri.String())
	}
	switch {
	case count == 0:
		return noNames
	case count > maxNames:
		return fmt.Sprintf("for %s and %d more", strings.Join(names, ", "), count-maxNames)
	}
	return "for " + strings.Join(names, ", ")
}

func quoted(s string) string { return strconv.Quote(rules.Shorten(s)) }

// alertNoRenegotiation is what crypto/tls answers when it may not renegotiate
// (RFC 5246 section 7.2.2).
const alertNoRenegotiation tls.AlertError = 100

// Refused requests to renegotiate.
var (
	ErrRenegotiation     = errors.New("the backend asked to renegotiate, which tls.renegotiation: once allows, for HTTP/1.1 and TLS 1.2")
	ErrRenegotiatedAgain = errors.New("the backend asked to renegotiate once more on a connection; tls.renegotiation: once allows it once")
)

// renegotiationError puts words in the place of the error that a read ended with
// because the peer asked to renegotiate. once is whether it may, once.
func renegotiationError(err error, once bool) error {
	var local *net.OpError
	switch {
	case !errors.As(err, &local) || local.Op != "local error" || local.Err == nil || local.Err.Error() != alertNoRenegotiation.Error():
		return err
	case once:
		return fmt.Errorf("%w: %w", ErrRenegotiatedAgain, err)
	}
	return fmt.Errorf("%w: %w", ErrRenegotiation, err)
}
