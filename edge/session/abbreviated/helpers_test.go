package abbreviated

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"net"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testName = "example.test"

// tape is a connection whose incoming bytes are kept.
type tape struct {
	net.Conn
	came bytes.Buffer
}

func (t *tape) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	t.came.Write(p[:n])
	return n, err
}

// establish makes a full handshake with crypto/tls and returns what is needed to
// resume it. The connection stays open.
func establish(t testing.TB, conn net.Conn, cfg *tls.Config) (*tls.Conn, Session) {
	t.Helper()
	var keys bytes.Buffer
	own := cfg.Clone()
	own.KeyLogWriter, own.SessionTicketsDisabled = &keys, true
	recorded := &tape{Conn: conn}
	full := tls.Client(recorded, own)
	if err := full.HandshakeContext(t.Context()); err != nil {
		t.Fatalf("full handshake: %v", err)
	}
	state := full.ConnectionState()
	stream := recorded.came.Bytes()
	size := messageHeader + int(stream[headerSize+2])<<8 + int(stream[headerSize+3])
	hello, ok := parseServerHello(stream[headerSize+messageHeader : headerSize+size])
	if !ok {
		t.Fatal("no ServerHello")
	}
	return full, Session{
		ID: bytes.Clone(hello.id), Secret: secretOf(t, keys.Bytes()), CipherSuite: state.CipherSuite,
		ExtendedMasterSecret: hello.find(extensionExtendedMasterSecret) != nil,
		PeerCertificates:     state.PeerCertificates, VerifiedChains: state.VerifiedChains,
	}
}

// secretOf is the master secret in a key log.
func secretOf(t testing.TB, log []byte) []byte {
	t.Helper()
	fields := bytes.Fields(log)
	if len(fields) != 3 {
		t.Fatalf("%d words of key log", len(fields))
	}
	secret, err := hex.DecodeString(string(fields[2]))
	if err != nil {
		t.Fatal(err)
	}
	return secret
}
