package conn

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestCertificateErrors: an error of verification names the certificate and what to
// look at, and what the peer wrote into it is bounded.
func TestCertificateErrors(t *testing.T) {
	leaf := &x509.Certificate{
		Subject: pkix.Name{CommonName: "leaf\n" + strings.Repeat("x", 1000)}, Issuer: pkix.Name{CommonName: "issuer"},
		NotBefore: time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC), NotAfter: time.Date(2021, 1, 2, 3, 4, 5, 0, time.UTC),
	}
	for i := range 90 {
		leaf.DNSNames = append(leaf.DNSNames, fmt.Sprintf("n%d.test", i))
	}
	bare := &x509.Certificate{Subject: pkix.Name{CommonName: "web.test"}}
	young := &x509.Certificate{NotBefore: time.Now().Add(time.Hour), NotAfter: time.Now().Add(2 * time.Hour)}
	for _, test := range []struct {
		cause error
		want  []string
	}{
		{x509.HostnameError{Certificate: leaf, Host: "web.test"}, []string{
			`it is not for "web.test"`, "CN=leaf", "CN=issuer", `"n0.test"`, "and 85 more", "tls.serverName", "tls.subjectAltNames",
		}},
		{x509.HostnameError{Certificate: bare, Host: "web.test"}, []string{"CN=web.test", noNames, "tls.subjectCommonName: true"}},
		{x509.CertificateInvalidError{Cert: leaf, Reason: x509.Expired}, []string{
			"from 2020-01-02T03:04:05Z to 2021-01-02T03:04:05Z", "another certificate",
		}},
		{x509.CertificateInvalidError{Cert: young, Reason: x509.Expired}, []string{"clocks"}},
		{x509.CertificateInvalidError{Cert: leaf, Reason: x509.IncompatibleUsage}, []string{"usage", "CN=leaf"}},
		{x509.UnknownAuthorityError{Cert: leaf}, []string{"unknown authority", "CN=issuer", "tls.trust"}},
		{errors.New("the pool's own reason"), []string{"the pool's own reason", "CN=leaf", "CN=issuer"}},
	} {
		err := Explained(&tls.CertificateVerificationError{UnverifiedCertificates: []*x509.Certificate{leaf}, Err: test.cause})
		text := err.Error()
		for _, want := range test.want {
			if !strings.Contains(text, want) {
				t.Errorf("%q is missing in %q", want, text)
			}
		}
		if len(text) > 700 || strings.Contains(text, "\n") {
			t.Errorf("%d bytes: %q", len(text), text)
		}
		if !Refused(err) || !strings.Contains(fmt.Sprintf("%T", errors.Unwrap(err)), "CertificateVerificationError") {
			t.Errorf("%T of %v", err, test.cause)
		}
	}
	if err := Explained(&tls.CertificateVerificationError{Err: errors.New("no certificate")}); !Refused(err) {
		t.Error(err)
	}
}

func TestRenegotiationErrors(t *testing.T) {
	refused := &net.OpError{Op: "local error", Err: tls.AlertError(100)}
	for once, want := range map[bool]error{false: ErrRenegotiation, true: ErrRenegotiatedAgain} {
		if err := renegotiationError(refused, once); !errors.Is(err, want) || !errors.Is(err, refused) {
			t.Errorf("once %v: %v", once, err)
		}
	}
	for _, other := range []error{
		net.ErrClosed, &net.OpError{Op: "remote error", Err: tls.AlertError(100)}, &net.OpError{Op: "local error", Err: tls.AlertError(10)},
		&net.OpError{Op: "local error"},
	} {
		if err := renegotiationError(other, true); err != other {
			t.Errorf("%v became %v", other, err)
		}
	}
}
