package identity

import (
	"crypto/ecdsa"
	"crypto/x509"
)

// Credentials are the current certificate, its key and the fleet's authority,
// for what edges seal to and sign for each other. They belong together and must
// not be changed; ask again after a renewal. ok is false before there is a
// certificate, and for a key that is not ECDSA.
func (i *Identity) Credentials() (certificate *x509.Certificate, key *ecdsa.PrivateKey, roots *x509.CertPool, ok bool) {
	h := i.current.Load()
	if h == nil {
		return nil, nil, nil, false
	}
	key, ok = h.certificate.PrivateKey.(*ecdsa.PrivateKey)
	return h.certificate.Leaf, key, h.roots, ok
}
