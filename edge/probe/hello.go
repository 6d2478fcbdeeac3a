package probe

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"time"

	"golang.org/x/crypto/cryptobyte"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Record types, handshake messages and extensions (RFC 8446 sections 5.1, 4 and
// 4.2; RFC 5077; RFC 7627).
const (
	recordChangeCipherSpec = 20
	recordAlert            = 21
	recordHandshake        = 22

	messageClientHello      = 1
	messageServerHello      = 2
	messageNewSessionTicket = 4

	extensionServerName           = 0
	extensionALPN                 = 16
	extensionExtendedMasterSecret = 23
	extensionSessionTicket        = 35
	extensionPreSharedKey         = 41
	extensionSupportedVersions    = 43
)

// helloRetryRequest is the random of a ServerHello that is not one (RFC 8446
// section 4.1.3).
const helloRetryRequest = "\xcf\x21\xad\x74\xe5\x9a\x61\x11\xbe\x1d\x8c\x02\x1e\x65\xb8\x91" +
	"\xc2\xa2\x11\x16\x7a\xbb\x8c\x5e\x07\x9e\x09\xe2\xc8\xa8\x33\x9c"

// shortHash stands for an ID or a ticket: enough to tell them apart and of no
// use to anybody.
func shortHash(data []byte) string {
	if len(data) == 0 {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:4])
}

// message is a handshake message that was sent in the clear.
type message struct {
	kind uint8
	body cryptobyte.String
}

// plainMessages are the handshake messages of one direction until it is
// encrypted. What is damaged or cut off ends them.
func plainMessages(stream []byte) []message {
	s := cryptobyte.String(stream)
	var joined []byte
	var messages []message
	for {
		var kind uint8
		var version uint16
		var payload cryptobyte.String
		if !s.ReadUint8(&kind) || !s.ReadUint16(&version) || !s.ReadUint16LengthPrefixed(&payload) {
			return messages
		}
		switch kind {
		case recordAlert:
			continue
		case recordChangeCipherSpec:
			// In TLS 1.2 all that follows is encrypted. In TLS 1.3 it means
			// nothing, and stands between a HelloRetryRequest and the ServerHello.
			if n := len(messages); n == 0 || !isRetryRequest(messages[n-1]) {
				return messages
			}
			continue
		case recordHandshake:
		default:
			return messages
		}
		joined = append(joined, payload...)
		for {
			rest := cryptobyte.String(joined)
			var m message
			if !rest.ReadUint8(&m.kind) || !rest.ReadUint24LengthPrefixed(&m.body) {
				break
			}
			messages = append(messages, m)
			joined = rest
		}
	}
}

func isRetryRequest(m message) bool {
	return m.kind == messageServerHello && len(m.body) > 34 && string(m.body[2:34]) == helloRetryRequest
}

// clientHello is what a ClientHello offers, and its session ID.
type clientHello struct {
	offered   *resealv1.ProbeClientHello
	sessionID []byte
}

// parseClientHello reads the first ClientHello of what a client sent.
func parseClientHello(stream []byte) (clientHello, bool) {
	var hello clientHello
	messages := plainMessages(stream)
	if len(messages) == 0 || messages[0].kind != messageClientHello {
		return hello, false
	}
	body := messages[0].body
	var version uint16
	var id, suites, compression, extensions cryptobyte.String
	if !body.ReadUint16(&version) || !body.Skip(32) || !body.ReadUint8LengthPrefixed(&id) ||
		!body.ReadUint16LengthPrefixed(&suites) || !body.ReadUint8LengthPrefixed(&compression) {
		return hello, false
	}
	hello.sessionID = bytes.Clone(id)
	hello.offered = &resealv1.ProbeClientHello{SessionId: shortHash(id), WithoutTicketExtension: true}
	newest := version
	if !body.Empty() && !body.ReadUint16LengthPrefixed(&extensions) {
		return hello, false
	}
	for !extensions.Empty() {
		var extension uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&extension) || !extensions.ReadUint16LengthPrefixed(&data) {
			return hello, false
		}
		newest = max(newest, readClientExtension(hello.offered, extension, data))
	}
	hello.offered.Version = versionOf(newest)
	if newest > tls.VersionTLS12 {
		hello.offered.WithoutTicketExtension = false
	}
	return hello, true
}

