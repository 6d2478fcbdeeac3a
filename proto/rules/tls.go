package rules

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxTicketLifetime is the most that TLS 1.3 allows (RFC 8446 section 4.6.1).
const maxTicketLifetime = 7 * 24 * time.Hour

func (c *checker) tlsPolicy(p *resealv1.TLSPolicy) {
	if full := p.WithDefaults(); full.MinVersion > full.MaxVersion {
		path := "spec.minVersion"
		if p.MinVersion == 0 {
			path = "spec.maxVersion"
		}
		c.failf(path, "minVersion %s is above maxVersion %s", resealv1.Label(full.MinVersion), resealv1.Label(full.MaxVersion))
	}
	c.each("spec.cipherSuites", p.CipherSuites, checkCipherSuite)
	c.each("spec.curves", p.Curves, checkCurve)
	c.each("spec.alpn", p.Alpn, checkALPN)
	if lifetime := p.GetResumption().GetTicketLifetime().AsDuration(); lifetime > maxTicketLifetime {
		c.failf("spec.resumption.ticketLifetime", "%s is above the maximum, 168h (RFC 8446 section 4.6.1)", DurationText(lifetime))
	}
	c.optional("spec.resumption.keyring", p.GetResumption().GetKeyring(), checkName)
	c.clientAuth(p.GetClientAuth())
}

func checkCipherSuite(name string) error {
	var names []string
	for _, suite := range tls.CipherSuites() {
		isTLS12 := slices.Contains(suite.SupportedVersions, tls.VersionTLS12)
		switch {
		case suite.Name == name && !isTLS12:
			return fmt.Errorf("%s belongs to TLS 1.3, whose suites can't be chosen; remove it", name)
		case suite.Name == name:
			return nil
		case isTLS12:
			names = append(names, suite.Name)
		}
	}
	for _, suite := range tls.InsecureCipherSuites() {
		if suite.Name == name {
			return fmt.Errorf("%s is insecure; choose another", name)
		}
	}
	return fmt.Errorf("%s is not a cipher suite that Go knows%s", Quote(name), DidYouMean(name, names))
}

func checkCurve(name string) error {
	names := []string{"X25519", "P256", "P384", "P521", "X25519MLKEM768"}
	if slices.Contains(names, name) {
		return nil
	}
	hint := DidYouMean(name, names)
	if hint == "" {
		hint = "; it is one of " + OneOf(names)
	}
	return fmt.Errorf("%s is not known%s", Quote(name), hint)
}

// checkALPN checks a protocol name (RFC 7301 section 3.1).
func checkALPN(name string) error {
	if name == "" || len(name) > 255 {
		return errors.New("must be 1 to 255 bytes long")
	}
	return nil
}

func (c *checker) clientAuth(auth *resealv1.ClientAuth) {
	asks := auth.GetMode() == resealv1.ClientAuth_MODE_OPTIONAL || auth.GetMode() == resealv1.ClientAuth_MODE_REQUIRE
	switch {
	case auth.GetCaPem() == "" && asks:
		c.failf("spec.clientAuth.caPem", "is missing; mode %s needs the roots of client certificates", resealv1.Label(auth.GetMode()))
	case auth.GetCaPem() == "" && auth.GetCrlPem() != "":
		c.failf("spec.clientAuth.caPem", "is missing; crlPem holds revocation lists of these roots")
	}
	if auth.GetCaPem() == "" {
		return
	}
	roots, err := parseCertificates(auth.CaPem)
	c.err("spec.clientAuth.caPem", err)
	if err == nil && auth.GetCrlPem() != "" {
		c.err("spec.clientAuth.crlPem", checkRevocationLists(auth.CrlPem, roots))
	}
}

// checkRevocationLists checks that each list is signed by one of the roots.
func checkRevocationLists(text string, roots []*x509.Certificate) error {
	blocks, err := pemBlocks(text, "X509 CRL")
	if err != nil {
		return err
	}
	for i, block := range blocks {
		list, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return fmt.Errorf("revocation list %d can't be read: %w", i+1, err)
		}
		isSigner := func(root *x509.Certificate) bool { return list.CheckSignatureFrom(root) == nil }
		if !slices.ContainsFunc(roots, isSigner) {
			return fmt.Errorf("revocation list %d is not signed by a certificate of caPem", i+1)
		}
	}
	return nil
}

