package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// A state directory may pass from one process to another without a moment in which it
// belongs to none, or to both. Both have the lock, as one and the same open file
// (flock(2)), so it lasts until the last of them ends. The one that is not the owner
// reads what is on disk and what it has written itself, which waits in memory.

// owner says whose the directory is.
type owner int

const (
	ours   owner = iota
	theirs       // still of the process before
	given        // of the process after this one
)

// change is what was written to a file that is not ours.
type change struct {
	data    []byte
	removed bool
	durable bool
}

func (c change) read(name string) ([]byte, error) {
	if c.removed {
		return nil, fmt.Errorf("read state %s: %w", name, fs.ErrNotExist)
	}
	return append([]byte(nil), c.data...), nil
}

// Inherit opens a state directory whose lock another process holds and shares, by this
// file. Nothing is written before TakeOver. Errors are those of Open, and ErrLocked when
// the file is not that lock. It takes the file, also on error.
func Inherit(dir, keyFile string, lock *os.File) (*Dir, error) {
	if err := sameLock(filepath.Join(dir, lockName), lock); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return openLocked(dir, keyFile, lock, theirs)
}

func sameLock(path string, lock *os.File) error {
	ours, err := lock.Stat()
	if err != nil {
		return fmt.Errorf("the inherited lock: %w", err)
	}
	there, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("the inherited lock: %w", err)
	}
	if !os.SameFile(ours, there) {
		return fmt.Errorf("%w: the process that hands over has another one than %s", ErrLocked, filepath.Dir(path))
	}
	return nil
}

// Lock is the locked file, for Inherit in another process. It stays the Dir's.
func (d *Dir) Lock() (*os.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock == nil {
		return nil, fmt.Errorf("state directory: %w", fs.ErrClosed)
	}
	return d.lock, nil
}

// TakeOver makes the directory this process's, and writes what was written to it
// before. Errors are those of the writes; the directory is ours in any case.
func (d *Dir) TakeOver() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.owner != theirs || d.lock == nil {
		return nil
	}
	d.owner = ours
	var errs []error
	for name, c := range d.pending {
		if c.removed {
			errs = append(errs, d.delete(name))
		} else {
			errs = append(errs, d.put(name, c.data, c.durable))
		}
		clear(c.data)
	}
	clear(d.pending)
	return errors.Join(errs...)
}

// Yield leaves the directory to another process: what is written from now on does not
// reach the disk, since that process knows better. Writes that are under way are
// finished.
func (d *Dir) Yield() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.owner = given
}

// postpone keeps a change for TakeOver, which does not come any more when the directory
// was given away. d.mu is held.
func (d *Dir) postpone(name string, c change) {
	if d.owner == given {
		clear(c.data)
		return
	}
	clear(d.pending[name].data)
	d.pending[name] = c
}
