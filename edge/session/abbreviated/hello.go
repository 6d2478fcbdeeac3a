package abbreviated

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
)

// Handshake messages (RFC 5246 section 7.4).
const (
	messageHelloRequest     = 0
	messageClientHello      = 1
	messageServerHello      = 2
	messageNewSessionTicket = 4
	messageFinished         = 20

	messageHeader = 4
	randomSize    = 32
)

// Extensions.
const (
	extensionServerName           = 0      // RFC 6066 section 3
	extensionGroups               = 10     // RFC 8422 section 5.1.1
	extensionPointFormats         = 11     // RFC 8422 section 5.1.2
	extensionSignatureAlgorithms  = 13     // RFC 5246 section 7.4.1.4.1
	extensionALPN                 = 16     // RFC 7301
	extensionExtendedMasterSecret = 23     // RFC 7627
	extensionSessionTicket        = 35     // RFC 5077
	extensionCertSignatures       = 50     // RFC 8446 section 4.2.3
	extensionRenegotiationInfo    = 0xff01 // RFC 5746
)

// kept are the extensions of the full handshake's ClientHello that are sent
// again. Left out are session_ticket, which is what this package is about; those
// of TLS 1.3; status_request and signed_certificate_timestamp, which ask about a
// certificate that will not come; and all that are unknown here, since their
// answer could not be understood.
var kept = []uint16{
	extensionServerName, extensionGroups, extensionPointFormats, extensionSignatureAlgorithms,
	extensionALPN, extensionExtendedMasterSecret, extensionCertSignatures, extensionRenegotiationInfo,
}

// Hello is what a ClientHello offers: cipher suites and extensions, without
// session and random. It does not change.
type Hello struct {
	suites     []uint16 // without those of TLS 1.3
	extensions []extension

	serverName string
	protocols  []string
}

type extension struct {
	kind uint16
	data []byte
}

var errHello = errors.New("not a ClientHello")

// maxHello bounds a ClientHello, in bytes.
const maxHello = maxPlaintext

// ParseHello reads a ClientHello, as it was sent: the handshake message without
// record headers.
func ParseHello(message []byte) (Hello, error) {
	s := cryptobyte.String(message)
	var hello Hello
	var kind uint8
	var version uint16
	var body, id, ciphers, compression, extensions cryptobyte.String
	if len(message) > maxHello || !s.ReadUint8(&kind) || kind != messageClientHello ||
		!s.ReadUint24LengthPrefixed(&body) || !s.Empty() ||
		!body.ReadUint16(&version) || version != version12 || !body.Skip(randomSize) ||
		!body.ReadUint8LengthPrefixed(&id) || len(id) > maxIDSize ||
		!body.ReadUint16LengthPrefixed(&ciphers) || !body.ReadUint8LengthPrefixed(&compression) ||
		!body.ReadUint16LengthPrefixed(&extensions) || !body.Empty() {
		return Hello{}, errHello
	}
	for !ciphers.Empty() {
		var id uint16
		if !ciphers.ReadUint16(&id) {
			return Hello{}, errHello
		}
		if id>>8 != 0x13 { // TLS 1.3 (RFC 8446 appendix B.4)
			hello.suites = append(hello.suites, id)
		}
	}
	for !extensions.Empty() {
		var kind uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&data) ||
			hello.has(kind) || !hello.keep(kind, data) {
			return Hello{}, errHello
		}
	}
	return hello, nil
}

