package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

const (
	exitFailure = 1
	exitUsage   = 2
)

// exitError ends the command with a code. A nil err prints nothing.
type exitError struct {
	code  int
	err   error
	usage bool // the command line is wrong
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usagef is the error for a wrong command line.
func usagef(format string, args ...any) error {
	return &exitError{code: exitUsage, err: fmt.Errorf(format, args...), usage: true}
}

// errNotFound is wrapped by errors that say that something does not exist.
var errNotFound = errors.New("not found")

// notFound is the error of a thing that does not exist.
func notFound(what, name string) error {
	return fmt.Errorf("%s %q %w", what, name, errNotFound)
}

// finish prints err, one line for each of the things it names, and returns the
// exit code.
func (a *app) finish(cmd *cobra.Command, err error) int {
	if err == nil {
		return 0
	}
	code, usage := exitFailure, false
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		code, usage = exit.code, exit.usage
	case !a.started:
		code, usage = exitUsage, true
	}
	for line := range strings.Lines(err.Error()) {
		a.warnf("Error: %s\n", strings.TrimRight(line, "\n"))
	}
	if usage {
		a.warnf("Run '%s --help' for its usage.\n", cmd.CommandPath())
	}
	return code
}
