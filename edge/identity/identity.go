// Package identity is who an edge is: it enrols with a join token, keeps the key
// and the certificate in the state directory and renews the certificate.
//
// The private key is made here and never leaves: the control plane sees
// certificate requests only.
package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"
)

// stateName is the file in the state directory.
const stateName = "identity"

var (
	// ErrNotEnrolled is the error of Load when the state directory holds no
	// certificate yet.
	ErrNotEnrolled = errors.New("the edge is not enrolled")
	// ErrExpired is the error of Load and Ensure when the certificate can't be
	// used any more. Run replaces it while the control plane allows it; then the edge
	// needs a new join token.
	ErrExpired = errors.New("the edge's certificate expired")
	// ErrNoToken is the error of Ensure when the edge must enrol but has no join
	// token.
	ErrNoToken = errors.New("no join token")
	// ErrToken is the error for a join token, or a --ca-hash, that can't be read.
	ErrToken = errors.New("malformed join token")
	// ErrRefused is the error of Ensure when the control plane does not take the
	// join token.
	ErrRefused = errors.New("the join token was refused")
	// ErrPin is the error of Ensure when what answers is not the control plane
	// that the join token or --ca-hash names.
	ErrPin = errors.New("not the control plane that the join token names")
	// ErrMismatch is the error when the stored identity is not the configured
	// one.
	ErrMismatch = errors.New("the state directory belongs to another edge")
	// ErrRecord is the error for an identity, stored or given by the control
	// plane, that can't be used.
	ErrRecord = errors.New("unusable identity")
)

// State keeps sealed files. Read's error for an absent file is fs.ErrNotExist.
// When Write returns nil the content is durable, and a failed Write leaves the
// old one.
type State interface {
	Read(name string) ([]byte, error)
	Write(name string, data []byte) error
}

// Config is what an Identity needs. It is read once, by New.
type Config struct {
	// ID is the edge's id: letters, digits, ".", "_" and "-", at most 63 bytes.
	// Required. It can't change while the state directory stays.
	ID string
	// TokenFile holds the join token. It is read whenever the edge may have to enrol:
	// at the first start and when the certificate has expired. Default: none.
	TokenFile string
	// CAHash is the SHA-256 of the authority's certificate, 64 hex digits.
	// Needed only when the token carries none; where both are there they must
	// be equal.
	CAHash string
	// ControlPlane are addresses of replicas, host:port. Required.
	ControlPlane []string
	// TrustDomain is what the control plane's must be. Default: any; the pinned
	// authority says which.
	TrustDomain string
	// State keeps the key and the certificate. Required.
	State State
	// Logger is for the operator. Default: nowhere.
	Logger *slog.Logger
}

// Identity is an edge's certificate over time. Its methods may be called
// concurrently.
type Identity struct {
	cfg     Config
	connect connectFunc

	current atomic.Pointer[held]

	// busy is held by whoever loads, enrols or renews, and guards what follows.
	busy    chan struct{}
	stored  record
	unsaved bool   // stored is newer than the state directory's
	refused string // the token that the control plane did not take
}

// New makes an Identity that does nothing before Ensure or Load.
func New(cfg Config) *Identity {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Identity{cfg: cfg, connect: connect, busy: make(chan struct{}, 1)}
}

