// Package files reads the files that a configuration names. Their paths come from
// the manifests and may be mistaken, so nothing that a path can lead to may hang
// the edge or take its memory: a named pipe, a device, a network file system that
// does not answer.
package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// MaxSize bounds a file, in bytes. The largest bundles of roots have less than
	// a tenth of it.
	MaxSize = 4 << 20
	// DefaultLimit is how long a read may take.
	DefaultLimit = 3 * time.Second
)

var (
	// ErrKind is the error for what is not a regular file.
	ErrKind = errors.New("is not a regular file")
	// ErrSize is the error for a file of more than MaxSize bytes.
	ErrSize = fmt.Errorf("has more than %d MiB, the most that is read", MaxSize>>20)
	// ErrSlow is the error for a read that did not end in time. The path is not
	// read again before it has.
	ErrSlow = errors.New("took too long to be read; its file system may be stuck")
)

// Reader reads files. The zero Reader is ready. It is safe for concurrent use.
type Reader struct {
	// Limit bounds a read in time. Default DefaultLimit.
	Limit time.Duration

	mu    sync.Mutex
	stuck map[string]bool // reads that took too long and go on
}

type content struct {
	data []byte
	err  error
}

// Read returns the content of a regular file of at most MaxSize bytes. Its errors
// are ErrKind, ErrSize, ErrSlow and those of the file system, each as an
// *fs.PathError.
func (r *Reader) Read(name string) ([]byte, error) {
	if r.isStuck(name) {
		return nil, &fs.PathError{Op: "read", Path: name, Err: ErrSlow}
	}
	limit := r.Limit
	if limit <= 0 {
		limit = DefaultLimit
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	// A read of a regular file can't be called off, so it may outlive this call.
	done := make(chan content)
	given := make(chan struct{})
	go func() {
		data, err := read(name)
		select {
		case done <- content{data, err}:
		case <-given:
			r.setStuck(name, false)
		}
	}()
	select {
	case got := <-done:
		return got.data, got.err
	case <-timer.C:
		r.setStuck(name, true)
		close(given)
		return nil, &fs.PathError{Op: "read", Path: name, Err: ErrSlow}
	}
}

func (r *Reader) isStuck(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stuck[name]
}

func (r *Reader) setStuck(name string, stuck bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stuck == nil {
		r.stuck = map[string]bool{}
	}
	if stuck {
		r.stuck[name] = true
	} else {
		delete(r.stuck, name)
	}
}

func read(name string) ([]byte, error) {
	// Looked at before it is opened: opening a device may have effects.
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if err := check(name, info); err != nil {
		return nil, err
	}
	// Non-blocking, since a pipe may have taken its place meanwhile.
	file, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if info, err = file.Stat(); err == nil {
		err = check(name, info)
	}
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(file, MaxSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > MaxSize { // it grew, or says that it has 0 bytes as those of /proc
		return nil, &fs.PathError{Op: "read", Path: name, Err: ErrSize}
	}
	return data, nil
}

func check(name string, info fs.FileInfo) error {
	if kind := kindOf(info.Mode()); kind != "" {
		return &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("%w but %s", ErrKind, kind)}
	}
	if info.Size() > MaxSize {
		return &fs.PathError{Op: "read", Path: name, Err: ErrSize}
	}
	return nil
}

// kindOf is what stands in a regular file's place, or "".
func kindOf(mode fs.FileMode) string {
	switch {
	case mode.IsRegular():
		return ""
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	case mode&fs.ModeDevice != 0:
		return "a device"
	}
	return "something else"
}
