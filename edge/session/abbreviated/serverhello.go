package abbreviated

import (
	"bytes"
	"crypto/tls"
	"errors"
	"slices"

	"golang.org/x/crypto/cryptobyte"
)

// serverHello is what a ServerHello says (RFC 5246 section 7.4.1.3).
type serverHello struct {
	version     uint16
	random      []byte
	id          []byte
	suite       uint16
	compression uint8
	extensions  []extension
}

// parseServerHello reads the body of the message, which it keeps.
func parseServerHello(body []byte) (serverHello, bool) {
	var hello serverHello
	var id, extensions cryptobyte.String
	s := cryptobyte.String(body)
	if !s.ReadUint16(&hello.version) || !s.ReadBytes(&hello.random, randomSize) ||
		!s.ReadUint8LengthPrefixed(&id) || len(id) > maxIDSize ||
		!s.ReadUint16(&hello.suite) || !s.ReadUint8(&hello.compression) {
		return hello, false
	}
	hello.id = id
	if s.Empty() {
		return hello, true
	}
	if !s.ReadUint16LengthPrefixed(&extensions) || !s.Empty() {
		return hello, false
	}
	for !extensions.Empty() {
		var kind uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&data) || hello.find(kind) != nil {
			return hello, false
		}
		hello.extensions = append(hello.extensions, extension{kind, data})
	}
	return hello, true
}

func (h *serverHello) find(kind uint16) *extension {
	i := slices.IndexFunc(h.extensions, func(e extension) bool { return e.kind == kind })
	if i < 0 {
		return nil
	}
	return &h.extensions[i]
}

// The last bytes of the random of a server that could speak more than it does
// (RFC 8446 section 4.1.3).
const (
	couldSpeakTLS13 = "DOWNGRD\x01"
	couldSpeakTLS12 = "DOWNGRD\x00"
)

// downgraded reports whether the server could speak a newer version.
func (h *serverHello) downgraded() bool {
	last := string(h.random[randomSize-len(couldSpeakTLS13):])
	return last == couldSpeakTLS13 || last == couldSpeakTLS12
}

// refusal is an answer that does not resume the session: the alert for it and
// what is wrong.
type refusal struct {
	alert tls.AlertError
	err   error
}

func refuse(alert tls.AlertError, why string) *refusal { return &refusal{alert, errors.New(why)} }

// declined is the refusal of an answer that is in order, but full. It breaks no
// rule, so the attempt is cancelled and not failed.
var declined = &refusal{alertUserCanceled, ErrDeclined}

// judge checks a ServerHello against what was offered. nil means that the
// session is resumed; protocol is the one chosen by ALPN.
func (c *Config) judge(answer *serverHello) (protocol string, _ *refusal) {
	switch {
	case answer.version != version12:
		return "", &refusal{alertProtocolVersion, ErrVersionChanged}
	case c.allowsTLS13() && answer.downgraded():
		return "", &refusal{alertIllegalParameter, ErrVersionChanged}
	case !bytes.Equal(answer.id, c.Session.ID):
		return "", declined
	case answer.suite != c.Session.CipherSuite:
		return "", refuse(alertIllegalParameter, "the server resumed the session with another cipher suite")
	case answer.compression != 0:
		return "", refuse(alertIllegalParameter, "the server chose compression")
	}
	for _, e := range answer.extensions {
		// Nothing unasked (RFC 5246 section 7.4.1.4); a server never answers
		// signature_algorithms (section 7.4.1.4.1).
		if !c.Hello.has(e.kind) || e.kind == extensionSignatureAlgorithms || e.kind == extensionCertSignatures {
			return "", refuse(alertUnsupportedExtension, "the server sent an extension that was not asked for")
		}
	}
	// RFC 7627 section 5.3.
	if (answer.find(extensionExtendedMasterSecret) != nil) != c.Session.ExtendedMasterSecret {
		return "", refuse(alertHandshakeFailure, "the server resumed the session with another use of extended_master_secret")
	}
	for _, e := range answer.extensions {
		if refused := c.judgeExtension(e, &protocol); refused != nil {
			return "", refused
		}
	}
	return protocol, nil
}

func (c *Config) judgeExtension(e extension, protocol *string) *refusal {
	data := cryptobyte.String(e.data)
	var list, item cryptobyte.String
	switch e.kind {
	case extensionExtendedMasterSecret, extensionServerName:
		if !data.Empty() {
			return refuse(alertDecodeError, "an extension that must be empty is not")
		}
	case extensionRenegotiationInfo:
		// RFC 5746 section 3.4: this is the first handshake of the connection.
		if !data.ReadUint8LengthPrefixed(&list) || !data.Empty() {
			return refuse(alertDecodeError, "malformed renegotiation_info")
		}
		if !list.Empty() {
			return refuse(alertHandshakeFailure, "renegotiation_info of another handshake")
		}
	case extensionPointFormats:
		if !data.ReadUint8LengthPrefixed(&list) || !data.Empty() || list.Empty() {
			return refuse(alertDecodeError, "malformed ec_point_formats")
		}
		if !bytes.Contains(list, []byte{0}) { // RFC 8422 section 5.1.2
			return refuse(alertIllegalParameter, "the server does not support uncompressed points")
		}
	case extensionALPN:
		if !data.ReadUint16LengthPrefixed(&list) || !data.Empty() ||
			!list.ReadUint8LengthPrefixed(&item) || item.Empty() || !list.Empty() {
			return refuse(alertDecodeError, "malformed answer to ALPN")
		}
		if !slices.Contains(c.Hello.protocols, string(item)) {
			return refuse(alertIllegalParameter, "the server chose a protocol that was not offered")
		}
		*protocol = string(item)
	}
	return nil
}
