package trust

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const defaultOperatorTTL = 365 * 24 * time.Hour

// IssueOperator makes a key and a certificate for a person or a tool that is not
// kept as a user, so that it can't be renewed. role is ROLE_VIEWER, ROLE_OPERATOR or
// ROLE_ADMIN; ttl 0 means a year. It does not outlive the authority. Errors:
// ErrNotOpen, a bad role or name.
func (t *Trust) IssueOperator(role resealv1.Role, name string, ttl time.Duration) (certPEM, keyPEM []byte, err error) {
	if !isPerson(role) {
		return nil, nil, fmt.Errorf("%s is not a role of people", role)
	}
	if err := checkName(name); err != nil {
		return nil, nil, fmt.Errorf("name: %w", err)
	}
	if ttl == 0 {
		ttl = defaultOperatorTTL
	}
	if ttl < 0 {
		return nil, nil, fmt.Errorf("lifetime %s is negative", ttl)
	}
	certificate, keyPEM, err := t.makeUser(storedUser{name: name, userRecord: userRecord{Role: role, TTL: ttl}})
	if err != nil {
		return nil, nil, err
	}
	return certificatePEM(certificate.Raw), keyPEM, nil
}

// makeUser makes a key and a certificate for it.
func (t *Trust) makeUser(user storedUser) (certificate *x509.Certificate, keyPEM []byte, err error) {
	opened := t.opened.Load()
	if opened == nil {
		return nil, nil, ErrNotOpen
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if certificate, err = t.issueUser(opened.authority, user, key.Public()); err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	t.logger.Info("operator certificate issued", "identity", user.identity().String(), "not_after", certificate.NotAfter)
	return certificate, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// issueUser issues a user's certificate.
func (t *Trust) issueUser(authority *authority, user storedUser, key crypto.PublicKey) (*x509.Certificate, error) {
	certificate, err := authority.issue(leaf{
		uri:       t.uri(user.identity().String()),
		publicKey: key,
		ttl:       user.TTL,
		usages:    []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		enrolment: user.Enrolment,
	})
	if err != nil {
		t.logger.Error("issue a user's certificate", "user", user.identity().String(), "error", err)
		return nil, status.Error(codes.Internal, "the certificate could not be issued; see the control plane's log")
	}
	return certificate, nil
}

// contextFile is the file that resealctl reads with --config.
type contextFile struct {
	CurrentContext string          `yaml:"currentContext"`
	Contexts       []clientContext `yaml:"contexts"`
}

type clientContext struct {
	Name           string   `yaml:"name"`
	ControlPlane   []string `yaml:"controlPlane,flow"`
	TrustDomain    string   `yaml:"trustDomain"`
	CAPEM          string   `yaml:"caPem"`
	CertificatePEM string   `yaml:"certificatePem"`
	PrivateKeyPEM  string   `yaml:"privateKeyPem"`
}

// WriteAdminContext writes a context named "local", with a new administrator's
// certificate of a year, to path, mode 0600, and enters that administrator among the
// users. servers are host:port. A file that has the context already is left as it
// is, unless the certificate expired or the authority is another one; other contexts
// in the file are kept in any case. Nothing is written once that administrator was
// revoked, unless there is no other whose certificate has not expired. Errors: ErrNotOpen, those of the file system and
// of the store, a file that is not a context file.
func (t *Trust) WriteAdminContext(path string, servers []string) error {
	opened := t.opened.Load()
	if opened == nil {
		return ErrNotOpen
	}
	file, err := readContextFile(path)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	at := slices.IndexFunc(file.Contexts, func(c clientContext) bool { return c.Name == localName })
	if at >= 0 && usable(file.Contexts[at], opened.authority) {
		if kept, err := t.adoptLocal(ctx, file.Contexts[at]); kept || err != nil {
			return err
		}
	}
	if needed, err := t.needsLocal(ctx); err != nil || !needed {
		return err
	}
	certificate, key, err := t.makeLocal(ctx)
	if err != nil {
		return err
	}
	made := clientContext{
		Name:           localName,
		ControlPlane:   servers,
		TrustDomain:    t.trustDomain,
		CAPEM:          string(opened.authority.pem()),
		CertificatePEM: string(certificate),
		PrivateKeyPEM:  string(key),
	}
	if at >= 0 {
		file.Contexts[at] = made
	} else {
		file.Contexts = append(file.Contexts, made)
	}
	if file.CurrentContext == "" {
		file.CurrentContext = localName
	}
	var text bytes.Buffer
	encoder := yaml.NewEncoder(&text)
	encoder.SetIndent(2)
	if err := errors.Join(encoder.Encode(file), encoder.Close()); err != nil {
		return err
	}
	if err := replaceFile(path, text.Bytes()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	t.logger.Info("admin context written", "file", path)
	return nil
}

func readContextFile(path string) (contextFile, error) {
	var file contextFile
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return file, err
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		// The decoder's error would quote the key.
		return file, fmt.Errorf("%s is not a context file; move it away to get a new one", path)
	}
	return file, nil
}

// usable tells whether a context still works with authority.
func usable(c clientContext, authority *authority) bool {
	ca, _ := pem.Decode([]byte(c.CAPEM))
	if ca == nil || !bytes.Equal(ca.Bytes, authority.certificate.Raw) {
		return false
	}
	certificate, err := c.certificate()
	return err == nil && time.Now().Before(certificate.NotAfter)
}

func (c clientContext) certificate() (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(c.CertificatePEM))
	if block == nil {
		return nil, errors.New("no certificate in PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}
