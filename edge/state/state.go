// Package state keeps an edge's files on disk, sealed with AES-256-GCM.
//
// Sealing protects copies of the state directory that lack the key, such as
// backups. It does not protect a stolen disk that holds the key too.
package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// MaxSize bounds the content of one file, in bytes.
const MaxSize = 64 << 20

const (
	lockName = "lock"
	keyName  = "key"
	// tempPrefix starts the names of files that are being written. What a crash
	// leaves of them is removed by Open.
	tempPrefix = ".new-"
)

var (
	// ErrLocked is the error of Open while another process uses the directory.
	ErrLocked = errors.New("the state directory is in use by another edge")
	// ErrDamaged is the error of Read for a file that is not what was written:
	// cut short, changed, or moved from another name.
	ErrDamaged = errors.New("damaged state file")
	// ErrKey is the error of Open when the key is missing, malformed or not the
	// one that sealed the files there.
	ErrKey = errors.New("state key")
	// ErrTooLarge is the error of Write for more than MaxSize.
	ErrTooLarge = errors.New("too large for a state file")
	// ErrName is the error for a name that no file may have.
	ErrName = errors.New("not a name for a state file")
)

// Dir is an open state directory. Its methods may be called concurrently. After
// Close they return fs.ErrClosed.
type Dir struct {
	path string
	seal *sealer

	mu      sync.Mutex
	lock    *os.File // nil after Close
	owner   owner
	pending map[string]change // what waits for TakeOver
}

// Open opens the state directory dir and locks it against other processes until
// Close. What is absent is created: the directory with mode 0700, the files
// with 0600.
//
// keyFile holds the 32-byte key, raw or in base64. Default: dir/key. It is
// generated when it is absent and nothing has been sealed yet; with sealed files in
// the directory an absent key is an error.
//
// Errors: ErrLocked, ErrKey, and those of the file system.
func Open(dir, keyFile string) (*Dir, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	lock, err := lockFile(filepath.Join(dir, lockName))
	if err != nil {
		return nil, err
	}
	return openLocked(dir, keyFile, lock, ours)
}

func openLocked(dir, keyFile string, lock *os.File, owner owner) (*Dir, error) {
	if keyFile == "" {
		keyFile = filepath.Join(dir, keyName)
	}
	d := &Dir{path: dir, lock: lock, owner: owner, pending: map[string]change{}}
	if err := d.load(keyFile); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return d, nil
}

func (d *Dir) load(keyFile string) error {
	names, err := d.sealed()
	if err != nil {
		return err
	}
	key, err := loadKey(keyFile, len(names) == 0)
	if err != nil {
		return err
	}
	defer clear(key)
	if d.seal, err = newSealer(key); err != nil {
		return err
	}
	for name, id := range names {
		if id != d.seal.id {
			return fmt.Errorf("%w: %s was sealed with key %x, but %s holds key %x: put back the old key, or remove the sealed files to start anew",
				ErrKey, filepath.Join(d.path, name), id, keyFile, d.seal.id)
		}
	}
	return nil
}

// sealed lists the sealed files with the ids of their keys, and removes what a
// crash left half written.
func (d *Dir) sealed() (map[string]keyID, error) {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	names := map[string]keyID{}
	for _, entry := range entries {
		path := filepath.Join(d.path, entry.Name())
		if !entry.Type().IsRegular() {
			continue
		}
		if strings.HasPrefix(entry.Name(), tempPrefix) {
			if d.owner != ours {
				continue // it is being written
			}
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("remove what a crash left: %w", err)
			}
			continue
		}
		id, ok, err := sealedBy(path)
		if err != nil {
			return nil, err
		}
		if ok && checkName(entry.Name()) == nil {
			names[entry.Name()] = id
		}
	}
	return names, nil
}

func sealedBy(path string) (keyID, bool, error) {
	file, err := os.Open(path)
	if err != nil {
		return keyID{}, false, fmt.Errorf("state directory: %w", err)
	}
	defer file.Close()
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(file, header); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return keyID{}, false, nil // Read says what is wrong with it
		}
		return keyID{}, false, fmt.Errorf("state directory: %w", err)
	}
	id, err := parseHeader(header)
	return id, err == nil, nil
}

// Read returns what was last written under name. Errors: fs.ErrNotExist,
// ErrDamaged (both naming the file), ErrName, fs.ErrClosed, and those of the
// file system.
func (d *Dir) Read(name string) ([]byte, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock == nil {
		return nil, fmt.Errorf("read state %s: %w", name, fs.ErrClosed)
	}
	if c, ok := d.pending[name]; ok {
		return c.read(name)
	}
	path := filepath.Join(d.path, name)
	sealed, err := readBounded(path, MaxSize+overhead)
	if err != nil {
		return nil, err
	}
	data, err := d.seal.open(name, sealed)
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrDamaged, path, err)
	}
	return data, nil
}

// Write replaces the content of name with data. After a crash the file holds
// either the old content or the new one; after Write has returned nil, the new one.
// Errors: ErrTooLarge, ErrName, fs.ErrClosed, and those of the file system.
func (d *Dir) Write(name string, data []byte) error { return d.write(name, data, true) }

// Note is Write without waiting for the disk: the new content outlasts the process,
// but not a crash of the machine, after which the file holds the old content, the
// new one or, in the worst case, nothing that Read takes.
func (d *Dir) Note(name string, data []byte) error { return d.write(name, data, false) }

func (d *Dir) write(name string, data []byte, durable bool) error {
	if err := checkName(name); err != nil {
		return err
	}
	if len(data) > MaxSize {
		return fmt.Errorf("%w: %s has %d bytes, at most %d are kept", ErrTooLarge, name, len(data), MaxSize)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock == nil {
		return fmt.Errorf("write state %s: %w", name, fs.ErrClosed)
	}
	if d.owner != ours {
		d.postpone(name, change{data: append([]byte(nil), data...), durable: durable})
		return nil
	}
	return d.put(name, data, durable)
}

func (d *Dir) put(name string, data []byte, durable bool) error {
	if err := writeAtomic(d.path, name, d.seal.seal(name, data), durable); err != nil {
		return fmt.Errorf("write state %s: %w", name, err)
	}
	return nil
}

// Remove deletes name. Removing an absent file is not an error.
func (d *Dir) Remove(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock == nil {
		return fmt.Errorf("remove state %s: %w", name, fs.ErrClosed)
	}
	if d.owner != ours {
		d.postpone(name, change{removed: true})
		return nil
	}
	return d.delete(name)
}

func (d *Dir) delete(name string) error {
	err := os.Remove(filepath.Join(d.path, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove state: %w", err)
	}
	return syncDir(d.path)
}

// Close unlocks the directory. A second Close does nothing.
func (d *Dir) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock == nil {
		return nil
	}
	lock := d.lock
	d.lock = nil
	return lock.Close()
}

// checkName admits plain names: lower-case letters, digits, "-", "_" and ".",
// not first a ".", at most 100 bytes.
func checkName(name string) error {
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || '0' <= r && r <= '9' || strings.ContainsRune("-_.", r)
	}
	for _, r := range name {
		if !plain(r) {
			return fmt.Errorf("%w: %q", ErrName, name)
		}
	}
	if name == "" || name[0] == '.' || len(name) > 100 || name == lockName || name == keyName {
		return fmt.Errorf("%w: %q", ErrName, name)
	}
	return nil
}
