package session

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/cryptobyte"

	"github.com/reseal/reseal/edge/session/abbreviated"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// crypto/tls resumes as a client by ticket and PSK only. Session IDs (RFC 5246
// section 7.3) are resumed in two ways.
//
// On top of its public interface: the ID stands in the plain ServerHello, the
// master secret is what KeyLogWriter is told, both become a SessionState by the
// documented encoding, and Rand makes the next ClientHello carry the ID. The
// server then echoes it, which crypto/tls takes for a resumed session, as it
// does with tickets (RFC 5077 section 3.4). It sends 32 bytes of session ID
// always, and the session_ticket extension.
//
// By edge/session/abbreviated, without that extension: for servers that resume
// by ID only then, for shorter IDs, and for releases of crypto/tls with which the
// first way fails. Which way an identity goes is learned (see ways.go).

// sessionIDSize is the size of a session ID that crypto/tls can offer, in bytes.
const sessionIDSize = 32

// idSession is what a session needs to be offered by ID.
type idSession struct {
	id      []byte
	secret  []byte
	suite   uint16
	extends bool // extended master secret
	peers   []*x509.Certificate
	chains  [][]*x509.Certificate
	encoded []byte // as encodeSession does; it holds all of the above but the ID
}

// newIDHeld makes a session of an encoded one of TLS 1.2 that the server gave
// with an ID, or nil when it can't be offered. onTop is whether crypto/tls can
// offer it.
func newIDHeld(session encodedSession, id []byte, onTop bool, now time.Time) *held {
	if len(id) == 0 || len(id) > maxSessionID || session.version != tls.VersionTLS12 {
		return nil
	}
	h := &held{
		version: tls.VersionTLS12, useBy: now.Add(maxLifetime12), size: int64(len(session.encoded)),
		byID: &idSession{
			id: bytes.Clone(id), secret: session.secret, suite: session.suite, extends: session.extended,
			peers: session.certificates, chains: session.chains, encoded: session.encoded,
		},
	}
	if onTop && len(id) == sessionIDSize {
		parsed, err := tls.ParseSessionState(bytes.Clone(session.encoded)) // which keeps them
		if err != nil {
			return nil
		}
		if h.state, err = tls.NewResumptionState(nil, parsed); err != nil {
			return nil
		}
	}
	if h.state == nil && !abbreviated.Supports(session.suite) {
		return nil
	}
	return h
}

// newIDSession makes a session of a full TLS 1.2 handshake that gave no ticket,
// or nil when the server gave no ID, or one of no use.
func newIDSession(hello serverHello, state tls.ConnectionState, secret []byte, onTop bool, now time.Time) *held {
	if len(hello.sessionID) == 0 || len(secret) == 0 || len(state.PeerCertificates) == 0 {
		return nil
	}
	encoded, err := encodeSession(state, secret, hello.extendedMasterSecret, now)
	if err != nil {
		return nil
	}
	session, err := parseSession(encoded)
	if err != nil {
		return nil
	}
	return newIDHeld(session, hello.sessionID, onTop, now)
}

// encodeSession encodes a client's TLS 1.2 session as tls.SessionState
// documents. The self-check compares it with what crypto/tls writes.
func encodeSession(state tls.ConnectionState, secret []byte, extended bool, now time.Time) ([]byte, error) {
	const client = 2
	var b cryptobyte.Builder
	b.AddUint16(state.Version)
	b.AddUint8(client)
	b.AddUint16(state.CipherSuite)
	b.AddUint64(uint64(now.Unix()))
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(secret) })
	b.AddUint24(0) // extra
	addBool(&b, extended)
	addBool(&b, false) // early data
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { addCertificates(b, state) })
	addChains(&b, state.VerifiedChains)
	b.AddUint16(uint16(state.CurveID))
	return b.Bytes()
}

func addBool(b *cryptobyte.Builder, value bool) {
	if value {
		b.AddUint8(1)
	} else {
		b.AddUint8(0)
	}
}

