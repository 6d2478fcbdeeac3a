package session

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"sync/atomic"

	"golang.org/x/crypto/cryptobyte"
)

const (
	recordHeaderSize       = 5
	recordTypeLowest       = 20 // change_cipher_spec
	recordTypeHandshake    = 22
	recordTypeHighest      = 23 // application_data
	maxRecord              = 16<<10 + 2048
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

	done  atomic.Bool // the handshake has completed
	first firstRecord // of those that come since
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
// what it got, tickets included. So that it asks even when an answer and the
// server's close_notify come at once, it gets the first record alone.
func (s *helloSpy) Read(p []byte) (int, error) {
	done := s.done.Load()
	if done && s.first.whole() && !s.supply.read.Load() {
		s.supply.read.Store(true)
		s.pending.settle()
	}
	if done {
		p = s.first.limit(p)
	}
	n, err := s.Conn.Read(p)
	if err != nil && done {
		s.pending.settle() // it ended, or was closed beneath us
	}
	switch {
	case done:
		s.first.follow(p[:n])
	case s.listens && n > 0:
		s.listen(p[:n])
	}
	return n, err
}

// firstRecord follows the first record that is read after the handshake. Only
// the goroutine that reads uses it.
type firstRecord struct {
	header []byte
	rest   int // bytes that are still to come
	over   bool
}

// whole reports that all of the record has been handed on.
func (f *firstRecord) whole() bool { return f.over }

// limit shortens p so that no byte of the second record is read.
func (f *firstRecord) limit(p []byte) []byte {
	switch {
	case f.over:
		return p
	case len(f.header) < recordHeaderSize:
		return p[:min(len(p), recordHeaderSize-len(f.header))]
	}
	return p[:min(len(p), f.rest)]
}

func (f *firstRecord) follow(p []byte) {
	switch {
	case f.over || len(p) == 0:
		return
	case len(f.header) == recordHeaderSize:
		f.rest -= len(p)
		f.over = f.rest <= 0
		return
	}
	if f.header = append(f.header, p...); len(f.header) == recordHeaderSize {
		// What is no header is the end of a record that came with the handshake.
		f.rest = int(binary.BigEndian.Uint16(f.header[3:]))
		f.over = f.rest == 0 || f.rest > maxRecord || f.header[0] < recordTypeLowest || f.header[0] > recordTypeHighest
	}
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
