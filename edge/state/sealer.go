package state

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"errors"
	"fmt"
)

// A sealed file is: magic, version (1 byte), key id, then what AES-256-GCM with
// a random nonce makes of the content: nonce, ciphertext, tag. The additional
// data are the header and the file's name, so that no file passes for another.
const (
	magic      = "RSLSTATE"
	version    = 1
	headerSize = len(magic) + 1 + len(keyID{})
	overhead   = headerSize + 12 + 16
)

// keyID tells keys apart without saying anything about them: the start of a
// SHA-256.
type keyID [8]byte

func newKeyID(key []byte) keyID {
	sum := sha256.Sum256(append([]byte("reseal state key id\x00"), key...))
	return keyID(sum[:len(keyID{})])
}

type sealer struct {
	id     keyID
	header []byte
	aead   cipher.AEAD
}

func newSealer(key []byte) (*sealer, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	id := newKeyID(key)
	header := append([]byte(magic), version)
	return &sealer{id: id, header: append(header, id[:]...), aead: aead}, nil
}

func (s *sealer) seal(name string, data []byte) []byte {
	out := make([]byte, headerSize, overhead+len(data))
	copy(out, s.header)
	return s.aead.Seal(out, nil, data, s.additional(name))
}

func (s *sealer) open(name string, sealed []byte) ([]byte, error) {
	id, err := parseHeader(sealed)
	if err != nil {
		return nil, err
	}
	if id != s.id {
		return nil, fmt.Errorf("sealed with key %x, the key at hand is %x", id, s.id)
	}
	data, err := s.aead.Open(nil, nil, sealed[headerSize:], s.additional(name))
	if err != nil {
		return nil, errors.New("its content or its name was changed")
	}
	return data, nil
}

func (s *sealer) additional(name string) []byte {
	return append(append([]byte(nil), s.header...), name...)
}

func parseHeader(sealed []byte) (keyID, error) {
	if len(sealed) < headerSize || string(sealed[:len(magic)]) != magic {
		return keyID{}, errors.New("not a sealed file")
	}
	if v := sealed[len(magic)]; v != version {
		return keyID{}, fmt.Errorf("sealed in format %d, this edge reads format %d", v, version)
	}
	return keyID(sealed[len(magic)+1 : headerSize]), nil
}
