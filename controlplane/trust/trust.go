// Package trust is the control plane's certificate authority: it keeps the
// authority's key sealed in etcd, enrols edges, issues certificates and decides
// who may call which method.
//
// Callers are known by the one URI in their certificate:
//
//	spiffe://<trust domain>/controlplane, what every replica shows as a server
//	spiffe://<trust domain>/replica/<name>, what it shows to other replicas
//	spiffe://<trust domain>/edge/<id>
//	spiffe://<trust domain>/viewer/<name>, /operator/<name>, /admin/<name>
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
	"log/slog"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	defaultPrefix      = "/reseal/v1/"
	defaultTrustDomain = "reseal"
	defaultEdgeCertTTL = 24 * time.Hour
	serverCertTTL      = 24 * time.Hour

	// Enrolments that are worked on at the same time.
	maxEnrolling = 16
)

// Config is what a Trust needs. It is read once, by New.
type Config struct {
	// Client reaches the store. Required.
	Client *clientv3.Client
	// Prefix is put before every key; those of this package start with
	// Prefix+"trust/". Default "/reseal/v1/".
	Prefix string
	// TrustDomain is the authority of all identities. It can't change once the
	// certificate authority has been made. Lower-case letters, digits, "-", "_" and
	// ".". Default "reseal".
	TrustDomain string
	// KEKFile holds the key-encryption key: 32 random bytes, raw or in base64.
	// It is generated, with mode 0600, when it does not exist and nothing has been
	// sealed yet. All replicas need the same one. Whoever has it and the store's
	// content has every secret. Required.
	KEKFile string
	// EdgeCertTTL is how long an edge's certificate is valid. Default 24h.
	EdgeCertTTL time.Duration
	// ExpiredGrace is for how long after an edge's certificate has expired the edge may
	// come back with it, by proof of its key. Default 0: not at all.
	ExpiredGrace time.Duration
	// Revoked is told of each edge and user that was revoked, by whichever replica,
	// unless it is enrolled again already. It must not block. Default: nobody is.
	Revoked func(Identity)
	// HeldKeys says which ticket keys an edge with these labels holds, for those who
	// revoke it. Default: that is not known.
	HeldKeys func(ctx context.Context, edge string, labels map[string]string) []*resealv1.HeldKeys
	// Refused is told of each call that was refused: who called, "unknown" when the
	// certificate says nothing that counts, and the full name of the method. It must
	// not block. Default: nobody is.
	Refused func(ctx context.Context, user, method string, err error)
	// Logger gets who created, revoked and used join tokens. Default: nowhere.
	Logger *slog.Logger
}

// Trust is the authority as one replica holds it. Its methods may be called
// concurrently; those other than Open need Open first.
type Trust struct {
	resealv1.UnimplementedEnrollmentServiceServer

	client       *clientv3.Client
	prefix       string
	trustDomain  string
	kekFile      string
	edgeCertTTL  time.Duration
	expiredGrace time.Duration
	logger       *slog.Logger

	methods   map[string][]resealv1.Role // by full method name
	guesses   *guesses
	registry  *registry
	enrolling chan struct{} // a slot for each enrolment under way
	revoked   func(Identity)
	turned    func(ctx context.Context, user, method string, err error) // away; nil: nobody is told
	heldKeys  func(ctx context.Context, edge string, labels map[string]string) []*resealv1.HeldKeys
	live      live

	ready    chan struct{} // closed when the registry was loaded first
	followed sync.Once

	opened atomic.Pointer[opened] // nil before Open
	server atomic.Pointer[tls.Certificate]
}

// opened is what Open found or made. Immutable.
type opened struct {
	envelope  *envelope
	authority *authority
	created   bool
}

// New makes a Trust that does nothing before Open.
func New(cfg Config) *Trust {
	t := &Trust{
		client:       cfg.Client,
		prefix:       cfg.Prefix,
		trustDomain:  cfg.TrustDomain,
		kekFile:      cfg.KEKFile,
		edgeCertTTL:  cfg.EdgeCertTTL,
		expiredGrace: cfg.ExpiredGrace,
		logger:       cfg.Logger,
		methods:      allowedRoles(),
		guesses:      newGuesses(),
		registry:     newRegistry(),
		enrolling:    make(chan struct{}, maxEnrolling),
		revoked:      cfg.Revoked,
		turned:       cfg.Refused,
		heldKeys:     cfg.HeldKeys,
		ready:        make(chan struct{}),
	}
	if t.prefix == "" {
		t.prefix = defaultPrefix
	}
	if t.trustDomain == "" {
		t.trustDomain = defaultTrustDomain
	}
	if t.edgeCertTTL <= 0 {
		t.edgeCertTTL = defaultEdgeCertTTL
	}
	if t.logger == nil {
		t.logger = slog.New(slog.DiscardHandler)
	}
	return t
}

// Created tells whether Open made the certificate authority: true for the first
// start of the first replica.
func (t *Trust) Created() bool {
	opened := t.opened.Load()
	return opened != nil && opened.created
}