// readClientExtension notes an extension and returns the newest version that it
// offers, if it offers any.
func readClientExtension(offered *resealv1.ProbeClientHello, extension uint16, data cryptobyte.String) (newest uint16) {
	var list, item cryptobyte.String
	switch extension {
	case extensionSessionTicket:
		offered.Ticket, offered.WithoutTicketExtension = shortHash(data), false
	case extensionPreSharedKey:
		if data.ReadUint16LengthPrefixed(&list) && list.ReadUint16LengthPrefixed(&item) {
			offered.Psk = shortHash(item)
		}
	case extensionServerName:
		var kind uint8
		if data.ReadUint16LengthPrefixed(&list) && list.ReadUint8(&kind) && list.ReadUint16LengthPrefixed(&item) {
			offered.ServerName = text(item)
		}
	case extensionALPN:
		if !data.ReadUint16LengthPrefixed(&list) {
			return 0
		}
		for list.ReadUint8LengthPrefixed(&item) {
			offered.Alpn = append(offered.Alpn, text(item))
		}
	case extensionSupportedVersions:
		var version uint16
		if !data.ReadUint8LengthPrefixed(&list) {
			return 0
		}
		for list.ReadUint16(&version) {
			if version <= tls.VersionTLS13 { // others are drafts and GREASE
				newest = max(newest, version)
			}
		}
	}
	return newest
}

// text makes valid UTF-8 of what should be ASCII.
func text(data []byte) string { return string(bytes.ToValidUTF8(data, []byte("?"))) }

// serverFlight is what a server answered in the clear.
type serverFlight struct {
	answered  *resealv1.ProbeServerHello // nil: no ServerHello
	sessionID []byte
	// tickets are those of TLS 1.2, which come in the clear.
	tickets      int
	lifetimeHint time.Duration
	emptyTicket  bool
}

// parseServerFlight reads what a server sent in answer to a hello whose session
// ID was offered.
func parseServerFlight(stream, offered []byte) serverFlight {
	var flight serverFlight
	retried := false
	for _, m := range plainMessages(stream) {
		switch {
		case isRetryRequest(m):
			retried = true
		case m.kind == messageServerHello && flight.answered == nil:
			flight.readServerHello(m.body, offered)
		case m.kind == messageNewSessionTicket:
			flight.readTicket(m.body)
		}
	}
	if flight.answered != nil {
		flight.answered.Retried = retried
	}
	return flight
}

// readTicket reads a NewSessionTicket of TLS 1.2 (RFC 5077 section 3.3).
func (f *serverFlight) readTicket(body cryptobyte.String) {
	var seconds uint32
	var ticket cryptobyte.String
	switch {
	case !body.ReadUint32(&seconds) || !body.ReadUint16LengthPrefixed(&ticket):
	case ticket.Empty():
		f.emptyTicket = true
	default:
		f.tickets++
		f.lifetimeHint = time.Duration(seconds) * time.Second
	}
}

func (f *serverFlight) readServerHello(body cryptobyte.String, offered []byte) {
	var version, suite uint16
	var id, extensions cryptobyte.String
	if !body.ReadUint16(&version) || !body.Skip(32) || !body.ReadUint8LengthPrefixed(&id) ||
		!body.ReadUint16(&suite) || !body.Skip(1) {
		return
	}
	answered := &resealv1.ProbeServerHello{
		SessionId:   shortHash(id),
		Echoed:      len(id) > 0 && bytes.Equal(id, offered),
		CipherSuite: tls.CipherSuiteName(suite),
	}
	if !body.Empty() && !body.ReadUint16LengthPrefixed(&extensions) {
		return
	}
	for !extensions.Empty() {
		var extension uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&extension) || !extensions.ReadUint16LengthPrefixed(&data) {
			return
		}
		switch extension {
		case extensionSupportedVersions:
			data.ReadUint16(&version)
		case extensionPreSharedKey:
			answered.Psk = true
		case extensionExtendedMasterSecret:
			answered.ExtendedMasterSecret = true
		}
	}
	answered.Version = versionOf(version)
	f.answered, f.sessionID = answered, bytes.Clone(id)
}
