package trust

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Identity is who calls.
type Identity struct {
	// Role is what the certificate says: ROLE_EDGE, ROLE_VIEWER, ROLE_OPERATOR,
	// ROLE_ADMIN or ROLE_REPLICA; ROLE_ANONYMOUS without one; ROLE_UNSPECIFIED for
	// one that a control plane shows as a server.
	Role resealv1.Role
	// Name is the edge's id, the operator's name or the replica's.
	Name string
}

// String is "<role>/<name>", for example "edge/e1", as logs and the history name
// callers.
func (i Identity) String() string {
	switch {
	case i.Role == resealv1.Role_ROLE_UNSPECIFIED:
		return "controlplane"
	case i.Name == "":
		return resealv1.Label(i.Role)
	}
	return resealv1.Label(i.Role) + "/" + i.Name
}

// caller is an identity with the certificate that proved it.
type caller struct {
	identity    Identity
	certificate *x509.Certificate // nil for ROLE_ANONYMOUS
}

type callerKey struct{}

// Caller is who makes the call that ctx belongs to. The error, an UNAUTHENTICATED
// status, means that the call did not pass the interceptors of this package.
func Caller(ctx context.Context) (Identity, error) {
	c, err := callerOf(ctx)
	return c.identity, err
}

func callerOf(ctx context.Context) (caller, error) {
	c, ok := ctx.Value(callerKey{}).(caller)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "the caller is not known")
	}
	return c, nil
}

// identify finds the caller in the TLS connection of ctx.
func (t *Trust) identify(ctx context.Context) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, errors.New("the connection is not known")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return caller{}, errors.New("the connection has no TLS")
	}
	if len(info.State.PeerCertificates) == 0 {
		return caller{identity: Identity{Role: resealv1.Role_ROLE_ANONYMOUS}}, nil
	}
	if len(info.State.VerifiedChains) == 0 {
		return caller{}, errors.New("the client certificate was not verified")
	}
	certificate := info.State.PeerCertificates[0]
	identity, err := t.identity(certificate)
	if err != nil {
		return caller{}, err
	}
	return caller{identity: identity, certificate: certificate}, nil
}

// identity reads a certificate whose chain was verified.
func (t *Trust) identity(certificate *x509.Certificate) (Identity, error) {
	names := len(certificate.DNSNames) + len(certificate.IPAddresses) + len(certificate.EmailAddresses)
	if len(certificate.URIs) != 1 || names != 0 {
		return Identity{}, fmt.Errorf("the client certificate must name exactly one URI and nothing else, it names %d and %d others",
			len(certificate.URIs), names)
	}
	if certificate.IsCA || !slices.Contains(certificate.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return Identity{}, errors.New("the client certificate is not for client authentication")
	}
	uri := certificate.URIs[0].String()
	path, ok := strings.CutPrefix(uri, "spiffe://"+t.trustDomain+"/")
	if !ok {
		return Identity{}, fmt.Errorf("the client certificate is for %q, not of the trust domain %q", uri, t.trustDomain)
	}
	if path == "controlplane" {
		return Identity{Name: path}, nil
	}
	kind, name, _ := strings.Cut(path, "/")
	role, ok := rolePaths[kind]
	if !ok || checkName(name) != nil {
		return Identity{}, fmt.Errorf("the client certificate is for %q, which is neither an edge nor a role", uri)
	}
	return Identity{Role: role, Name: name}, nil
}

// rolePaths is what follows the trust domain in an identity.
var rolePaths = map[string]resealv1.Role{
	"edge":     resealv1.Role_ROLE_EDGE,
	"viewer":   resealv1.Role_ROLE_VIEWER,
	"operator": resealv1.Role_ROLE_OPERATOR,
	"admin":    resealv1.Role_ROLE_ADMIN,
	"replica":  resealv1.Role_ROLE_REPLICA,
}

// checkName admits edge ids and names of operators and replicas: what SPIFFE-ID, 2.2, allows in a
// path segment, at most 63 bytes.
func checkName(name string) error {
	if name == "" || len(name) > 63 || name == "." || name == ".." {
		return fmt.Errorf("%q must have 1 to 63 bytes and not be \".\" or \"..\"", name)
	}
	for _, r := range name {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '.', r == '_', r == '-':
		default:
			return fmt.Errorf("%q holds %q: only letters, digits, \".\", \"_\" and \"-\" are allowed", name, r)
		}
	}
	return nil
}
