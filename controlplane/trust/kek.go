package trust

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// loadKEK reads the key-encryption key. If the file is absent and generate is
// set it makes one; created tells so.
func loadKEK(path string, generate bool) (kek []byte, created bool, err error) {
	if path == "" {
		return nil, false, fmt.Errorf("%w: no --kek-file given", ErrKEK)
	}
	kek, err = readKEK(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return kek, false, err
	}
	if !generate {
		return nil, false, fmt.Errorf("%w: %s does not exist, but the store holds secrets that were sealed with it: put back the file (--kek-file)", ErrKEK, path)
	}
	kek = make([]byte, keySize)
	_, _ = rand.Read(kek) // never fails
	encoded := append(base64.StdEncoding.AppendEncode(nil, kek), '\n')
	switch err = createFile(path, encoded); {
	case errors.Is(err, fs.ErrExist): // another replica on this machine was faster
		kek, err = readKEK(path)
		return kek, false, err
	case err != nil:
		return nil, false, fmt.Errorf("%w: %w", ErrKEK, err)
	}
	return kek, true, nil
}

func readKEK(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKEK, err)
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, 4096))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKEK, err)
	}
	if len(text) == keySize {
		return text, nil
	}
	kek, err := base64.StdEncoding.AppendDecode(nil, bytes.TrimSpace(text))
	if err != nil || len(kek) != keySize {
		// The decoder's error would quote the key.
		return nil, fmt.Errorf("%w: %s is not a key of %d bytes, raw or in base64", ErrKEK, path, keySize)
	}
	return kek, nil
}

// createFile writes a new file with mode 0600, whole or not at all. Its error is
// fs.ErrExist when there is one.
func createFile(path string, data []byte) error {
	temp, err := writeTemp(path, data)
	if err != nil {
		return err
	}
	defer os.Remove(temp)
	if err := os.Link(temp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// replaceFile writes a file with mode 0600 so that a crash leaves the old or the
// new content.
func replaceFile(path string, data []byte) error {
	temp, err := writeTemp(path, data)
	if err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return syncDir(filepath.Dir(path))
}

func writeTemp(path string, data []byte) (string, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	file, err := os.CreateTemp(dir, ".new-*") // mode 0600
	if err != nil {
		return "", err
	}
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return "", errors.Join(err, os.Remove(file.Name()))
	}
	return file.Name(), nil
}

func syncDir(dir string) error {
	file, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}

// KEK seals and unseals with a key-encryption key alone, without a store.
type KEK struct{ envelope *envelope }

// OpenKEK reads the key-encryption key. Errors: ErrKEK.
func OpenKEK(path string) (*KEK, error) {
	kek, err := readKEK(path)
	if err != nil {
		return nil, err
	}
	defer clear(kek)
	opened, err := newEnvelope(kek)
	if err != nil {
		return nil, err
	}
	return &KEK{opened}, nil
}

// Seal is Trust.Seal.
func (k *KEK) Seal(plaintext, context []byte) ([]byte, error) {
	return k.envelope.seal(plaintext, context)
}

// Unseal is Trust.Unseal.
func (k *KEK) Unseal(sealed, context []byte) ([]byte, error) {
	return k.envelope.unseal(sealed, context)
}