// keep adopts an extension, if it is one of those, and reports whether it is
// well formed.
func (h *Hello) keep(kind uint16, data cryptobyte.String) bool {
	if !slices.Contains(kept, kind) {
		return true
	}
	h.extensions = append(h.extensions, extension{kind, append([]byte(nil), data...)})
	var list cryptobyte.String
	switch kind {
	case extensionServerName:
		var form uint8
		var name cryptobyte.String
		if !data.ReadUint16LengthPrefixed(&list) || !data.Empty() || !list.ReadUint8(&form) || form != 0 ||
			!list.ReadUint16LengthPrefixed(&name) || !list.Empty() || name.Empty() {
			return false
		}
		h.serverName = string(name)
	case extensionALPN:
		if !data.ReadUint16LengthPrefixed(&list) || !data.Empty() || list.Empty() {
			return false
		}
		for !list.Empty() {
			var protocol cryptobyte.String
			if !list.ReadUint8LengthPrefixed(&protocol) || protocol.Empty() {
				return false
			}
			h.protocols = append(h.protocols, string(protocol))
		}
	case extensionExtendedMasterSecret:
		return data.Empty()
	case extensionRenegotiationInfo:
		return string(data) == "\x00" // the first handshake of a connection
	}
	return true
}

// HelloOf is the Hello of a full handshake with cfg. crypto/tls itself makes it:
// it is given a connection that only listens. So the ClientHello of a resumption
// follows from the configuration, as that of the full handshake did, and nothing
// of it needs to be kept with the session, or over restarts.
func HelloOf(cfg *tls.Config) (Hello, error) {
	own := cfg.Clone()
	own.MaxVersion = tls.VersionTLS12 // no key shares are made
	own.SessionTicketsDisabled, own.ClientSessionCache = true, nil
	own.KeyLogWriter, own.EncryptedClientHelloConfigList = nil, nil
	var heard listener
	err := tls.Client(&heard, own).Handshake()
	if len(heard.sent) <= headerSize {
		return Hello{}, err
	}
	return ParseHello(heard.sent[headerSize:])
}

// listener is a net.Conn that keeps what is written first.
type listener struct{ sent []byte }

func (l *listener) Write(p []byte) (int, error) {
	if l.sent == nil {
		l.sent = append([]byte(nil), p...)
	}
	return len(p), nil
}

func (l *listener) Read([]byte) (int, error)         { return 0, io.EOF }
func (l *listener) Close() error                     { return nil }
func (l *listener) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (l *listener) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (l *listener) SetDeadline(time.Time) error      { return nil }
func (l *listener) SetReadDeadline(time.Time) error  { return nil }
func (l *listener) SetWriteDeadline(time.Time) error { return nil }

// has reports whether an extension is offered.
func (h *Hello) has(kind uint16) bool {
	return slices.ContainsFunc(h.extensions, func(e extension) bool { return e.kind == kind })
}

// check reports what makes the Hello unfit for a session and a configuration.
func (h *Hello) check(s *Session, cfg *tls.Config) error {
	switch {
	case !slices.Contains(h.suites, s.CipherSuite):
		return errors.New("the session's cipher suite is not offered")
	case s.ExtendedMasterSecret && !h.has(extensionExtendedMasterSecret):
		return errors.New("extended_master_secret is not offered, and the session has it")
	case h.serverName != "" && !strings.EqualFold(h.serverName, strings.TrimRight(cfg.ServerName, ".")):
		return errors.New("the ClientHello was sent for another server name")
	case !slices.Equal(h.protocols, cfg.NextProtos):
		return errors.New("the ClientHello was sent for other protocols")
	}
	return nil
}

// message is the ClientHello that offers a session.
//
// TLS_FALLBACK_SCSV is not in it although it offers less than the configuration
// may allow: a client that resumes a session and offers that session's version
// must not send it (RFC 7507 section 4). What it guards against, an attacker who
// makes a server that could do better speak an old version, is seen by the
// sentinel in the ServerHello (RFC 8446 section 4.1.3), and ends the attempt.
func (h *Hello) message(id, random []byte) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddUint8(messageClientHello)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint16(version12)
		b.AddBytes(random)
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(id) })
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			for _, suite := range h.suites {
				b.AddUint16(suite)
			}
		})
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddUint8(0) }) // no compression
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			for _, e := range h.extensions {
				b.AddUint16(e.kind)
				b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(e.data) })
			}
		})
	})
	return b.Bytes()
}
