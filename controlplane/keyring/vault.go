package keyring

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
)

// vault keeps the epochs' secrets in clear, so that a crowd of edges costs one
// decryption of each. What is forgotten is zeroed. Copies that the gRPC library
// makes while it sends are out of reach.
type vault struct {
	unseal func(sealed, context []byte) ([]byte, error)

	mu      sync.Mutex
	secrets map[string][]byte // by the sealed form, which is unique
}

func newVault(unseal func(sealed, context []byte) ([]byte, error)) *vault {
	return &vault{unseal: unseal, secrets: map[string][]byte{}}
}

// learn makes the secrets of a record, whose etcd key is key, available.
func (v *vault) learn(key string, r *record) error {
	for _, e := range r.Epochs {
		if v.knows(e.Sealed) {
			continue
		}
		secret, err := v.unseal(e.Sealed, sealContext(key, r.ID, e.Number))
		if err == nil {
			err = checkSecret(secret)
		}
		if err != nil {
			return fmt.Errorf("epoch %d can't be unsealed: %w", e.Number, err)
		}
		v.mu.Lock()
		v.secrets[string(e.Sealed)] = secret
		v.mu.Unlock()
	}
	return nil
}

// checkSecret keeps a key that anybody could guess from ever reaching an edge
// (CVE-2020-13777).
func checkSecret(secret []byte) error {
	if len(secret) != secretSize || bytes.Equal(secret, make([]byte, secretSize)) {
		return errors.New("it is not a secret of 32 bytes")
	}
	return nil
}

func (v *vault) knows(sealed []byte) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.secrets[string(sealed)] != nil
}

// copy returns a copy of a secret. It is false when that was forgotten: the
// record that holds it is no longer the newest.
func (v *vault) copy(sealed []byte) ([]byte, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	secret := v.secrets[string(sealed)]
	return bytes.Clone(secret), secret != nil
}

// retain forgets all secrets but those that keep lists.
func (v *vault) retain(keep map[string]bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for sealed, secret := range v.secrets {
		if !keep[sealed] {
			clear(secret)
			delete(v.secrets, sealed)
		}
	}
}
