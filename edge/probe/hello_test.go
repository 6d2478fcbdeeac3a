package probe

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
)

// handshakeBytes makes a handshake and returns what both said.
func handshakeBytes(t *testing.T, client, server *tls.Config) (sent, got []byte, state tls.ConnectionState) {
	t.Helper()
	near, err := net.Dial("tcp", startRaw(t, server, func(conn *tls.Conn) { _, _ = io.Copy(io.Discard, conn) }))
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{Conn: near}
	tc := tls.Client(w, client)
	err = tc.Handshake()
	sent, got = w.stop()
	state = tc.ConnectionState()
	tc.Close()
	if err != nil {
		t.Fatal(err)
	}
	return sent, got, state
}

func TestHelloRetryRequest(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	client := &tls.Config{RootCAs: a.roots(), ServerName: "backend.test", CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP384}}
	server := &tls.Config{Certificates: []tls.Certificate{a.issue("x")}, CurvePreferences: []tls.CurveID{tls.CurveP384}}
	sent, got, _ := handshakeBytes(t, client, server)
	hello, ok := parseClientHello(sent)
	if !ok || hello.offered.ServerName != "backend.test" || hello.offered.Version != tls13 {
		t.Fatalf("ClientHello %v", hello.offered)
	}
	flight := parseServerFlight(got, hello.sessionID)
	if flight.answered == nil || !flight.answered.Retried || flight.answered.Version != tls13 || !flight.answered.Echoed {
		t.Errorf("ServerHello %v", flight.answered)
	}
}

func TestTicketOfTLS12(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	client := &tls.Config{RootCAs: a.roots(), ServerName: "backend.test", MaxVersion: tls.VersionTLS12,
		ClientSessionCache: tls.NewLRUClientSessionCache(1)}
	sent, got, _ := handshakeBytes(t, client, &tls.Config{Certificates: []tls.Certificate{a.issue("x")}})
	hello, _ := parseClientHello(sent)
	flight := parseServerFlight(got, hello.sessionID)
	if flight.tickets != 1 || flight.answered.Version != tls12 || !flight.answered.ExtendedMasterSecret {
		t.Errorf("%+v", flight)
	}
}

// TestFragments: records may be cut at any byte.
func TestFragments(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	client := &tls.Config{RootCAs: a.roots(), ServerName: "backend.test", NextProtos: []string{"h2"}}
	sent, got, _ := handshakeBytes(t, client, &tls.Config{Certificates: []tls.Certificate{a.issue("x")}})
	whole, _ := parseClientHello(sent)
	split, ok := parseClientHello(fragment(sent))
	if !ok || split.offered.String() != whole.offered.String() || !bytes.Equal(split.sessionID, whole.sessionID) {
		t.Errorf("ClientHello in fragments: %v, whole: %v", split.offered, whole.offered)
	}
	alert := []byte{recordAlert, 3, 3, 0, 2, 1, 112}
	flight := parseServerFlight(append(alert, fragment(got)...), whole.sessionID)
	if flight.answered == nil || flight.answered.Version != tls13 {
		t.Errorf("ServerHello in fragments: %v", flight.answered)
	}
	for i := range got {
		parseServerFlight(got[:i], nil)
	}
	for i := range sent {
		parseClientHello(sent[:i])
	}
}

// fragment puts each byte of the first record into a record of its own.
func fragment(stream []byte) []byte {
	size := int(stream[3])<<8 | int(stream[4])
	var out []byte
	for _, b := range stream[5 : 5+size] {
		out = append(out, stream[0], stream[1], stream[2], 0, 1, b)
	}
	return append(out, stream[5+size:]...)
}

func FuzzHellos(f *testing.F) {
	f.Add([]byte{22, 3, 3, 0, 4, 1, 0, 0, 0}, []byte("id"))
	f.Add([]byte{21, 3, 3, 0, 2, 1, 0, 22, 3, 3, 0, 4, 4, 0, 0, 0, 20, 3, 3, 0, 1, 1}, []byte{})
	f.Fuzz(func(t *testing.T, stream, id []byte) {
		if hello, ok := parseClientHello(stream); ok && hello.offered == nil {
			t.Fatal("a ClientHello without what it offers")
		}
		flight := parseServerFlight(stream, id)
		if flight.answered != nil && flight.answered.Echoed && !strings.EqualFold(flight.answered.SessionId, shortHash(id)) {
			t.Fatal("echoed, and yet another ID")
		}
	})
}

func FuzzKeepAliveHint(f *testing.F) {
	f.Add("timeout=5, max=100")
	f.Fuzz(func(t *testing.T, header string) {
		if seconds, requests := keepAliveHint(header); seconds < 0 || requests < 0 {
			t.Fatalf("%q: %d, %d", header, seconds, requests)
		}
	})
}
