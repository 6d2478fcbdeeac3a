package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// target is the control plane of this run, after flags, variables and the file.
type target struct {
	name         string // of the context, "" without one
	path         string // of the file
	controlPlane []string
	trustDomain  string
	caPEM        []byte
	certPEM      []byte
	keyPEM       []byte
	fromFile     bool // certificate and key are the context's
}

// identity is what a client certificate says about its holder.
type identity struct {
	trustDomain string
	role        resealv1.Role
	name        string
	expires     time.Time
}

// String is "role name", as error messages say it.
func (i identity) String() string {
	return resealv1.Label(i.role) + " " + i.name
}

// target finds out where to connect to and as whom.
func (a *app) target() (*target, error) {
	file, path, exists, err := a.loadContexts()
	if err != nil {
		return nil, err
	}
	t := &target{path: path}
	switch chosen, err := a.chooseContext(file, path, exists); {
	case err != nil:
		return nil, err
	case chosen != nil:
		t.name, t.controlPlane, t.trustDomain = chosen.Name, chosen.ControlPlane, chosen.TrustDomain
		t.caPEM, t.certPEM, t.keyPEM = []byte(chosen.CAPEM), []byte(chosen.CertificatePEM), []byte(chosen.PrivateKeyPEM)
	}
	t.fromFile = t.name != "" && a.settings.certificateFile == "" && a.settings.privateKeyFile == ""
	if err := a.overrideTarget(t); err != nil {
		return nil, err
	}
	if t.trustDomain == "" {
		t.trustDomain = "reseal"
	}
	return t, t.check()
}

// chooseContext returns nil when none is needed because flags and variables say
// everything.
func (a *app) chooseContext(file *contextFile, path string, exists bool) (*namedContext, error) {
	s := a.settings
	name := s.context
	if name == "" {
		name = file.CurrentContext
	}
	if name == "" && len(file.Contexts) == 1 {
		name = file.Contexts[0].Name
	}
	if found := file.find(name); found != nil {
		return found, nil
	}
	complete := len(s.controlPlane) > 0 && s.caFile != "" && s.certificateFile != "" && s.privateKeyFile != ""
	switch {
	case complete && s.context == "":
		return nil, nil
	case !exists:
		return nil, fmt.Errorf("%s does not exist: give --config FILE, "+
			"or import the control plane's file with: resealctl config import DATA_DIR/admin.yaml", path)
	case name == "":
		return nil, fmt.Errorf("%s has no current context: give --context NAME, or choose one with: resealctl config use-context NAME", path)
	}
	return nil, fmt.Errorf("%s has no context %q; it has: %s", path, name, orNone(strings.Join(file.names(), ", ")))
}

// overrideTarget puts what flags and variables say over the context.
func (a *app) overrideTarget(t *target) error {
	s := a.settings
	if len(s.controlPlane) > 0 {
		t.controlPlane = s.controlPlane
	}
	if s.trustDomain != "" {
		t.trustDomain = s.trustDomain
	}
	for _, file := range []struct {
		path string
		data *[]byte
	}{{s.caFile, &t.caPEM}, {s.certificateFile, &t.certPEM}, {s.privateKeyFile, &t.keyPEM}} {
		if file.path == "" {
			continue
		}
		data, err := os.ReadFile(file.path)
		if err != nil {
			return err
		}
		*file.data = data
	}
	return nil
}

func (t *target) check() error {
	if len(t.controlPlane) == 0 {
		return fmt.Errorf("%s names no control plane: give --control-plane host:port", t)
	}
	for _, address := range t.controlPlane {
		if err := checkAddress(address); err != nil {
			return err
		}
	}
	return nil
}

func checkAddress(address string) error {
	if host, port, err := net.SplitHostPort(address); err != nil || host == "" || port == "" {
		return fmt.Errorf("control plane %q is not host:port, for example 127.0.0.1:7443", address)
	}
	return nil
}

// String names the context as error messages do.
func (t *target) String() string {
	if t.name == "" {
		return "the command line"
	}
	return fmt.Sprintf("context %q of %s", t.name, t.path)
}

// identity reads who the client certificate is for.
func (t *target) identity() (identity, error) {
	certs, err := parseCertificates(t.certPEM)
	if err != nil {
		return identity{}, fmt.Errorf("client certificate of %s: %w", t, err)
	}
	who, err := certificateIdentity(certs[0])
	if err != nil {
		return identity{}, fmt.Errorf("client certificate of %s: %w", t, err)
	}
	return who, nil
}

// certificateIdentity reads the one URI of a certificate.
func certificateIdentity(cert *x509.Certificate) (identity, error) {
	if len(cert.URIs) != 1 || cert.URIs[0].Scheme != "spiffe" {
		return identity{}, errors.New("holds no spiffe URI, so no role")
	}
	uri := cert.URIs[0]
	role, name, found := strings.Cut(strings.TrimPrefix(uri.Path, "/"), "/")
	for value := range resealv1.Role_name {
		r := resealv1.Role(value)
		if found && name != "" && r >= resealv1.Role_ROLE_EDGE && resealv1.Label(r) == role {
			return identity{trustDomain: uri.Host, role: r, name: name, expires: cert.NotAfter}, nil
		}
	}
	return identity{}, fmt.Errorf("%s names no role", uri)
}

// tlsConfig makes the client's side of mutual TLS.
func (t *target) tlsConfig() (*tls.Config, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(t.caPEM) {
		return nil, fmt.Errorf("%s holds no root certificate (caPem)", t)
	}
	cert, err := tls.X509KeyPair(t.certPEM, t.keyPEM)
	if err != nil {
		return nil, fmt.Errorf("client certificate of %s: %s", t, strings.TrimPrefix(err.Error(), "tls: "))
	}
	if now := time.Now(); now.After(cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("the client certificate of %s expired %s ago, on %s: ask an administrator for a new one",
			t, shortDuration(now.Sub(cert.Leaf.NotAfter)), cert.Leaf.NotAfter.Local().Format(time.RFC3339))
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		MinVersion:   tls.VersionTLS13,
		// Control planes are known by their URI, never by the address that was
		// dialled. VerifyConnection does the whole check instead.
		InsecureSkipVerify: true,
		VerifyConnection:   verifyControlPlane(roots, t.trustDomain),
	}, nil
}

// verifyControlPlane accepts only a chain to roots whose leaf is for servers and
// holds spiffe://<trust domain>/controlplane as its only URI.
func verifyControlPlane(roots *x509.CertPool, trustDomain string) func(tls.ConnectionState) error {
	want := "spiffe://" + trustDomain + "/controlplane"
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return errors.New("the server sent no certificate")
		}
		leaf := state.PeerCertificates[0]
		intermediates := x509.NewCertPool()
		for _, cert := range state.PeerCertificates[1:] {
			intermediates.AddCert(cert)
		}
		_, err := leaf.Verify(x509.VerifyOptions{
			Roots:         roots,
			Intermediates: intermediates,
			KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		})
		if err != nil {
			return err
		}
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != want {
			return fmt.Errorf("the server's certificate is for %s, not for %s", orNone(joinURIs(leaf)), want)
		}
		return nil
	}
}

func joinURIs(cert *x509.Certificate) string {
	uris := make([]string, len(cert.URIs))
	for i, uri := range cert.URIs {
		uris[i] = uri.String()
	}
	return strings.Join(uris, ", ")
}
