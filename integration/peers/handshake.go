package peers

import (
	"bytes"

	"golang.org/x/crypto/cryptobyte"
)

// Record types, handshake messages and extensions (RFC 8446 sections 5.1, 4 and
// 4.2; RFC 5077).
const (
	recordChangeCipherSpec = 20
	recordAlert            = 21
	recordHandshake        = 22
	recordData             = 23

	messageClientHello = 1
	messageServerHello = 2
	messageCertificate = 11

	extensionSessionTicket     = 35
	extensionPreSharedKey      = 41
	extensionSupportedVersions = 43
)

// mechanism is what a handshake was.
type mechanism int

const (
	full mechanism = iota
	bySessionID
	byTicket
	byPSK
)

// handshake is what a connection shows of its handshake to whoever looks on.
type handshake struct {
	client, server direction
	begun          bool
}

// direction is what one side sends.
type direction struct {
	header  []byte // of the current record, while it is not whole
	kind    byte   // of the current record
	rest    int    // of its body, not seen yet
	plain   []byte // handshake messages, until changed or known
	changed bool   // ChangeCipherSpec was sent
	sealed  bool   // an encrypted handshake message was sent
	// notified says that the newest record looks like close_notify.
	notified bool
}

// maxPlain bounds what is kept of one side's messages.
const maxPlain = 64 << 10

// follow walks over records. In TLS 1.3 an alert is an encrypted record of 19
// bytes, level, description, type and tag, and Finished is a longer one.
func (d *direction) follow(data []byte) {
	const headerSize, sealedAlertSize = 5, 2 + 1 + 16
	for len(data) > 0 {
		if d.rest > 0 {
			n := min(d.rest, len(data))
			if d.kind == recordHandshake && !d.changed && len(d.plain)+n <= maxPlain {
				d.plain = append(d.plain, data[:n]...)
			}
			d.rest, data = d.rest-n, data[n:]
			continue
		}
		n := min(headerSize-len(d.header), len(data))
		d.header, data = append(d.header, data[:n]...), data[n:]
		if len(d.header) < headerSize {
			return
		}
		d.kind, d.rest = d.header[0], int(d.header[3])<<8|int(d.header[4])
		d.header = d.header[:0]
		d.notified = d.kind == recordAlert || d.kind == recordData && d.rest == sealedAlertSize
		switch {
		case d.kind == recordChangeCipherSpec:
			d.changed = true
		case d.kind == recordHandshake && d.changed, d.kind == recordData && d.rest > sealedAlertSize:
			d.sealed = true
		}
	}
}

// complete reports whether both sides have finished. It forgets what is no
// longer needed.
func (h *handshake) complete() bool {
	h.begun = h.begun || len(h.client.plain) > 0
	return h.client.sealed && h.server.sealed
}

// mechanism is what a complete handshake was: full when the server sent a
// certificate or, in TLS 1.3, which encrypts that, chose no pre-shared key.
func (h *handshake) mechanism() mechanism {
	serverHello := message(h.server.plain, messageServerHello)
	switch {
	case extension(serverHello, false, extensionSupportedVersions) != nil:
		if extension(serverHello, false, extensionPreSharedKey) != nil {
			return byPSK
		}
	case message(h.server.plain, messageCertificate) == nil:
		if len(extension(message(h.client.plain, messageClientHello), true, extensionSessionTicket)) > 0 {
			return byTicket
		}
		return bySessionID
	}
	return full
}

// message is the body of the first message of a kind, or nil. A
// HelloRetryRequest (RFC 8446 section 4.1.3) is not a ServerHello.
func message(plain []byte, kind uint8) []byte {
	retry := []byte("\xcf\x21\xad\x74\xe5\x9a\x61\x11\xbe\x1d\x8c\x02\x1e\x65\xb8\x91")
	for s := cryptobyte.String(plain); !s.Empty(); {
		var found uint8
		var body cryptobyte.String
		if !s.ReadUint8(&found) || !s.ReadUint24LengthPrefixed(&body) {
			return nil
		}
		if found == kind && (kind != messageServerHello || len(body) > 2 && !bytes.HasPrefix(body[2:], retry)) {
			return body
		}
	}
	return nil
}

// extension is the value of an extension of a ClientHello or ServerHello, or
// nil. An empty value is not nil.
func extension(hello []byte, client bool, kind uint16) []byte {
	s := cryptobyte.String(hello)
	var skipped cryptobyte.String
	if !s.Skip(2+32) || !s.ReadUint8LengthPrefixed(&skipped) {
		return nil
	}
	if client {
		if !s.ReadUint16LengthPrefixed(&skipped) || !s.ReadUint8LengthPrefixed(&skipped) {
			return nil
		}
	} else if !s.Skip(2 + 1) {
		return nil
	}
	var extensions cryptobyte.String
	if !s.ReadUint16LengthPrefixed(&extensions) {
		return nil
	}
	for !extensions.Empty() {
		var found uint16
		var value cryptobyte.String
		if !extensions.ReadUint16(&found) || !extensions.ReadUint16LengthPrefixed(&value) {
			return nil
		}
		if found == kind {
			return append([]byte{}, value...)
		}
	}
	return nil
}
