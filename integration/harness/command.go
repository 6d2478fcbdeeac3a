package harness

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// Command lets the harness, which is made for tests, run in a command. Only what the
// harness needs works; all of it runs on one goroutine.
type Command struct {
	testing.TB
	dir      string
	cleanups []func()
	failures []string
}

// fatal is what Fatal panics with.
type fatal string

// NewCommand makes a Command whose temporary files are below dir.
func NewCommand(dir string) *Command { return &Command{dir: dir} }

// Try runs do and turns a Fatal into an error.
func (t *Command) Try(do func() error) (err error) {
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

// End runs what was registered with Cleanup and returns the failures.
func (t *Command) End() error {
	var errs []error
	for _, cleanup := range slices.Backward(t.cleanups) {
		errs = append(errs, t.Try(func() error {
			cleanup()
			return nil
		}))
	}
	for _, failure := range t.failures {
		errs = append(errs, errors.New(failure))
	}
	return errors.Join(errs...)
}

// Helper implements testing.TB.
func (t *Command) Helper() {}

// Cleanup implements testing.TB.
func (t *Command) Cleanup(f func()) { t.cleanups = append(t.cleanups, f) }

// TempDir implements testing.TB.
func (t *Command) TempDir() string {
	dir, err := os.MkdirTemp(t.dir, "fleet-")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Failed implements testing.TB.
func (t *Command) Failed() bool { return len(t.failures) > 0 }

// Error implements testing.TB.
func (t *Command) Error(args ...any) {
	t.failures = append(t.failures, strings.TrimSpace(fmt.Sprintln(args...)))
}

// Errorf implements testing.TB.
func (t *Command) Errorf(format string, args ...any) {
	t.failures = append(t.failures, fmt.Sprintf(format, args...))
}

// Fatal implements testing.TB.
func (t *Command) Fatal(args ...any) { panic(fatal(strings.TrimSpace(fmt.Sprintln(args...)))) }

// Fatalf implements testing.TB.
func (t *Command) Fatalf(format string, args ...any) { panic(fatal(fmt.Sprintf(format, args...))) }

// Log implements testing.TB.
func (t *Command) Log(args ...any) { fmt.Fprintln(os.Stderr, args...) }

// Logf implements testing.TB.
func (t *Command) Logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
