package abbreviated

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"hash"

	"golang.org/x/crypto/chacha20poly1305"
)

// suite is what the record layer and the Finished messages need of a cipher
// suite. How its keys were exchanged was the full handshake's business.
type suite struct {
	id      uint16
	keySize int
	// ivSize is what the key block holds of each nonce: 4 bytes, followed by 8
	// that stand in the record (AES-GCM, RFC 5288 section 3), or all 12, which the
	// sequence number is XORed into (ChaCha20-Poly1305, RFC 7905 section 2).
	ivSize int
	hash   func() hash.Hash
	aead   func(key []byte) (cipher.AEAD, error)
}

const (
	saltSize  = 4
	nonceSize = 12
	tagSize   = 16
)

var suites = []suite{
	{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, 16, saltSize, sha256.New, newGCM},
	{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, 16, saltSize, sha256.New, newGCM},
	{tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, 32, saltSize, sha512.New384, newGCM},
	{tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, 32, saltSize, sha512.New384, newGCM},
	{tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, 32, nonceSize, sha256.New, chacha20poly1305.New},
	{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, 32, nonceSize, sha256.New, chacha20poly1305.New},
	{tls.TLS_RSA_WITH_AES_128_GCM_SHA256, 16, saltSize, sha256.New, newGCM},
	{tls.TLS_RSA_WITH_AES_256_GCM_SHA384, 32, saltSize, sha512.New384, newGCM},
}

func suiteByID(id uint16) *suite {
	for i := range suites {
		if suites[i].id == id {
			return &suites[i]
		}
	}
	return nil
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// prf is the pseudo-random function of TLS 1.2 (RFC 5246 section 5).
func (s *suite) prf(secret []byte, label string, seed []byte, size int) []byte {
	mac := hmac.New(s.hash, secret)
	seed = append([]byte(label), seed...)
	out := make([]byte, 0, size+mac.Size())
	a := seed
	for len(out) < size {
		mac.Reset()
		mac.Write(a)
		a = mac.Sum(nil)
		mac.Reset()
		mac.Write(a)
		mac.Write(seed)
		out = mac.Sum(out)
	}
	clear(out[size:])
	return out[:size]
}

// protections derives the keys of both directions (RFC 5246 section 6.3).
func (s *suite) protections(secret, clientRandom, serverRandom []byte) (client, server *protection, err error) {
	seed := append(append([]byte(nil), serverRandom...), clientRandom...)
	block := s.prf(secret, "key expansion", seed, 2*s.keySize+2*s.ivSize)
	defer clear(block)
	clientKey, rest := block[:s.keySize], block[s.keySize:]
	serverKey, rest := rest[:s.keySize], rest[s.keySize:]
	clientIV, serverIV := rest[:s.ivSize], rest[s.ivSize:]
	if client, err = s.protection(clientKey, clientIV); err != nil {
		return nil, nil, err
	}
	if server, err = s.protection(serverKey, serverIV); err != nil {
		return nil, nil, err
	}
	return client, server, nil
}

func (s *suite) protection(key, iv []byte) (*protection, error) {
	aead, err := s.aead(key)
	if err != nil {
		return nil, err
	}
	p := &protection{aead: aead, explicit: s.ivSize == saltSize}
	copy(p.iv[:], iv)
	return p, nil
}

const finishedSize = 12 // RFC 5246 section 7.4.9

const (
	clientFinished = "client finished"
	serverFinished = "server finished"
)

// finished is the verify_data of a Finished message after the messages so far
// (RFC 5246 section 7.4.9).
func (s *suite) finished(secret []byte, label string, messages ...[]byte) []byte {
	transcript := s.hash()
	for _, message := range messages {
		transcript.Write(message)
	}
	return s.prf(secret, label, transcript.Sum(nil), finishedSize)
}