// CAPEM is the authority's certificate, nil before Open.
func (t *Trust) CAPEM() []byte {
	if opened := t.opened.Load(); opened != nil {
		return opened.authority.pem()
	}
	return nil
}

// CAHash is the SHA-256 of the authority's certificate in DER, as 64 hex digits:
// what join tokens pin. It is "" before Open. From the PEM file:
//
//	openssl x509 -in ca.pem -outform der | sha256sum
func (t *Trust) CAHash() string {
	if opened := t.opened.Load(); opened != nil {
		return opened.authority.hash()
	}
	return ""
}

// Ready is closed when this replica knows which identities were revoked: before
// that it must not serve.
func (t *Trust) Ready() <-chan struct{} { return t.ready }

// Run renews the server's certificate halfway through its life, and follows which
// edges and users are enrolled and revoked, until ctx ends. Errors: ErrNotOpen.
func (t *Trust) Run(ctx context.Context) error {
	if t.opened.Load() == nil {
		return ErrNotOpen
	}
	ctx, cancel := context.WithCancel(ctx)
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	following.Go(func() { t.follow(ctx) })
	following.Go(func() { t.sweep(ctx) })
	return t.renew(ctx)
}

// renew keeps the server's certificate fresh until ctx ends.
func (t *Trust) renew(ctx context.Context) error {
	for {
		timer := time.NewTimer(time.Until(renewAt(t.server.Load().Leaf)))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		if err := t.renewServer(); err != nil {
			return err
		}
		t.logger.Debug("renewed the server certificate", "not_after", t.server.Load().Leaf.NotAfter)
	}
}

func renewAt(certificate *x509.Certificate) time.Time {
	return certificate.NotBefore.Add(certificate.NotAfter.Sub(certificate.NotBefore) / 2)
}

// renewServer issues the certificate of this replica, with a new key that stays
// in memory.
func (t *Trust) renewServer() error {
	authority := t.opened.Load().authority
	if err := authority.check(t.trustDomain); err != nil {
		return fmt.Errorf("certificate authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("server certificate: %w", err)
	}
	certificate, err := authority.issue(leaf{
		uri:       t.uri("controlplane"),
		publicKey: key.Public(),
		ttl:       serverCertTTL,
		usages:    []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return fmt.Errorf("server certificate: %w", err)
	}
	t.server.Store(&tls.Certificate{
		// With the authority's certificate, which enrolling edges compare with
		// their pin.
		Certificate: [][]byte{certificate.Raw, authority.certificate.Raw},
		PrivateKey:  key,
		Leaf:        certificate,
	})
	return nil
}

// ServerTLS is the configuration for the gRPC port: TLS 1.3, always with the
// newest server certificate, asking for a client certificate and verifying it
// if there is one. The interceptors decide what callers without one may do.
// Before Open every handshake fails.
func (t *Trust) ServerTLS() *tls.Config {
	roots := x509.NewCertPool() // never nil: that would mean the system's roots
	if opened := t.opened.Load(); opened != nil {
		roots.AddCert(opened.authority.certificate)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		ClientAuth: tls.VerifyClientCertIfGiven,
		ClientCAs:  roots,
		// Connections live for hours; tickets would only add a way to outlive
		// a certificate.
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if certificate := t.server.Load(); certificate != nil {
				return certificate, nil
			}
			return nil, ErrNotOpen
		},
	}
}

// PageTLS is the configuration for an HTTP page beside the gRPC port: callers need
// a certificate of a viewer, an operator or an administrator. Those of edges and
// other control planes are refused.
func (t *Trust) PageTLS() *tls.Config {
	config := t.ServerTLS()
	config.NextProtos = []string{"h2", "http/1.1"}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	config.VerifyConnection = func(state tls.ConnectionState) error {
		who, err := t.identity(state.PeerCertificates[0])
		if err != nil {
			return err
		}
		if allow := []resealv1.Role{resealv1.Role_ROLE_VIEWER}; !admits(allow, who.Role) {
			return fmt.Errorf("%s may not read this page (role needed: %s)", who, describe(allow))
		}
		return t.CheckRevoked(state.PeerCertificates[0])
	}
	return config
}

// CheckRevoked says whether the identity of a certificate of this fleet was revoked:
// nil, or an UNAUTHENTICATED status that says when, by whom and why.
func (t *Trust) CheckRevoked(certificate *x509.Certificate) error {
	who, err := t.identity(certificate)
	if err != nil {
		return err
	}
	return t.refused(caller{identity: who, certificate: certificate})
}

func (t *Trust) uri(path string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: t.trustDomain, Path: "/" + path}
}

// checkTrustDomain follows SPIFFE-ID, 2.1.
func checkTrustDomain(name string) error {
	if name == "" || len(name) > 255 {
		return errors.New("the trust domain must have 1 to 255 bytes")
	}
	for _, r := range name {
		if !('a' <= r && r <= 'z' || '0' <= r && r <= '9' || r == '-' || r == '_' || r == '.') {
			return fmt.Errorf("trust domain %q: only lower-case letters, digits, \"-\", \"_\" and \".\" are allowed", name)
		}
	}
	return nil
}
