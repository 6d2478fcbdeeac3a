package loop

import (
	"golang.org/x/crypto/cryptobyte"
)

const (
	recordHandshake     = 22
	messageClientHello  = 1
	extensionTicket     = 35 // RFC 5077
	extensionPreShared  = 41 // RFC 8446 section 4.2.11
	handshakeHeaderSize = 4
)

// offered returns the tickets and PSK identities of a ClientHello, which may stand
// in several records. complete is false while bytes are missing; what is no
// ClientHello is complete and offers nothing: TLS will say what is wrong.
func offered(records []byte) (tickets [][]byte, complete bool) {
	var message []byte
	for {
		if len(records) > 0 && records[0] != recordHandshake {
			return nil, true
		}
		if len(records) < recordHeader {
			return nil, false
		}
		n := recordHeader + int(records[3])<<8 + int(records[4])
		message = append(message, records[recordHeader:min(n, len(records))]...)
		if len(message) > 0 && message[0] != messageClientHello {
			return nil, true
		}
		if len(message) >= handshakeHeaderSize {
			size := handshakeHeaderSize + int(message[1])<<16 + int(message[2])<<8 + int(message[3])
			if len(message) >= size {
				return ticketsOf(message[handshakeHeaderSize:size]), true
			}
		}
		if len(records) < n || n == recordHeader {
			return nil, n == recordHeader // an empty record is an error
		}
		records = records[n:]
	}
}

// ticketsOf reads the body of a ClientHello (RFC 8446 section 4.1.2).
func ticketsOf(body []byte) (tickets [][]byte) {
	hello := cryptobyte.String(body)
	var skipped, extensions cryptobyte.String
	if !hello.Skip(2+32) || !hello.ReadUint8LengthPrefixed(&skipped) || // version, random, session ID
		!hello.ReadUint16LengthPrefixed(&skipped) || !hello.ReadUint8LengthPrefixed(&skipped) || // suites, compression
		!hello.ReadUint16LengthPrefixed(&extensions) {
		return nil
	}
	for !extensions.Empty() {
		var kind uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&data) {
			return nil
		}
		switch kind {
		case extensionTicket:
			if len(data) > 0 {
				tickets = append(tickets, data)
			}
		case extensionPreShared:
			tickets = append(tickets, identities(data)...)
		}
	}
	return tickets
}

// identities reads OfferedPsks.
func identities(data cryptobyte.String) (all [][]byte) {
	var list, identity cryptobyte.String
	var age uint32
	if !data.ReadUint16LengthPrefixed(&list) {
		return nil
	}
	for list.ReadUint16LengthPrefixed(&identity) && list.ReadUint32(&age) {
		all = append(all, identity)
	}
	return all
}