func (i *Identity) acquire(ctx context.Context) error {
	select {
	case i.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (i *Identity) release() { <-i.busy }

// Load takes the identity from the state directory, without any network. A
// caller that wants to serve its last good configuration whatever the state of
// its certificate uses it before Ensure: with ErrExpired, Run sees to another
// one as soon as there is a control plane.
//
// Errors: ErrNotEnrolled, ErrExpired, ErrMismatch, ErrRecord, and those of State.
func (i *Identity) Load(ctx context.Context) error {
	if err := i.acquire(ctx); err != nil {
		return err
	}
	defer i.release()
	return i.load()
}

func (i *Identity) load() error {
	if err := i.checkConfig(); err != nil {
		return err
	}
	data, err := i.cfg.State.Read(stateName)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNotEnrolled
	}
	if err != nil {
		return fmt.Errorf("load the edge's identity: %w", err)
	}
	defer clear(data)
	stored, err := parseRecord(data)
	if err != nil {
		return err
	}
	if stored.ID != i.cfg.ID {
		return fmt.Errorf("%w: it holds the identity of edge %q, but --id is %q; use a --state-dir for each edge", ErrMismatch, stored.ID, i.cfg.ID)
	}
	i.stored = stored
	if stored.CertificatePEM == "" {
		return ErrNotEnrolled // only the key of an enrolment that was under way
	}
	h, err := stored.held()
	if err != nil {
		return err
	}
	if i.cfg.TrustDomain != "" && h.trustDomain != i.cfg.TrustDomain {
		return fmt.Errorf("%w: it was enrolled in the trust domain %q, but --trust-domain is %q", ErrMismatch, h.trustDomain, i.cfg.TrustDomain)
	}
	i.current.Store(h)
	return h.expired()
}

// Ensure makes sure that there is a usable certificate: it loads it, or enrols
// with the join token. While no control plane can be reached it tries again,
// with backoff, until ctx ends.
//
// A new join token for another authority than the stored identity's wins: the
// edge moves to that control plane.
//
// Errors: ErrExpired or ErrNoToken when a new join token is needed and there is
// none, ErrToken, ErrRefused, ErrPin, ErrMismatch, ErrRecord, ctx's, and those
// of State.
func (i *Identity) Ensure(ctx context.Context) error {
	if err := i.acquire(ctx); err != nil {
		return err
	}
	defer i.release()
	err := i.load()
	if err != nil && !errors.Is(err, ErrNotEnrolled) && !errors.Is(err, ErrExpired) {
		return err
	}
	token, tokenErr := i.readToken()
	used := tokenErr == nil && i.usedBefore(token)
	switch {
	case err == nil && (tokenErr != nil || used || i.current.Load().hasRoot(token.pin)):
		return nil
	case errors.Is(err, ErrExpired) && errors.Is(tokenErr, ErrNoToken):
		return fmt.Errorf("%w, and there is no join token to enrol again: %s", err, i.advice())
	case tokenErr != nil:
		return tokenErr
	case used:
		return fmt.Errorf("%w, and the join token in %s was used for it: %s", err, i.cfg.TokenFile, i.advice())
	}
	if err == nil {
		i.cfg.Logger.Warn("the join token is for another control plane than the stored identity: enrolling there", "edge", i.cfg.ID)
	}
	return i.enrolUntil(ctx, token)
}

// usedBefore tells whether the current certificate came with token.
func (i *Identity) usedBefore(token joinToken) bool {
	sum := token.hash()
	return bytes.Equal(sum, i.stored.EnrolledWith)
}

// advice is what an operator does to enrol the edge.
func (i *Identity) advice() string {
	return fmt.Sprintf("create one with `resealctl token create --id %s` and give it with --join-token-file", i.cfg.ID)
}

// NotAfter is when the current certificate expires; zero before there is one.
func (i *Identity) NotAfter() time.Time {
	if h := i.current.Load(); h != nil {
		return h.certificate.Leaf.NotAfter
	}
	return time.Time{}
}

// TrustDomain is the fleet's; "" before there is a certificate.
func (i *Identity) TrustDomain() string {
	if h := i.current.Load(); h != nil {
		return h.trustDomain
	}
	return ""
}

// ClientTLS is the configuration for connections to the control plane. Every
// handshake presents the newest certificate and verifies the server's chain
// against the newest roots and its URI, spiffe://<trust domain>/controlplane,
// never the name that was dialled. Sessions are not resumed, so nothing skips
// that. Before there is a certificate handshakes fail with ErrNotEnrolled.
func (i *Identity) ClientTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			h := i.current.Load()
			if h == nil {
				return nil, ErrNotEnrolled
			}
			return &h.certificate, nil
		},
		// VerifyConnection does it all, by URI instead of by name.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			h := i.current.Load()
			if h == nil {
				return ErrNotEnrolled
			}
			return verifyServer(state.PeerCertificates, h.roots, h.trustDomain)
		},
	}
}

// ServerTLS is the configuration for the edge's administration page: it presents
// the edge's certificate and admits viewers, operators and administrators of the
// fleet. It is good for the roots of this moment: make a new one for each handshake
// (tls.Config.GetConfigForClient). Before there is a certificate handshakes
// fail.
func (i *Identity) ServerTLS() *tls.Config {
	roots, trustDomain := x509.NewCertPool(), "" // never nil roots: that would mean the system's
	if h := i.current.Load(); h != nil {
		roots, trustDomain = h.roots, h.trustDomain
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			h := i.current.Load()
			if h == nil {
				return nil, ErrNotEnrolled
			}
			return &h.certificate, nil
		},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              roots,
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			return verifyOperator(state.PeerCertificates[0], trustDomain)
		},
	}
}

func (i *Identity) checkConfig() error {
	if len(i.cfg.ControlPlane) == 0 {
		return errors.New("no address of a control plane is given (--control-plane)")
	}
	if _, err := parsePin(i.cfg.CAHash); err != nil {
		return err
	}
	return checkID(i.cfg.ID)
}

func checkID(id string) error {
	if id == "" || len(id) > 63 || id == "." || id == ".." {
		return fmt.Errorf("--id %q must have 1 to 63 bytes", id)
	}
	for _, r := range id {
		if !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._-", r)) {
			return fmt.Errorf("--id %q: only letters, digits, \".\", \"_\" and \"-\" are allowed", id)
		}
	}
	return nil
}
