package trust

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
)

var (
	// ErrKEK is the error for a key-encryption key that is missing, malformed
	// or not the one that sealed a value.
	ErrKEK = errors.New("key-encryption key")
	// ErrSealed is the error for a sealed value that is not what was sealed:
	// cut short, changed, or moved from another context.
	ErrSealed = errors.New("damaged sealed value")
	// ErrNotOpen is the error of methods that need Trust.Open first.
	ErrNotOpen = errors.New("trust is not open")
)

// A sealed value is, in this order:
//
//	magic, version (1 byte), id of the key-encryption key
//	nonce, data key, tag    AES-256-GCM under the key-encryption key
//	nonce, value, tag       AES-256-GCM under the data key
//
// The additional data of both are the first line and the context. Every value
// has a random data key of its own, so the key-encryption key encrypts only
// random keys, and can be changed without touching the values.
const (
	envelopeMagic   = "RSLV"
	envelopeVersion = 1
	keySize         = 32
	gcmOverhead     = 12 + 16
	headerSize      = len(envelopeMagic) + 1 + len(kekID{})
	wrappedSize     = keySize + gcmOverhead
	sealedOverhead  = headerSize + wrappedSize + gcmOverhead
)

// kekID tells keys apart without saying anything about them: the start of a
// SHA-256.
type kekID [8]byte

type envelope struct {
	id  kekID
	kek cipher.AEAD
}

func newEnvelope(kek []byte) (*envelope, error) {
	aead, err := newAEAD(kek)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(append([]byte("reseal kek id\x00"), kek...))
	return &envelope{id: kekID(sum[:len(kekID{})]), kek: aead}, nil
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func (e *envelope) seal(plaintext, context []byte) ([]byte, error) {
	dataKey := make([]byte, keySize)
	defer clear(dataKey)
	_, _ = rand.Read(dataKey) // never fails
	aead, err := newAEAD(dataKey)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, sealedOverhead+len(plaintext))
	out = append(out, envelopeMagic...)
	out = append(out, envelopeVersion)
	out = append(out, e.id[:]...)
	additional := additionalData(out, context)
	out = e.kek.Seal(out, nil, dataKey, additional)
	return aead.Seal(out, nil, plaintext, additional), nil
}

func (e *envelope) unseal(sealed, context []byte) ([]byte, error) {
	if len(sealed) < sealedOverhead || !bytes.HasPrefix(sealed, []byte(envelopeMagic)) {
		return nil, fmt.Errorf("%w: it has no envelope", ErrSealed)
	}
	if v := sealed[len(envelopeMagic)]; v != envelopeVersion {
		return nil, fmt.Errorf("%w: format %d, this control plane reads format %d", ErrSealed, v, envelopeVersion)
	}
	header, rest := sealed[:headerSize], sealed[headerSize:]
	if id := kekID(header[len(envelopeMagic)+1:]); id != e.id {
		return nil, fmt.Errorf("%w: the value was sealed with key %x, the key at hand is %x", ErrKEK, id, e.id)
	}
	additional := additionalData(header, context)
	dataKey, err := e.kek.Open(nil, nil, rest[:wrappedSize], additional)
	if err != nil {
		return nil, fmt.Errorf("%w: its content or its context was changed", ErrSealed)
	}
	defer clear(dataKey)
	aead, err := newAEAD(dataKey)
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(nil, nil, rest[wrappedSize:], additional)
	if err != nil {
		return nil, fmt.Errorf("%w: its content was changed", ErrSealed)
	}
	return plaintext, nil
}

func additionalData(header, context []byte) []byte {
	return append(bytes.Clone(header), context...)
}

// Seal encrypts plaintext so that only Unseal with the same context gives it
// back. The context says where the value belongs, for example its etcd key; it
// is not secret. Errors: ErrNotOpen.
func (t *Trust) Seal(plaintext, context []byte) ([]byte, error) {
	opened := t.opened.Load()
	if opened == nil {
		return nil, ErrNotOpen
	}
	return opened.envelope.seal(plaintext, context)
}

// Unseal undoes Seal. Errors: ErrSealed, ErrKEK, ErrNotOpen.
func (t *Trust) Unseal(sealed, context []byte) ([]byte, error) {
	opened := t.opened.Load()
	if opened == nil {
		return nil, ErrNotOpen
	}
	return opened.envelope.unseal(sealed, context)
}
