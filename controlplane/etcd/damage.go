package etcd

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap/zapcore"
)

// fatal takes what etcd calls fatal or panics about. etcd would end the process,
// with a trace that says nothing to those who have to mend it; here the goroutine
// ends, and the store has failed.
type fatal struct {
	once     sync.Once
	err      error         // set before happened is closed
	happened chan struct{} // closed at the first
}

func newFatal() *fatal { return &fatal{happened: make(chan struct{})} }

// OnWrite implements zapcore.CheckWriteHook.
func (f *fatal) OnWrite(entry *zapcore.CheckedEntry, fields []zapcore.Field) {
	text := entry.Message
	for _, field := range fields {
		if err, ok := field.Interface.(error); ok && field.Type == zapcore.ErrorType {
			f.note(fmt.Errorf("%s: %w", text, err))
			runtime.Goexit()
		}
	}
	f.note(errors.New(text))
	runtime.Goexit()
}

func (f *fatal) note(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.happened)
	})
}

// error is what happened, nil when nothing did.
func (f *fatal) error() error {
	select {
	case <-f.happened:
		return f.err
	default:
		return nil
	}
}

// startEtcd is embed.StartEtcd, except that a damaged store is an error. What it
// leaves behind then ends with the process.
func (f *fatal) startEtcd(config *embed.Config) (*embed.Etcd, error) {
	if err := preflight(config.Dir); err != nil {
		return nil, err
	}
	type result struct {
		etcd *embed.Etcd
		err  error
	}
	started := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			if reason := recover(); reason != nil {
				r = result{err: fmt.Errorf("%v", reason)}
				f.note(r.err)
			} else if r.etcd == nil && r.err == nil { // by Goexit
				r.err = f.error()
			}
			started <- r
		}()
		// A database file that was cut short is read beyond its end.
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		r.etcd, r.err = embed.StartEtcd(config)
	}()
	select {
	case r := <-started:
		return r.etcd, r.err
	case <-f.happened: // what has begun may wait for ever for the goroutine that ended
		return nil, f.err
	}
}

// whatToDo is advice for whoever can't open the embedded store in dir.
func whatToDo(dir string, cause error) string {
	switch {
	case errors.Is(cause, os.ErrPermission):
		return "run it as the user who owns the folder"
	case errors.Is(cause, syscall.ENOSPC):
		return "make room on the disk"
	case errors.Is(cause, syscall.EMFILE), strings.Contains(cause.Error(), "too many open files"):
		return "raise the limit of open files (ulimit -n, LimitNOFILE)"
	}
	return "its files seem to be damaged: stop everything that writes there, put back a copy of the folder that was made while the control plane was stopped, or move the folder away to start with an empty store (then edges have to enrol again and manifests to be applied again; edges keep serving meanwhile)"
}