func (c *checker) certificate(cert *resealv1.Certificate) {
	hasPEM := cert.CertificatePem != "" || cert.PrivateKeyPem != ""
	hasFiles := cert.CertificateFile != "" || cert.PrivateKeyFile != ""
	switch {
	case !hasPEM && !hasFiles:
		c.failf("spec", "has no certificate; set certificatePem and privateKeyPem, or certificateFile and privateKeyFile")
	case hasPEM && hasFiles:
		path := "spec.certificateFile"
		if cert.CertificateFile == "" {
			path = "spec.privateKeyFile"
		}
		c.failf(path, "PEM and files are both set; remove one of them")
	case hasPEM && cert.CertificatePem == "":
		c.failf("spec.certificatePem", "is missing; a private key needs its certificate")
	case hasFiles && cert.CertificateFile == "":
		c.failf("spec.certificateFile", "is missing; privateKeyFile needs it")
	case hasFiles && cert.PrivateKeyFile == "":
		c.failf("spec.privateKeyFile", "is missing; certificateFile needs it")
	}
	c.optional("spec.certificateFile", cert.CertificateFile, checkFile)
	c.optional("spec.privateKeyFile", cert.PrivateKeyFile, checkFile)
	if cert.CertificatePem == "" {
		return
	}
	chain, err := parseCertificates(cert.CertificatePem)
	c.err("spec.certificatePem", err)
	isMarker := strings.TrimSpace(cert.PrivateKeyPem) == resealv1.SecretMarker
	if err == nil && cert.PrivateKeyPem != "" && !isMarker {
		c.err("spec.privateKeyPem", checkPrivateKey(cert.PrivateKeyPem, chain[0]))
	}
}

// parseCertificates reads one or more PEM certificates.
func parseCertificates(text string) ([]*x509.Certificate, error) {
	blocks, err := pemBlocks(text, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	certificates := make([]*x509.Certificate, len(blocks))
	for i, block := range blocks {
		if certificates[i], err = x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("certificate %d can't be read: %w", i+1, err)
		}
	}
	return certificates, nil
}

// pemBlocks reads a PEM text of which each block has the given type. A byte order
// mark, which editors on Windows write, is skipped: before the first block it would
// hide it.
func pemBlocks(text, blockType string) ([]*pem.Block, error) {
	var blocks []*pem.Block
	rest := []byte(strings.TrimPrefix(text, "\ufeff"))
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != blockType {
			return nil, fmt.Errorf("holds a PEM block %s where only %s belongs", Quote(block.Type), blockType)
		}
		blocks = append(blocks, block)
	}
	switch {
	case strings.Count(text, "-----BEGIN ") != len(blocks):
		return nil, errors.New("holds a damaged PEM block")
	case len(blocks) == 0:
		return nil, fmt.Errorf("holds no PEM block %s", blockType)
	}
	return blocks, nil
}

// checkPrivateKey checks that a key can be read and belongs to the leaf. Its
// errors are fixed texts: what a parser says of a key could hold parts of it.
func checkPrivateKey(text string, leaf *x509.Certificate) error {
	text = strings.TrimPrefix(text, "\ufeff")
	block, _ := pem.Decode([]byte(text))
	// A file written by openssl may have its parameters in front of the key.
	for rest := []byte(text); block != nil && block.Type == "EC PARAMETERS"; {
		_, rest = pem.Decode(rest)
		block, _ = pem.Decode(rest)
	}
	switch {
	case block == nil:
		return errors.New("holds no PEM block PRIVATE KEY")
	case block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "":
		return errors.New("is encrypted with a password; decrypt it first")
	case !strings.HasSuffix(block.Type, "PRIVATE KEY"):
		return errors.New("is not a private key; it holds another kind of PEM block")
	}
	signer, ok := parsePrivateKey(block.Bytes)
	if !ok {
		return errors.New("can't be read; it must be a PKCS #8, PKCS #1 or SEC 1 private key")
	}
	public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return errors.New("does not belong to the first certificate of certificatePem")
	}
	return nil
}

func parsePrivateKey(der []byte) (crypto.Signer, bool) {
	if key, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		signer, ok := key.(crypto.Signer)
		return signer, ok
	}
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key, true
	}
	if key, err := x509.ParseECPrivateKey(der); err == nil {
		return key, true
	}
	return nil, false
}
