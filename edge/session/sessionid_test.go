package session

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/integration/process"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const sessionID = resealv1.Mechanism_MECHANISM_SESSION_ID

// The encoding of sessions and the reads of Rand belong to one release of Go:
// this is where a new one fails first.
func TestSelfCheck(t *testing.T) {
	if err := selfCheck(); err != nil {
		t.Fatal(err)
	}
	if !checkSessionIDs(slog.New(slog.DiscardHandler)) {
		t.Error("session IDs are off")
	}
}

// opensslServer runs `openssl s_server` with session IDs and without tickets.
func opensslServer(t *testing.T, args ...string) (address string, roots *x509.CertPool) {
	t.Helper()
	certificate, roots := issue(t, time.Now().Add(time.Hour))
	return startOpenSSL(t, certificate, nil, args...), roots
}

// startOpenSSL runs `openssl s_server` with a certificate and its chain.
func startOpenSSL(t *testing.T, certificate tls.Certificate, environment []string, args ...string) (address string) {
	t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: run integration/setup.sh")
	}
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var chain []byte
	for _, der := range certificate.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	file := filepath.Join(t.TempDir(), "server.pem")
	if err := os.WriteFile(file, append(chain, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...), 0o600); err != nil {
		t.Fatal(err)
	}
	address, err = process.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(openssl, append([]string{"s_server", "-accept", address, "-cert", file, "-cert_chain", file, "-key", file, "-www", "-quiet"}, args...)...)
	cmd.Env = append(os.Environ(), environment...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for range 200 {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return address
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("openssl s_server does not listen")
	return ""
}

// visit makes one connection with a request, as a backend leg does.
func visit(t *testing.T, store *Store, address string, identity exchange.Identity, cfg *tls.Config) (resealv1.Mechanism, resealv1.MissReason, error) {
	t.Helper()
	attempt, err := store.Reserve(t.Context(), identity, exchange.Terms{Wait: patience, TicketWait: patience})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	tc, mechanism, miss, err := attempt.Handshake(t.Context(), conn, cfg)
	var redo *ResumptionError
	if errors.As(err, &redo) {
		again, dialErr := net.Dial("tcp", address)
		if dialErr != nil {
			t.Fatal(dialErr)
		}
		defer again.Close()
		tc, mechanism, miss, err = redo.FullHandshake(t.Context(), again)
	}
	if err != nil {
		return 0, 0, err
	}
	fmt.Fprint(tc, "GET / HTTP/1.0\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(tc), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	tc.Close()
	tc.NetConn().Close() // whoever waits for its session learns of it
	return mechanism, miss, nil
}

func TestSessionIDsOfOpenSSL(t *testing.T) {
	address, roots := opensslServer(t, "-no_ticket", "-tls1_2")
	for name, cfg := range map[string]*tls.Config{
		"TLS 1.2 only":     {RootCAs: roots, ServerName: "example.test", MaxVersion: tls.VersionTLS12},
		"TLS 1.3 offered":  {RootCAs: roots, ServerName: "example.test"},
		"without checking": {ServerName: "example.test", InsecureSkipVerify: true},
	} {
		t.Run(name, func(t *testing.T) {
			store := New(Config{})
			for i := range 5 {
				mechanism, miss, err := visit(t, store, address, "a", cfg)
				want := []any{sessionID, resealv1.MissReason(0)}
				if i == 0 {
					want = []any{resealv1.Mechanism(0), noSession}
				}
				if err != nil || mechanism != want[0] || miss != want[1] {
					t.Fatalf("connection %d: %v, %v, %v; want %v", i, mechanism, miss, err, want)
				}
			}
		})
	}
}

// A server that gives tickets is resumed by ticket, even when its ServerHello has
// a session ID.
func TestTicketWinsOverSessionID(t *testing.T) {
	address, roots := opensslServer(t, "-tls1_2")
	store := New(Config{})
	cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
	for i := range 3 {
		mechanism, _, err := visit(t, store, address, "a", cfg)
		if err != nil || i > 0 && mechanism != ticket {
			t.Fatalf("connection %d: %v, %v", i, mechanism, err)
		}
	}
}

// A server that has forgotten the session answers with a full handshake, and
// the new session is used from then on.
func TestSessionIDDeclined(t *testing.T) {
	address, roots := opensslServer(t, "-no_ticket", "-tls1_2", "-no_cache")
	store := New(Config{})
	cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
	seen := map[resealv1.MissReason]int{}
	for range 4 {
		mechanism, miss, err := visit(t, store, address, "a", cfg)
		if err != nil || mechanism != 0 {
			t.Fatalf("%v, %v", mechanism, err)
		}
		seen[miss]++
	}
	if seen[noSession]+seen[declined]+seen[unsupported] != 4 {
		t.Errorf("reasons %v", seen)
	}
}

// The ID is on the wire before crypto/tls decides about the session. A session
// that it would refuse must not be armed: the server would resume it, and the
// handshake would be aborted.
func TestSessionIDNotArmedWhenRefused(t *testing.T) {
	address, roots := opensslServer(t, "-no_ticket", "-tls1_2")
	_, foreign := issue(t, time.Now().Add(time.Hour))
	good := &tls.Config{RootCAs: roots, ServerName: "example.test"}
	for name, test := range map[string]struct {
		first, second *tls.Config
		miss          resealv1.MissReason
		fails         bool
	}{
		"first without checking": {&tls.Config{InsecureSkipVerify: true, ServerName: "example.test"}, good, policy, false},
		"other suites": {good, &tls.Config{RootCAs: roots, ServerName: "example.test",
			CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384}, MaxVersion: tls.VersionTLS12}, policy, false},
		"other roots": {good, &tls.Config{RootCAs: foreign, ServerName: "example.test"}, 0, true},
		"other name":  {good, &tls.Config{RootCAs: roots, ServerName: "other.test"}, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			store := New(Config{})
			test.first.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}
			if _, _, err := visit(t, store, address, "a", test.first); err != nil {
				t.Fatal(err)
			}
			mechanism, miss, err := visit(t, store, address, "a", test.second)
			var resumption *ResumptionError
			if errors.As(err, &resumption) {
				t.Fatalf("the session was armed: %v", err)
			}
			if (err != nil) != test.fails || mechanism != 0 || miss != test.miss {
				t.Errorf("%v, %v, %v; want %v", mechanism, miss, err, test.miss)
			}
		})
	}
}

