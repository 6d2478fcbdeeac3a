package session

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
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

	records records     // what is read, followed until whole
	done    atomic.Bool // the handshake has completed
	whole   bool        // the first record that ended since has been handed on
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
// server's close_notify come at once, it gets the first record that ends after
// the handshake alone. The handshake's last read may have brought a part of it.
func (s *helloSpy) Read(p []byte) (int, error) {
	done := s.done.Load()
	switch {
	case s.whole && !s.supply.read.Load():
		s.supply.read.Store(true)
		s.pending.settle()
	case done && !s.whole:
		p = p[:min(len(p), s.records.left())]
	}
	n, err := s.Conn.Read(p)
	if err != nil && done && !passing(err) {
		s.pending.settle() // it ended, or was closed beneath us
	}
	if !s.whole && n > 0 {
		ended := s.records.follow(p[:n])
		s.whole = done && ended
	}
	if !done && s.listens && n > 0 {
		s.listen(p[:n])
	}
	return n, err
}

// passing reports whether an error of Read says only that nothing has come yet, as on
// an event loop. It allocates nothing, since most reads there end with one.
func passing(err error) bool { return os.IsTimeout(err) }

// records follows the records of a connection, whose headers are in the clear.
// Only the goroutine that reads uses it.
type records struct {
	header []byte // of the present one, as much of it as came
	rest   int    // bytes of the present one that are still to come
	lost   bool   // what came is not TLS
}

// left is how many bytes end the present record, or its header.
func (r *records) left() int {
	switch {
	case r.lost:
		return maxRecord
	case r.rest > 0:
		return r.rest
	}
	return recordHeaderSize - len(r.header)
}

// follow takes in bytes and reports whether they end with a record.
func (r *records) follow(p []byte) (ended bool) {
	for len(p) > 0 && !r.lost {
		n := min(len(p), r.left())
		if r.rest > 0 {
			r.rest -= n
		} else if r.header = append(r.header, p[:n]...); len(r.header) == recordHeaderSize {
			r.begin()
		}
		ended = r.rest == 0 && len(r.header) == recordHeaderSize
		if ended {
			r.header = r.header[:0]
		}
		p = p[n:]
	}
	return ended || r.lost
}

// begin reads a header that is complete.
func (r *records) begin() {
	r.rest = int(binary.BigEndian.Uint16(r.header[3:]))
	r.lost = r.rest > maxRecord || r.header[0] < recordTypeLowest || r.header[0] > recordTypeHighest
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
