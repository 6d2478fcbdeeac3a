package session

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/fips140"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"time"
)

// checkSessionIDs finds out whether session IDs can be resumed on top of this
// release of crypto/tls, whose encoding of sessions and reads of Config.Rand are
// its own business. If not, all go without it (see ways.go), which costs nothing
// but is worth a loud word.
func checkSessionIDs(logger *slog.Logger) bool {
	if fips140.Enforced() {
		logger.Warn("TLS 1.2 session IDs are not resumed: FIPS 140-3 is enforced, which forbids a source of randomness of our own")
		return false
	}
	if err := selfCheck(); err != nil {
		logger.Error("TLS 1.2 session IDs are resumed without crypto/tls, which behaves differently in this release", "error", err)
		return false
	}
	return true
}

// selfCheck makes two handshakes in memory. The second one offers a session that
// was encoded here, from the key log and the ServerHello of the first, and a
// session ID through Rand. The server, which is crypto/tls too, does not support
// session IDs; it resumes by the ticket that the session carries, and echoes the
// ID.
func selfCheck() error {
	certificate, err := checkCertificate()
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(certificate.Leaf)
	server := &tls.Config{Certificates: []tls.Certificate{certificate}, MaxVersion: tls.VersionTLS12}
	client := &tls.Config{RootCAs: roots, ServerName: "self.check", MinVersion: tls.VersionTLS12}

	first := checkRun{log: &secretLog{}}
	if err := first.handshake(client, server); err != nil {
		return fmt.Errorf("full handshake: %w", err)
	}
	defer first.log.wipe()
	second, err := first.next()
	if err != nil {
		return err
	}
	if err := second.handshake(client, server); err != nil {
		return fmt.Errorf("resumed handshake: %w", err)
	}
	switch {
	case !second.state.DidResume:
		return errors.New("a session encoded here is not resumed")
	case !second.spy.offered || !bytes.Equal(second.spy.hello.sessionID, second.spy.armed):
		return errors.New("the ClientHello does not carry the session ID from Rand")
	}
	return nil
}

// checkRun is one handshake of the self-check. It is its own session cache.
type checkRun struct {
	log   *secretLog
	rand  *idRand
	spy   *helloSpy
	offer *tls.ClientSessionState
	given *tls.ClientSessionState
	state tls.ConnectionState
}

// Get implements tls.ClientSessionCache.
func (r *checkRun) Get(string) (*tls.ClientSessionState, bool) { return r.offer, r.offer != nil }

// Put implements tls.ClientSessionCache.
func (r *checkRun) Put(_ string, state *tls.ClientSessionState) { r.given = state }

// handshake runs the client on one end of a pipe and the server on the other.
func (r *checkRun) handshake(client, server *tls.Config) error {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	deadline := time.Now().Add(10 * time.Second)
	if err := errors.Join(near.SetDeadline(deadline), far.SetDeadline(deadline)); err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- tls.Server(far, server).Handshake() }()
	own := client.Clone()
	own.ClientSessionCache = r
	own.KeyLogWriter = r.log
	r.spy = &helloSpy{Conn: near, supply: &supply{}, listens: true}
	if r.rand != nil {
		own.Rand = r.rand
		r.spy.armed = r.rand.id[:]
	}
	conn := tls.Client(r.spy, own)
	err := conn.Handshake()
	if err != nil {
		near.Close()
	}
	r.state = conn.ConnectionState()
	return errors.Join(err, <-served)
}

// next is the run that resumes r by a session of our own encoding. It fails
// when crypto/tls encodes the same session in another way.
func (r *checkRun) next() (*checkRun, error) {
	if r.given == nil {
		return nil, errors.New("no session was given")
	}
	ticket, theirs, err := r.given.ResumptionState()
	if err != nil {
		return nil, err
	}
	expected, err := theirs.Bytes()
	if err != nil {
		return nil, err
	}
	defer clear(expected)
	created, err := createdAt(expected)
	if err != nil {
		return nil, err
	}
	ours, err := encodeSession(r.state, r.log.secret, r.spy.hello.extendedMasterSecret, created)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(ours, expected) {
		return nil, errors.New("the encoding of sessions has changed")
	}
	session, err := tls.ParseSessionState(ours) // which keeps ours
	if err != nil {
		return nil, err
	}
	offer, err := tls.NewResumptionState(ticket, session)
	if err != nil {
		return nil, err
	}
	next := &checkRun{log: &secretLog{}, rand: &idRand{}, offer: offer}
	_, err = rand.Read(next.rand.id[:])
	return next, err
}

// createdAt reads the time out of an encoded session.
func createdAt(encoded []byte) (time.Time, error) {
	const offset = 2 + 1 + 2 // version, type, cipher suite
	if len(encoded) < offset+8 {
		return time.Time{}, errors.New("the encoding of sessions has changed")
	}
	return time.Unix(new(big.Int).SetBytes(encoded[offset:offset+8]).Int64(), 0), nil
}

func checkCertificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "self.check"},
		DNSNames:     []string{"self.check"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IsCA:         true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, err
}
