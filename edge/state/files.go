package state

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

	"golang.org/x/sys/unix"
)

const keySize = 32

// lockFile takes an advisory lock that the kernel drops when the process ends.
func lockFile(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the state directory: %w", err)
	}
	err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return file, nil
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%w: %s is locked; give every edge a --state-dir of its own", ErrLocked, path)
	} else {
		err = fmt.Errorf("lock %s: %w", path, err)
	}
	return nil, errors.Join(err, file.Close())
}

// loadKey reads the key, or generates it if it is absent and generate is set.
func loadKey(path string, generate bool) ([]byte, error) {
	text, err := readBounded(path, 4096)
	switch {
	case err == nil:
		return parseKey(path, text)
	case errors.Is(err, ErrDamaged):
		return nil, fmt.Errorf("%w: %s is not a key of %d bytes, raw or in base64", ErrKey, path, keySize)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	case !generate:
		return nil, fmt.Errorf("%w: %s does not exist, but files were sealed with it: put it back, or remove the sealed files to start anew", ErrKey, path)
	}
	key := make([]byte, keySize)
	_, _ = rand.Read(key) // never fails
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	encoded := base64.StdEncoding.AppendEncode(nil, key)
	if err := writeAtomic(filepath.Dir(path), filepath.Base(path), append(encoded, '\n'), true); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	return key, nil
}

func parseKey(path string, text []byte) ([]byte, error) {
	if len(text) == keySize {
		return text, nil
	}
	key, err := base64.StdEncoding.AppendDecode(nil, bytes.TrimSpace(text))
	if err != nil || len(key) != keySize {
		// The decoder's error would quote the key.
		return nil, fmt.Errorf("%w: %s is not a key of %d bytes, raw or in base64", ErrKey, path, keySize)
	}
	return key, nil
}

// readBounded reads a file of at most limit bytes; more is ErrDamaged.
func readBounded(path string, limit int) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > int64(limit) {
		return nil, fmt.Errorf("%w %s: it has %d bytes, at most %d were written", ErrDamaged, path, info.Size(), limit)
	}
	return io.ReadAll(io.LimitReader(file, int64(limit)))
}

// writeAtomic replaces dir/name so that a crash leaves the old or the new
// content, and the new one once it returned nil if it is to be durable.
func writeAtomic(dir, name string, data []byte, durable bool) (err error) {
	file, err := os.CreateTemp(dir, tempPrefix+"*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(file.Name())
		}
	}()
	if _, err = file.Write(data); err == nil && durable {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	if err = os.Rename(file.Name(), filepath.Join(dir, name)); err != nil {
		return err
	}
	if !durable {
		return nil
	}
	return syncDir(dir)
}

// syncDir makes renames in dir durable.
func syncDir(dir string) error {
	file, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}
