package identity

import (
	"crypto/x509"
	"testing"
)

func TestCredentials(t *testing.T) {
	i := New(Config{ID: "e1"})
	if _, _, _, ok := i.Credentials(); ok {
		t.Error("there are credentials before enrolment")
	}
	key, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	h := &held{roots: x509.NewCertPool()}
	h.certificate.Leaf, h.certificate.PrivateKey = &x509.Certificate{}, key
	i.current.Store(h)
	certificate, got, roots, ok := i.Credentials()
	if !ok || got != key || roots != h.roots || certificate != h.certificate.Leaf {
		t.Error("not the current ones")
	}
}
