package abbreviated

import (
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"math"
)

// Record types (RFC 5246 section 6.2.1).
const (
	recordChangeCipherSpec = 20
	recordAlert            = 21
	recordHandshake        = 22
	recordApplicationData  = 23
)

const (
	headerSize   = 5
	maxPlaintext = 1 << 14
	version12    = 0x0303
	explicitSize = 8
)

var (
	errBadRecord = errors.New("a record is damaged or out of order")
	errExhausted = errors.New("the sequence numbers are used up")
)

// protection seals or opens the records of one direction (RFC 5246 section
// 6.2.3.3). One goroutine at a time uses it.
type protection struct {
	aead     cipher.AEAD
	iv       [nonceSize]byte
	explicit bool // 8 bytes of the nonce stand in the record
	seq      uint64
	spent    bool // the last sequence number was used

	// Scratch space, so that nothing is allocated for a record.
	nonce [nonceSize]byte
	extra [13]byte
}

// overhead is what a record's payload holds besides the content.
func (p *protection) overhead() int {
	if p.explicit {
		return explicitSize + tagSize
	}
	return tagSize
}

// prepare sets nonce and additional data of the next record, whose explicit
// nonce is the sequence number, or what the peer chose.
func (p *protection) prepare(kind byte, size int, explicit []byte) error {
	if p.spent {
		return errExhausted
	}
	binary.BigEndian.PutUint64(p.extra[:8], p.seq)
	p.extra[8] = kind
	binary.BigEndian.PutUint16(p.extra[9:], version12)
	binary.BigEndian.PutUint16(p.extra[11:], uint16(size))
	p.nonce = p.iv
	switch {
	case explicit != nil:
		copy(p.nonce[saltSize:], explicit)
	case p.explicit:
		copy(p.nonce[saltSize:], p.extra[:8])
	default:
		for i, b := range p.extra[:8] {
			p.nonce[nonceSize-8+i] ^= b
		}
	}
	return nil
}

func (p *protection) advance() {
	p.spent = p.seq == math.MaxUint64
	p.seq++
}

// seal appends one record with content, at most maxPlaintext of it.
func (p *protection) seal(out []byte, kind byte, content []byte) ([]byte, error) {
	if err := p.prepare(kind, len(content), nil); err != nil {
		return out, err
	}
	out = appendHeader(out, kind, len(content)+p.overhead())
	if p.explicit {
		out = append(out, p.nonce[saltSize:]...)
	}
	out = p.aead.Seal(out, p.nonce[:], content, p.extra[:])
	p.advance()
	return out, nil
}

// open decrypts the payload of a record in place.
func (p *protection) open(kind byte, payload []byte) ([]byte, error) {
	size := len(payload) - p.overhead()
	if size < 0 {
		return nil, errBadRecord
	}
	var explicit []byte
	if p.explicit {
		explicit, payload = payload[:explicitSize], payload[explicitSize:]
	}
	if err := p.prepare(kind, size, explicit); err != nil {
		return nil, err
	}
	content, err := p.aead.Open(payload[:0], p.nonce[:], payload, p.extra[:])
	if err != nil {
		return nil, errBadRecord
	}
	p.advance()
	return content, nil
}

func appendHeader(out []byte, kind byte, size int) []byte {
	out = append(out, kind, version12>>8, version12&0xff)
	return binary.BigEndian.AppendUint16(out, uint16(size))
}
