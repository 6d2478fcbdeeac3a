package session

import (
	"bytes"
	"errors"
	"net"
	"sync/atomic"

	"golang.org/x/crypto/cryptobyte"
)

const (
	recordTypeHandshake    = 22
	handshakeClientHello   = 1
	extensionSessionTicket = 35 // RFC 5077
	extensionPreSharedKey  = 41 // RFC 8446 section 4.2.11
)

// helloSpy looks at the ClientHello as it goes out, since crypto/tls does not
// tell whether it offered the session that it got. It also notes whether
// anything was read after the handshake.
type helloSpy struct {
	net.Conn

	supply  *supply
	pending *pending
	// The following are written only by the goroutine that makes the handshake.
	armed   []byte // session ID that the ClientHello should carry, or nil
	seen    bool
	offered bool
	answer  []byte // the server's first bytes, while they are wanted
	listens bool   // whether they are wanted
	hello   serverHello

	done atomic.Bool // the handshake has completed
	came atomic.Bool // something was read since
}

// Write implements net.Conn.
func (s *helloSpy) Write(p []byte) (int, error) {
	if !s.seen && !s.done.Load() {
		s.seen = true
		s.offered = offersSession(p, s.armed)
	}
	return s.Conn.Write(p)
}

// Read implements net.Conn. crypto/tls asks for more only when it has processed
// what it got, tickets included.
func (s *helloSpy) Read(p []byte) (int, error) {
	if s.came.Load() && !s.supply.read.Load() {
		s.supply.read.Store(true)
		s.pending.settle()
	}
	n, err := s.Conn.Read(p)
	if err != nil && s.done.Load() {
		s.pending.settle() // it ended, or was closed beneath us
	}
	if s.listens && n > 0 && !s.done.Load() {
		s.listen(p[:n])
	}
	if n > 0 && s.done.Load() && !s.came.Load() {
		s.came.Store(true)
	}
	return n, err
}

// Close implements net.Conn.
func (s *helloSpy) Close() error {
	s.pending.settle()
	return s.Conn.Close()
}

// listen collects the server's first bytes until they hold a ServerHello.
func (s *helloSpy) listen(p []byte) {
	s.answer = append(s.answer, p...)
	hello, err := parseServerHello(s.answer)
	if err == nil {
		s.hello = hello
	}
	if !errors.Is(err, errShort) || len(s.answer) > maxServerHello {
		s.listens, s.answer = false, nil
	}
}

// offersSession reports whether records, the first bytes that a client sends,
// hold a ClientHello with a ticket, a pre-shared key or the session ID armed.
func offersSession(records, armed []byte) bool {
	hello, ok := handshakeBytes(records)
	if !ok {
		return false
	}
	s := cryptobyte.String(hello)
	var kind uint8
	var body, sessionID, suites, compression, extensions cryptobyte.String
	if !s.ReadUint8(&kind) || kind != handshakeClientHello || !s.ReadUint24LengthPrefixed(&body) ||
		!body.Skip(2+32) || !body.ReadUint8LengthPrefixed(&sessionID) ||
		!body.ReadUint16LengthPrefixed(&suites) || !body.ReadUint8LengthPrefixed(&compression) ||
		!body.ReadUint16LengthPrefixed(&extensions) {
		return false
	}
	if len(armed) > 0 && bytes.Equal(sessionID, armed) {
		return true
	}
	for !extensions.Empty() {
		var extension uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&extension) || !extensions.ReadUint16LengthPrefixed(&data) {
			return false
		}
		switch {
		case extension == extensionPreSharedKey:
			return true
		case extension == extensionSessionTicket && !data.Empty():
			return true
		}
	}
	return false
}

// handshakeBytes joins the payloads of handshake records.
func handshakeBytes(records []byte) ([]byte, bool) {
	s := cryptobyte.String(records)
	var joined []byte
	for !s.Empty() {
		var kind uint8
		var version uint16
		var payload cryptobyte.String
		if !s.ReadUint8(&kind) || !s.ReadUint16(&version) || !s.ReadUint16LengthPrefixed(&payload) {
			return nil, false
		}
		if kind != recordTypeHandshake {
			return nil, false
		}
		if joined == nil && s.Empty() {
			return payload, true // the usual case needs no copy
		}
		joined = append(joined, payload...)
	}
	return joined, joined != nil
}
