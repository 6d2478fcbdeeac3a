package session

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
)

const (
	// maxEncoded bounds an encoded session, in bytes.
	maxEncoded = 60 << 10
	// maxChain bounds the certificates of one list, maxChains the lists.
	maxChain  = 16
	maxChains = 4
)

var errEncoding = errors.New("malformed session")

// encodedSession is what can be read out of a client's session as
// tls.SessionState documents its encoding. crypto/tls reveals none of it.
type encodedSession struct {
	encoded      []byte
	version      uint16
	suite        uint16
	created      time.Time
	secret       []byte
	extended     bool                // extended master secret
	certificates []*x509.Certificate // as the server sent them
	chains       [][]*x509.Certificate

	// Where the verified chains stand in encoded, their length included.
	chainsBegin, chainsEnd int
}

// parseSession reads a client's session. It keeps encoded.
func parseSession(encoded []byte) (encodedSession, error) {
	session := encodedSession{encoded: encoded}
	if len(encoded) > maxEncoded {
		return session, errEncoding
	}
	s := cryptobyte.String(encoded)
	const client = 2
	var kind, extended, early uint8
	var created uint64
	var secret, extra, list, chains cryptobyte.String
	if !s.ReadUint16(&session.version) || !s.ReadUint8(&kind) || kind != client ||
		!s.ReadUint16(&session.suite) || !s.ReadUint64(&created) || created > maxUnix ||
		!s.ReadUint8LengthPrefixed(&secret) || secret.Empty() ||
		!s.ReadUint24LengthPrefixed(&extra) || !extra.Empty() ||
		!s.ReadUint8(&extended) || extended > 1 || !s.ReadUint8(&early) || early != 0 ||
		!s.ReadUint24LengthPrefixed(&list) {
		return session, errEncoding
	}
	session.created, session.extended, session.secret = time.Unix(int64(created), 0), extended == 1, secret
	session.chainsBegin = len(encoded) - len(s)
	if !s.ReadUint24LengthPrefixed(&chains) {
		return session, errEncoding
	}
	session.chainsEnd = len(encoded) - len(s)
	trailer := 2 // curve
	if session.version == tls.VersionTLS13 {
		trailer = 8 + 4 // use_by, age_add
	}
	if len(s) != trailer || session.version != tls.VersionTLS13 && session.version != tls.VersionTLS12 {
		return session, errEncoding
	}
	var err error
	if session.certificates, err = readEntries(list); err == nil {
		session.chains, err = readChains(chains, session.certificates[0])
	}
	return session, err
}

// maxUnix is the last second that a time is read as: the year 9999.
const maxUnix = 253402300799

// readEntries reads CertificateEntries (RFC 8446 section 4.4.2), at least one.
func readEntries(list cryptobyte.String) ([]*x509.Certificate, error) {
	var certificates []*x509.Certificate
	for !list.Empty() {
		var der, extensions cryptobyte.String
		if !list.ReadUint24LengthPrefixed(&der) || !list.ReadUint16LengthPrefixed(&extensions) || len(certificates) == maxChain {
			return nil, errEncoding
		}
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errEncoding, err)
		}
		certificates = append(certificates, certificate)
	}
	if len(certificates) == 0 {
		return nil, errEncoding
	}
	return certificates, nil
}

// readChains reads the verified chains, which stand there without the leaf.
func readChains(lists cryptobyte.String, leaf *x509.Certificate) ([][]*x509.Certificate, error) {
	var chains [][]*x509.Certificate
	for !lists.Empty() {
		var list cryptobyte.String
		if !lists.ReadUint24LengthPrefixed(&list) || len(chains) == maxChain {
			return nil, errEncoding
		}
		chain := []*x509.Certificate{leaf}
		for !list.Empty() {
			var der cryptobyte.String
			if !list.ReadUint24LengthPrefixed(&der) || len(chain) == maxChain {
				return nil, errEncoding
			}
			certificate, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", errEncoding, err)
			}
			chain = append(chain, certificate)
		}
		chains = append(chains, chain)
	}
	return chains, nil
}

// withChains is the session with other verified chains.
func (s encodedSession) withChains(chains [][]*x509.Certificate) (encodedSession, error) {
	var b cryptobyte.Builder
	addChains(&b, chains)
	inner, err := b.Bytes()
	if err != nil {
		return s, err
	}
	changed := s
	changed.chains = chains
	changed.encoded = slices.Concat(s.encoded[:s.chainsBegin], inner, s.encoded[s.chainsEnd:])
	changed.chainsEnd = s.chainsBegin + len(inner)
	return changed, nil
}

// addChains writes verified chains. The leaf, which is the first of each, stands
// among the certificates already.
func addChains(b *cryptobyte.Builder, chains [][]*x509.Certificate) {
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		for _, chain := range chains {
			b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
				for _, certificate := range chain[1:] {
					b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(certificate.Raw) })
				}
			})
		}
	})
}

// verify does for a session from elsewhere what a full handshake with cfg would
// have done, and returns the session with the chains that were found here.
func (s encodedSession) verify(cfg *tls.Config, now time.Time) (encodedSession, error) {
	leaf := s.certificates[0]
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return s, errors.New("the certificate is not valid now")
	}
	if cfg.MinVersion != 0 && s.version < cfg.MinVersion || cfg.MaxVersion != 0 && s.version > cfg.MaxVersion {
		return s, fmt.Errorf("%s is not allowed", tls.VersionName(s.version))
	}
	var chains [][]*x509.Certificate
	if !cfg.InsecureSkipVerify {
		options := x509.VerifyOptions{
			Roots: cfg.RootCAs, CurrentTime: now, DNSName: cfg.ServerName, Intermediates: x509.NewCertPool(),
		}
		if cfg.ServerName == "" {
			return s, errors.New("there is no name to verify")
		}
		for _, intermediate := range s.certificates[1:] {
			options.Intermediates.AddCert(intermediate)
		}
		var err error
		if chains, err = leaf.Verify(options); err != nil {
			return s, err
		}
		chains = chains[:min(len(chains), maxChains)]
	}
	if cfg.VerifyPeerCertificate != nil {
		var raw [][]byte
		for _, certificate := range s.certificates {
			raw = append(raw, certificate.Raw)
		}
		if err := cfg.VerifyPeerCertificate(raw, chains); err != nil {
			return s, err
		}
	}
	if cfg.VerifyConnection != nil {
		if err := cfg.VerifyConnection(tls.ConnectionState{
			Version: s.version, HandshakeComplete: true, DidResume: true, CipherSuite: s.suite,
			ServerName: cfg.ServerName, PeerCertificates: s.certificates, VerifiedChains: chains,
		}); err != nil {
			return s, err
		}
	}
	return s.withChains(chains)
}