// addCertificates writes a CertificateEntry (RFC 8446 section 4.4.2) per
// certificate; OCSP response and SCTs are extensions of the leaf.
func addCertificates(b *cryptobyte.Builder, state tls.ConnectionState) {
	const extensionStatusRequest, extensionSCT, ocsp = 5, 18, 1
	for i, certificate := range state.PeerCertificates {
		b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(certificate.Raw) })
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			if i > 0 {
				return
			}
			if len(state.OCSPResponse) > 0 {
				b.AddUint16(extensionStatusRequest)
				b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
					b.AddUint8(ocsp)
					b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(state.OCSPResponse) })
				})
			}
			if len(state.SignedCertificateTimestamps) > 0 {
				b.AddUint16(extensionSCT)
				b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
					b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
						for _, sct := range state.SignedCertificateTimestamps {
							b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(sct) })
						}
					})
				})
			}
		})
	}
}

// refusal repeats the checks that crypto/tls makes before it offers a session.
// It reads the ID from Rand before it makes them; a ClientHello that carried the
// ID of a session which it then refuses would end in an aborted handshake. The
// result is 0 when the session will be offered.
func (s *idSession) refusal(cfg *tls.Config, now time.Time) resealv1.MissReason {
	const changed = resealv1.MissReason_MISS_REASON_POLICY_CHANGED
	const expired = resealv1.MissReason_MISS_REASON_EXPIRED
	if !offersTLS12(cfg) || cfg.CipherSuites != nil && !slices.Contains(cfg.CipherSuites, s.suite) {
		return changed
	}
	leaf := s.peers[0]
	if now.After(leaf.NotAfter) {
		return expired
	}
	if cfg.InsecureSkipVerify {
		return 0
	}
	if len(s.chains) == 0 || leaf.VerifyHostname(cfg.ServerName) != nil {
		return changed
	}
	options := x509.VerifyOptions{Roots: cfg.RootCAs, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if !slices.ContainsFunc(s.chains, func(chain []*x509.Certificate) bool { return chainHolds(chain, options) }) {
		return expired
	}
	return 0
}

// chainHolds reports whether all certificates of a chain that was verified once
// are still valid, and its root still trusted.
func chainHolds(chain []*x509.Certificate, options x509.VerifyOptions) bool {
	if len(chain) == 0 {
		return false
	}
	for _, certificate := range chain {
		if options.CurrentTime.Before(certificate.NotBefore) || options.CurrentTime.After(certificate.NotAfter) {
			return false
		}
	}
	_, err := chain[len(chain)-1].Verify(options)
	return err == nil
}

// offersTLS12 reports whether a handshake with cfg can end as TLS 1.2.
func offersTLS12(cfg *tls.Config) bool {
	return (cfg.MinVersion == 0 || cfg.MinVersion <= tls.VersionTLS12) &&
		(cfg.MaxVersion == 0 || cfg.MaxVersion >= tls.VersionTLS12)
}

// idRand is a tls.Config.Rand whose second read of 32 bytes is the session ID:
// the first one is the ClientHello's random. All else comes from crypto/rand.
type idRand struct {
	id    [sessionIDSize]byte
	reads atomic.Int32
}

// Read implements io.Reader.
func (r *idRand) Read(p []byte) (int, error) {
	if len(p) == sessionIDSize && r.reads.Add(1) == 2 {
		return copy(p, r.id[:]), nil
	}
	return rand.Read(p)
}

// secretLog is a tls.Config.KeyLogWriter that keeps the master secret of a TLS
// 1.2 handshake and nothing else.
type secretLog struct {
	secret []byte
	ended  bool
}

var errKeyLog = errors.New("unexpected key log line")

// Write implements io.Writer. A line is "CLIENT_RANDOM <random> <secret>" in
// hexadecimal.
func (l *secretLog) Write(line []byte) (int, error) {
	rest, ok := bytes.CutPrefix(line, []byte("CLIENT_RANDOM "))
	if !ok || l.ended {
		return len(line), nil // secrets of TLS 1.3, or of a renegotiation
	}
	_, digits, ok := bytes.Cut(bytes.TrimSpace(rest), []byte(" "))
	if !ok {
		return 0, errKeyLog
	}
	secret := make([]byte, hex.DecodedLen(len(digits)))
	if _, err := hex.Decode(secret, digits); err != nil {
		return 0, errKeyLog
	}
	l.wipe()
	l.secret = secret
	return len(line), nil
}

// wipe zeroes the secret. crypto/tls keeps copies of its own.
func (l *secretLog) wipe() {
	clear(l.secret)
	l.secret = nil
}

// end wipes the secret and keeps no other. The handshake is over.
func (l *secretLog) end() {
	l.wipe()
	l.ended = true
}
