package loop

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/session/abbreviated"
)

// opensslServer is a server that returns each line reversed, and resumes TLS 1.2 by
// session ID. It returns its address.
func opensslServer(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	key, err := x509.MarshalPKCS8PrivateKey(certificate().PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "server.pem")
	all := append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate().Certificate[0]})...)
	if err := os.WriteFile(file, all, 0o600); err != nil {
		t.Fatal(err)
	}
	command := exec.Command("openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", file, "-rev", "-no_ticket")
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	t.Cleanup(func() {
		_ = command.Process.Kill()
		for lines.Scan() {
		}
		_ = command.Wait()
	})
	for lines.Scan() {
		if address, ok := strings.CutPrefix(lines.Text(), "ACCEPT "); ok {
			return address
		}
	}
	t.Fatal("openssl s_server does not accept")
	return ""
}

// record is a net.Conn that keeps what it reads.
type record struct {
	net.Conn
	read bytes.Buffer
}

func (r *record) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.read.Write(p[:n])
	return n, err
}

// sessionByID makes a full handshake and returns its session.
func sessionByID(t *testing.T, address string) abbreviated.Session {
	t.Helper()
	var log bytes.Buffer
	cfg := clientConfig(tls.VersionTLS12)
	cfg.KeyLogWriter, cfg.SessionTicketsDisabled = &log, true
	tcp, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	r := &record{Conn: tcp}
	client := tls.Client(r, cfg)
	defer client.Close()
	roundTripReversed(t, client)
	secret, err := hex.DecodeString(strings.Fields(log.String())[2])
	if err != nil {
		t.Fatal(err)
	}
	const idAt = recordHeader + handshakeHeaderSize + 2 + 32 // of a ServerHello
	hello := r.read.Bytes()
	return abbreviated.Session{
		ID: hello[idAt+1 : idAt+1+int(hello[idAt])], Secret: secret,
		CipherSuite: client.ConnectionState().CipherSuite, ExtendedMasterSecret: true,
	}
}

func roundTripReversed(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := c.Write([]byte("abc\n")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := bufio.NewReader(c).Read(got); err != nil || string(got) != "cba\n" {
		t.Fatalf("%q came back, %v", got, err)
	}
}

// TestClients: clients of both versions of crypto/tls, and the one for abbreviated
// handshakes alone, run on a loop, as connections to backends will. A TLS connection
// can also join in place of a socket.
func TestClients(t *testing.T) {
	pollers(t, func(t *testing.T, cfg Config) {
		address := opensslServer(t)
		g := start(t, cfg)
		session := sessionByID(t, address)
		for name, client := range map[string]func(conn net.Conn) TLSConn{
			"TLS 1.2":              func(conn net.Conn) TLSConn { return tls.Client(conn, clientConfig(tls.VersionTLS12)) },
			"TLS 1.3":              func(conn net.Conn) TLSConn { return tls.Client(conn, clientConfig(tls.VersionTLS13)) },
			"in place of a socket": nil, // as a client that may renegotiate must be
			"abbreviated": func(conn net.Conn) TLSConn {
				return abbreviated.Client(conn, abbreviated.Config{Session: session, Config: clientConfig(tls.VersionTLS12)})
			},
		} {
			t.Run(name, func(t *testing.T) {
				tcp, err := net.Dial("tcp", address)
				if err != nil {
					t.Fatal(err)
				}
				var wire *Wire
				var tc TLSConn
				if client == nil {
					wire = NewWire(tls.Client(tcp, clientConfig(tls.VersionTLS12)))
				} else {
					wire = NewWire(tcp)
					tc = client(wire)
					if err := tc.(interface{ Handshake() error }).Handshake(); err != nil {
						t.Fatal(err)
					}
				}
				const rounds = 50
				line := strings.Repeat("0123456789", 1500) + "\n" // less than a record
				var got strings.Builder
				ended := make(chan Ending, 1)
				n := 0
				if err := g.Next().Join(wire, tc, &funcs{
					open: func(c *Conn) { c.Write([]byte(line)) },
					data: func(c *Conn, p []byte) {
						got.Write(p)
						if got.Len() < len(line) {
							return
						}
						if want := strings.Repeat("9876543210", 1500) + "\n"; got.String() != want {
							t.Errorf("%d bytes came back, not those that were sent reversed", got.Len())
						}
						got.Reset()
						if n++; n == rounds {
							c.Close(Farewell{Within: patience, FIN: true})
							return
						}
						c.Write([]byte(line[:1]))
						c.Write([]byte(line[1:]))
					},
					closed: func(c *Conn, end Ending) {
						if tc != nil && c.Stats().Records < rounds+1 {
							t.Errorf("%d records for %d messages", c.Stats().Records, rounds)
						}
						ended <- end
					},
				}); err != nil {
					t.Fatal(err)
				}
				end := receive(t, ended, "Closed")
				if end.Notified != (tc != nil) || !end.FIN || end.ByPeer || end.Err != nil || n != rounds {
					t.Errorf("after %d messages it ended with %+v", n, end)
				}
			})
		}
	})
}