// serverHelloBytes is a ServerHello in one record.
func serverHelloBytes(id []byte, extensions ...uint16) []byte {
	body := append([]byte{3, 3}, make([]byte, 32)...)
	body = append(body, byte(len(id)))
	body = append(body, id...)
	body = append(body, 0xc0, 0x2b, 0)
	var list []byte
	for _, extension := range extensions {
		list = append(binary.BigEndian.AppendUint16(list, extension), 0, 0)
	}
	body = append(binary.BigEndian.AppendUint16(body, uint16(len(list))), list...)
	message := append([]byte{handshakeServerHello, 0, 0, byte(len(body))}, body...)
	return tlsRecord(recordTypeHandshake, message)
}

func tlsRecord(kind byte, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{kind, 3, 3}, uint16(len(payload))), payload...)
}

func TestParseServerHello(t *testing.T) {
	id := bytes.Repeat([]byte{7}, 32)
	whole := serverHelloBytes(id, extensionExtendedMasterSecret)
	payload := whole[5:]
	fragments := append(tlsRecord(recordTypeHandshake, payload[:3]), tlsRecord(recordTypeHandshake, payload[3:40])...)
	fragments = append(fragments, tlsRecord(recordTypeHandshake, payload[40:])...)
	for name, stream := range map[string][]byte{
		"one record":           whole,
		"after an alert":       append(tlsRecord(recordTypeAlert, []byte{1, 112}), whole...),
		"fragments":            fragments,
		"with the next flight": append(slices.Clone(whole), tlsRecord(recordTypeHandshake, []byte{11, 0, 0, 0})...),
		"coalesced":            tlsRecord(recordTypeHandshake, append(slices.Clone(payload), 11, 0, 0, 0)),
	} {
		hello, err := parseServerHello(stream)
		if err != nil || !bytes.Equal(hello.sessionID, id) || !hello.extendedMasterSecret {
			t.Errorf("%s: %+v, %v", name, hello, err)
		}
	}
	for n := range len(whole) {
		if _, err := parseServerHello(whole[:n]); !errors.Is(err, errShort) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
	for name, stream := range map[string][]byte{
		"another message":     tlsRecord(recordTypeHandshake, []byte{11, 0, 0, 0}),
		"application data":    tlsRecord(23, []byte("GET /")),
		"plain HTTP":          []byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"session ID too long": serverHelloBytes(bytes.Repeat([]byte{7}, 33)),
	} {
		if _, err := parseServerHello(stream); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzParseServerHello(f *testing.F) {
	f.Add(serverHelloBytes(bytes.Repeat([]byte{7}, 32), extensionExtendedMasterSecret))
	f.Add(append(tlsRecord(recordTypeAlert, []byte{1, 112}), serverHelloBytes(nil)...))
	f.Fuzz(func(t *testing.T, stream []byte) {
		hello, err := parseServerHello(stream)
		if err == nil && len(hello.sessionID) > 32 {
			t.Errorf("a session ID of %d bytes", len(hello.sessionID))
		}
	})
}

func TestSecretLog(t *testing.T) {
	var log secretLog
	for _, line := range []string{"CLIENT_TRAFFIC_SECRET_0 aa bb\n", "CLIENT_RANDOM 00ff 0102\n"} {
		if _, err := log.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	secret := log.secret
	if !bytes.Equal(secret, []byte{1, 2}) {
		t.Fatalf("secret %x", secret)
	}
	log.wipe()
	if log.secret != nil || !bytes.Equal(secret, []byte{0, 0}) {
		t.Errorf("the secret is not wiped: %x", secret)
	}
	for _, line := range []string{"CLIENT_RANDOM 00ff\n", "CLIENT_RANDOM 00ff xx\n"} {
		if _, err := log.Write([]byte(line)); err == nil {
			t.Errorf("%q: no error", line)
		}
	}
}

// An empty ticket is none: the session's ID is kept in its place.
func TestEmptyTicketIsNone(t *testing.T) {
	first := checkRun{log: &secretLog{}}
	certificate, roots := issue(t, time.Now().Add(time.Hour))
	client := &tls.Config{RootCAs: roots, ServerName: "example.test", MaxVersion: tls.VersionTLS12}
	if err := first.handshake(client, &tls.Config{Certificates: []tls.Certificate{certificate}}); err != nil {
		t.Fatal(err)
	}
	_, session, err := first.given.ResumptionState()
	if err != nil {
		t.Fatal(err)
	}
	empty, err := tls.NewResumptionState(nil, session)
	if err != nil {
		t.Fatal(err)
	}
	cache := &connCache{store: New(Config{}), supply: &supply{}}
	cache.Put("", empty)
	if cache.supply.given.Load() || len(cache.early) != 0 {
		t.Error("the empty ticket was taken for a session")
	}
}

// Without session IDs a server that has nothing else costs full handshakes, and
// nobody waits for the others'.
func TestSessionIDsOff(t *testing.T) {
	address, roots := opensslServer(t, "-no_ticket", "-tls1_2")
	cfg := &tls.Config{RootCAs: roots, ServerName: "example.test"}
	store := New(Config{})
	if _, miss, err := visit(t, store, address, "a", cfg); err != nil || miss != noSession {
		t.Fatal(miss, err)
	}
	for range 3 {
		attempt, err := store.Reserve(t.Context(), "a", exchange.Terms{Wait: patience, SessionIDsOff: true})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		_, _, miss, err := attempt.Handshake(t.Context(), conn, cfg)
		conn.Close()
		if err != nil || miss != unsupported {
			t.Fatal(miss, err)
		}
	}
	// Another pool of the same identity may use them.
	for _, want := range []resealv1.Mechanism{0, sessionID} {
		if mechanism, _, err := visit(t, store, address, "a", cfg); err != nil || mechanism != want {
			t.Fatal(mechanism, err)
		}
	}
}
