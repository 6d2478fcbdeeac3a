package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// tb lets the harness, which is made for tests, run in a command. Only what the
// harness needs works; all of it runs on one goroutine.
type tb struct {
	testing.TB
	dir      string
	cleanups []func()
	failures []string
}

// fatal is what Fatal panics with.
type fatal string

// try runs do and turns a Fatal into an error.
func (t *tb) try(do func() error) (err error) {
	defer func() {
		switch cause := recover().(type) {
		case nil:
		case fatal:
			err = errors.Join(err, errors.New(string(cause)))
		default:
			panic(cause)
		}
	}()
	return do()
}

// end runs what was registered with Cleanup and returns the failures.
func (t *tb) end() error {
	var errs []error
	for _, cleanup := range slices.Backward(t.cleanups) {
		errs = append(errs, t.try(func() error {
			cleanup()
			return nil
		}))
	}
	for _, failure := range t.failures {
		errs = append(errs, errors.New(failure))
	}
	return errors.Join(errs...)
}

func (t *tb) Helper() {}

func (t *tb) Cleanup(f func()) { t.cleanups = append(t.cleanups, f) }

func (t *tb) TempDir() string {
	dir, err := os.MkdirTemp(t.dir, "fleet-")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func (t *tb) Failed() bool { return len(t.failures) > 0 }

func (t *tb) Error(args ...any) {
	t.failures = append(t.failures, strings.TrimSpace(fmt.Sprintln(args...)))
}

func (t *tb) Errorf(format string, args ...any) {
	t.failures = append(t.failures, fmt.Sprintf(format, args...))
}

func (t *tb) Fatal(args ...any) { panic(fatal(strings.TrimSpace(fmt.Sprintln(args...)))) }

func (t *tb) Fatalf(format string, args ...any) { panic(fatal(fmt.Sprintf(format, args...))) }

func (t *tb) Log(args ...any) { fmt.Fprintln(os.Stderr, args...) }

func (t *tb) Logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
