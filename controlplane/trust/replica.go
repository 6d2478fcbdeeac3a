package trust

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// replicaCertTTL is how long a certificate is valid that a replica shows to
// others. The one before is used for half of that.
const replicaCertTTL = 24 * time.Hour

// ReplicaTLS is the configuration with which the replica of that name calls
// others: TLS 1.3, with a certificate for spiffe://<trust domain>/replica/<name>,
// made anew in time, whose key stays in memory. The callee must be a control plane
// of this fleet: addresses and DNS names prove nothing. Errors: ErrNotOpen, a name
// that can't stand in an identity.
func (t *Trust) ReplicaTLS(name string) (*tls.Config, error) {
	opened := t.opened.Load()
	if opened == nil {
		return nil, ErrNotOpen
	}
	if err := checkName(name); err != nil {
		return nil, fmt.Errorf("name of the replica: %w", err)
	}
	shown := &replicaCertificate{trust: t, authority: opened.authority, name: name}
	if _, err := shown.get(nil); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(opened.authority.certificate)
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		GetClientCertificate:   shown.get,
		// VerifyConnection does it all, by URI instead of by name.
		InsecureSkipVerify: true,
		VerifyConnection:   func(state tls.ConnectionState) error { return t.verifyControlPlane(state.PeerCertificates, roots) },
	}, nil
}

// verifyControlPlane checks the certificate that a callee shows.
func (t *Trust) verifyControlPlane(chain []*x509.Certificate, roots *x509.CertPool) error {
	if len(chain) == 0 {
		return errors.New("it showed no certificate")
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return err
	}
	if want := t.uri("controlplane").String(); len(chain[0].URIs) != 1 || chain[0].URIs[0].String() != want {
		return fmt.Errorf("its certificate is for %v, not for %s", chain[0].URIs, want)
	}
	return nil
}

// replicaCertificate is what a replica shows to others.
type replicaCertificate struct {
	trust     *Trust
	authority *authority
	name      string

	mu      sync.Mutex
	current *tls.Certificate
}

// get returns the certificate, a new one when half of its life is over.
func (r *replicaCertificate) get(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current != nil && time.Now().Before(renewAt(r.current.Leaf)) {
		return r.current, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("certificate of the replica: %w", err)
	}
	certificate, err := r.authority.issue(leaf{
		uri:       r.trust.uri("replica/" + r.name),
		publicKey: key.Public(),
		ttl:       replicaCertTTL,
		usages:    []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return nil, fmt.Errorf("certificate of the replica: %w", err)
	}
	r.current = &tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key, Leaf: certificate}
	return r.current, nil
}

// FromReplica tells whether the call that ctx belongs to was made by another
// replica.
func FromReplica(ctx context.Context) bool {
	who, err := Caller(ctx)
	return err == nil && who.Role == resealv1.Role_ROLE_REPLICA
}

// Enrolled tells whether there is an edge with that id, connected or not. Errors:
// the store does not answer, and this replica does not know the edge.
func (t *Trust) Enrolled(ctx context.Context, id string) (bool, error) {
	if _, known := t.registry.edge(id); known {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	record, err := t.edge(ctx, id)
	return record != nil, err
}
