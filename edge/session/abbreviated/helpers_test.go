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
	fields := bytes.Fields(keys.Bytes())
	if state.Version != tls.VersionTLS12 || len(fields) != 3 {
		t.Fatalf("%s, %d words of key log", tls.VersionName(state.Version), len(fields))
	}
	secret, err := hex.DecodeString(string(fields[2]))
	if err != nil {
		t.Fatal(err)
	}
	stream := recorded.came.Bytes()
	size := messageHeader + int(stream[headerSize+2])<<8 + int(stream[headerSize+3])
	hello, ok := parseServerHello(stream[headerSize+messageHeader : headerSize+size])
	if !ok {
		t.Fatal("no ServerHello")
	}
	return full, Session{
		ID: bytes.Clone(hello.id), Secret: secret, CipherSuite: state.CipherSuite,
		ExtendedMasterSecret: hello.find(extensionExtendedMasterSecret) != nil,
		PeerCertificates:     state.PeerCertificates, VerifiedChains: state.VerifiedChains,
	}
}
