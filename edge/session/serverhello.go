package session

import (
	"errors"

	"golang.org/x/crypto/cryptobyte"
)

const (
	recordTypeAlert               = 21
	handshakeServerHello          = 2
	extensionExtendedMasterSecret = 23 // RFC 7627
)

// maxServerHello bounds what is kept of a server's first bytes: a ServerHello
// of some hundred bytes, in the first record or records.
const maxServerHello = 32 << 10

// serverHello is what session-ID resumption needs of a ServerHello (RFC 5246
// section 7.4.1.3). crypto/tls reveals none of it.
type serverHello struct {
	sessionID            []byte
	extendedMasterSecret bool
}

var (
	errShort          = errors.New("more bytes are needed")
	errNotServerHello = errors.New("not a ServerHello")
)

// parseServerHello reads the first bytes that a server sends. Records may be
// fragmented and coalesced at will; warning alerts before the ServerHello are
// skipped. It returns errShort when stream ends before the ServerHello does.
func parseServerHello(stream []byte) (serverHello, error) {
	s := cryptobyte.String(stream)
	var message []byte
	for {
		if body, ok := wholeHandshake(message); ok {
			return parseServerHelloBody(body)
		}
		var kind uint8
		var version uint16
		var payload cryptobyte.String
		if !s.ReadUint8(&kind) || !s.ReadUint16(&version) || !s.ReadUint16LengthPrefixed(&payload) {
			return serverHello{}, errShort
		}
		switch {
		case kind == recordTypeAlert && len(message) == 0:
		case kind == recordTypeHandshake && len(payload) > 0:
			if len(message) == 0 && payload[0] != handshakeServerHello {
				return serverHello{}, errNotServerHello
			}
			message = append(message, payload...)
		default:
			return serverHello{}, errNotServerHello
		}
	}
}

// wholeHandshake is the body of the first handshake message in message, once it
// is all there.
func wholeHandshake(message []byte) (cryptobyte.String, bool) {
	s := cryptobyte.String(message)
	var kind uint8
	var body cryptobyte.String
	if !s.ReadUint8(&kind) || !s.ReadUint24LengthPrefixed(&body) {
		return nil, false
	}
	return body, true
}

func parseServerHelloBody(body cryptobyte.String) (serverHello, error) {
	var hello serverHello
	var id, extensions cryptobyte.String
	if !body.Skip(2+32) || !body.ReadUint8LengthPrefixed(&id) || len(id) > 32 || !body.Skip(2+1) {
		return hello, errNotServerHello
	}
	hello.sessionID = append([]byte(nil), id...)
	if body.Empty() {
		return hello, nil // no extensions at all (RFC 5246 section 7.4.1.3)
	}
	if !body.ReadUint16LengthPrefixed(&extensions) {
		return hello, errNotServerHello
	}
	for !extensions.Empty() {
		var extension uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&extension) || !extensions.ReadUint16LengthPrefixed(&data) {
			return hello, errNotServerHello
		}
		if extension == extensionExtendedMasterSecret {
			hello.extendedMasterSecret = true
		}
	}
	return hello, nil
}
