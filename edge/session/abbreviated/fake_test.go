package abbreviated

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
)

// limit is how long a test waits for what must come. It only matters when it
// does not.
const limit = 30 * time.Second

// pair is the two ends of a TCP connection.
func pair(t testing.TB) (near, far net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if near, err = net.Dial("tcp", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{near, far} {
		_ = conn.SetDeadline(time.Now().Add(limit))
		t.Cleanup(func() { conn.Close() })
	}
	return near, far
}

// sessionOf makes a session up.
func sessionOf(id uint16, extended bool) Session {
	s := Session{ID: make([]byte, 32), Secret: make([]byte, secretSize), CipherSuite: id, ExtendedMasterSecret: extended}
	_, _ = rand.Read(s.ID)
	_, _ = rand.Read(s.Secret)
	return s
}

// plainConfig is a client's configuration without verification.
func plainConfig(protocols ...string) *tls.Config {
	return &tls.Config{ServerName: testName, InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: protocols}
}

const gcm128 = tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256

// suitesUnderTest has one suite of each kind.
var suitesUnderTest = []uint16{
	gcm128, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
}

// fake is a server of the abbreviated handshake that a test can make misbehave.
type fake struct {
	conn    net.Conn
	session Session
	suite   *suite

	clientHello, serverHello, serverFinished []byte
	writing, reading                         *protection // set by answer; used once armed
	sealed, opened                           bool

	records []record // what came, opened where possible
}

// answer is a ServerHello to be made.
type answer struct {
	version     uint16
	random      []byte
	id          []byte
	suite       uint16
	compression uint8
	extensions  []extension
	none        bool // no extensions at all, not even an empty list
	trailing    []byte
}

// read reads one record.
func (f *fake) read() (record, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(f.conn, header[:]); err != nil {
		return record{}, err
	}
	content := make([]byte, binary.BigEndian.Uint16(header[3:]))
	if _, err := io.ReadFull(f.conn, content); err != nil {
		return record{}, err
	}
	if f.opened {
		var err error
		if content, err = f.reading.open(header[0], content); err != nil {
			return record{}, err
		}
	}
	r := record{header[0], content}
	f.records = append(f.records, r)
	return r, nil
}

// greet reads the ClientHello.
func (f *fake) greet() error {
	r, err := f.read()
	if err != nil {
		return err
	}
	if r.kind != recordHandshake || r.content[0] != messageClientHello {
		return errors.New("no ClientHello")
	}
	f.clientHello = r.content
	return nil
}

// answer makes the ServerHello, and the keys that follow from it.
func (f *fake) answer(change func(*answer)) []byte {
	a := answer{version: version12, random: make([]byte, randomSize), id: f.session.ID, suite: f.session.CipherSuite}
	_, _ = rand.Read(a.random)
	if f.session.ExtendedMasterSecret {
		a.extensions = append(a.extensions, extension{extensionExtendedMasterSecret, nil})
	}
	a.extensions = append(a.extensions, extension{extensionRenegotiationInfo, []byte{0}})
	if change != nil {
		change(&a)
	}
	var b cryptobyte.Builder
	b.AddUint16(a.version)
	b.AddBytes(a.random)
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(a.id) })
	b.AddUint16(a.suite)
	b.AddUint8(a.compression)
	if !a.none {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			for _, e := range a.extensions {
				b.AddUint16(e.kind)
				b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(e.data) })
			}
		})
	}
	b.AddBytes(a.trailing)
	f.serverHello = handshakeMessage(messageServerHello, b.BytesOrPanic())
	clientRandom := f.clientHello[messageHeader+2 : messageHeader+2+randomSize]
	f.reading, f.writing, _ = f.suite.protections(f.session.Secret, clientRandom, a.random)
	return f.serverHello
}

// finished makes the server's Finished.
func (f *fake) finished() []byte {
	f.serverFinished = handshakeMessage(messageFinished, f.suite.finished(f.session.Secret, serverFinished, f.clientHello, f.serverHello))
	return f.serverFinished
}

// seal makes records of content; in clear before ChangeCipherSpec.
func (f *fake) seal(kind byte, content []byte) []byte {
	if !f.sealed {
		return append(appendHeader(nil, kind, len(content)), content...)
	}
	out, err := f.writing.seal(nil, kind, content)
	if err != nil {
		panic(err)
	}
	return out
}

// ccs is ChangeCipherSpec; what is sealed afterwards is encrypted.
func (f *fake) ccs() []byte {
	out := f.seal(recordChangeCipherSpec, []byte{1})
	f.sealed = true
	return out
}

func (f *fake) send(records ...[]byte) { _, _ = f.conn.Write(slices.Concat(records...)) }

// flight is the server's whole part of the handshake.
func (f *fake) flight(change func(*answer)) []byte {
	return slices.Concat(f.seal(recordHandshake, f.answer(change)), f.ccs(), f.seal(recordHandshake, f.finished()))
}

// complete reads the client's ChangeCipherSpec and Finished.
func (f *fake) complete() error {
	if r, err := f.read(); err != nil || r.kind != recordChangeCipherSpec {
		return errors.Join(err, errors.New("no ChangeCipherSpec"))
	}
	f.opened = true
	want := f.suite.finished(f.session.Secret, clientFinished, f.clientHello, f.serverHello, f.serverFinished)
	if r, err := f.read(); err != nil || r.kind != recordHandshake || string(r.content[messageHeader:]) != string(want) {
		return errors.Join(err, errors.New("no good Finished"))
	}
	return nil
}

// rest reads until the end.
func (f *fake) rest() {
	for {
		if _, err := f.read(); err != nil {
			return
		}
	}
}

// alerts are the alerts that came.
func (f *fake) alerts() []tls.AlertError {
	var alerts []tls.AlertError
	for _, r := range f.records {
		if r.kind == recordAlert && len(r.content) == 2 {
			alerts = append(alerts, tls.AlertError(r.content[1]))
		}
	}
	return alerts
}

// against runs serve as the server of a connection that is returned. wait ends the
// server's part and returns it.
func against(t testing.TB, cfg Config, serve func(*fake)) (c *Conn, wait func() *fake) {
	t.Helper()
	near, far := pair(t)
	f := &fake{conn: far, session: cfg.Session, suite: suiteByID(cfg.Session.CipherSuite)}
	f.session.Secret = slices.Clone(cfg.Session.Secret)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if f.greet() == nil {
			serve(f)
		}
		_ = far.(*net.TCPConn).CloseWrite()
		f.rest()
	}()
	return Client(near, cfg), func() *fake {
		near.Close()
		<-done
		return f
	}
}

// connected is a connection after the handshake; serve goes on as its server.
func connected(t testing.TB, cfg Config, serve func(*fake)) (c *Conn, wait func() *fake) {
	t.Helper()
	c, wait = against(t, cfg, func(f *fake) {
		f.send(f.flight(nil))
		if err := f.complete(); err != nil {
			t.Error(err)
			return
		}
		serve(f)
	})
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c, wait
}
