// Package abbreviated is a TLS 1.2 client for the abbreviated handshake alone
// (RFC 5246 section 7.3): it resumes a session by its ID, without the
// session_ticket extension, and goes on with AES-GCM or ChaCha20-Poly1305.
//
// It exists for servers that resume by session ID only when no session_ticket
// extension is sent, as JSSE does when it chooses its certificate by server
// name: crypto/tls sends that extension whenever it resumes.
//
// There are no certificates, signatures, key exchanges, compression or
// renegotiation in it, and nothing to be negotiated: version, cipher suite and
// extended master secret are those of the session, or the attempt ends. A full
// handshake is crypto/tls's. The caller decides, before the attempt, whether
// the session may still be offered: that its certificate is valid, its root
// trusted, its suite allowed.
package abbreviated

import (
	"bytes"
	"crypto/fips140"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
)

// Session is what is kept of a full TLS 1.2 handshake.
type Session struct {
	// ID is the session ID that the server gave, 1 to 32 bytes.
	ID []byte
	// Secret is the master secret, 48 bytes. Client copies it.
	Secret []byte
	// CipherSuite must be one that Supports knows.
	CipherSuite uint16
	// ExtendedMasterSecret says how the secret was derived (RFC 7627). The server
	// must resume in the same way.
	ExtendedMasterSecret bool

	// PeerCertificates and VerifiedChains are reported by ConnectionState.
	PeerCertificates []*x509.Certificate
	VerifiedChains   [][]*x509.Certificate
}

// Config is what one attempt needs.
type Config struct {
	Session Session
	// Hello is what the ClientHello offers. Default: HelloOf(Config).
	Hello Hello
	// Config is the client's. Of it MinVersion and MaxVersion are read, which must
	// allow TLS 1.2; whether they allow TLS 1.3 decides about ErrVersionChanged.
	// ServerName and NextProtos must be those of Hello. VerifyConnection is called
	// before anything but the ClientHello is sent. All else counts in full
	// handshakes only; nothing is ever written to KeyLogWriter. Required.
	Config *tls.Config
}

var (
	// ErrDeclined is an attempt that the server answered with a full handshake: it
	// has forgotten the session. The connection is no longer of any use.
	ErrDeclined = errors.New("the server does not resume the session")
	// ErrVersionChanged is an attempt that the server answered with another
	// version, or with the sign that it could speak TLS 1.3 (RFC 8446 section
	// 4.1.3) while Config allows that. It did not when the session was made.
	ErrVersionChanged = errors.New("the server speaks another version of TLS than when the session was made")
)

const (
	secretSize = 48 // RFC 5246 section 8.1
	maxIDSize  = 32
)

// Supports reports whether sessions of a cipher suite can be resumed. It is
// false for all of them when FIPS 140-3 is enforced, where only crypto/tls may
// make the nonces of AES-GCM.
func Supports(suite uint16) bool {
	return suiteByID(suite) != nil && !fips140.Enforced()
}

// check reports what makes the attempt impossible.
func (c *Config) check() error {
	if c.Config == nil {
		return errors.New("no configuration")
	}
	s := &c.Session
	switch {
	case len(s.ID) == 0 || len(s.ID) > maxIDSize:
		return fmt.Errorf("the session ID has %d bytes, not 1 to %d", len(s.ID), maxIDSize)
	case len(s.Secret) != secretSize:
		return fmt.Errorf("the master secret has %d bytes, not %d", len(s.Secret), secretSize)
	case !Supports(s.CipherSuite):
		return fmt.Errorf("cipher suite %s is not supported", tls.CipherSuiteName(s.CipherSuite))
	case c.Config.MinVersion > tls.VersionTLS12 || c.Config.MaxVersion != 0 && c.Config.MaxVersion < tls.VersionTLS12:
		return errors.New("TLS 1.2 is not allowed")
	}
	return nil
}

// allowsTLS13 reports whether a full handshake could end as TLS 1.3.
func (c *Config) allowsTLS13() bool {
	return c.Config.MaxVersion == 0 || c.Config.MaxVersion >= tls.VersionTLS13
}

// Client returns a connection that resumes a session on conn. The handshake is
// made by HandshakeContext, or by the first Read or Write.
func Client(conn net.Conn, cfg Config) *Conn {
	cfg.Session.ID = bytes.Clone(cfg.Session.ID)
	cfg.Session.Secret = bytes.Clone(cfg.Session.Secret)
	c := &Conn{conn: conn, cfg: cfg}
	c.in.buf = c.in.small[:]
	return c
}
