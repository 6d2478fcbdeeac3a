// Command resealctl configures, watches and measures a Reseal fleet.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"
)

// version is set by the linker. Empty: what the build information says.
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal ends watches in good order; a second one kills.
	context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], console{
		in:       os.Stdin,
		out:      os.Stdout,
		err:      os.Stderr,
		getenv:   os.Getenv,
		terminal: term.IsTerminal(int(os.Stdout.Fd())),
	})
	stop()
	os.Exit(code)
}

// console is what the command talks to.
type console struct {
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string
	terminal bool // whether out is a terminal
}

// colour says whether output may hold escape sequences for colour.
func (c console) colour() bool {
	return c.terminal && c.getenv("NO_COLOR") == "" && c.getenv("TERM") != "dumb"
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, io console) int {
	out := &checkedWriter{w: io.out}
	io.out, io.err = &visibleWriter{out}, &visibleWriter{io.err}
	a := &app{console: io}
	defer a.close()
	root := newRootCommand(a)
	root.SetArgs(args)
	root.SetIn(io.in)
	root.SetOut(io.out)
	root.SetErr(io.err)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		err = out.err
	}
	return a.finish(command, err)
}

// checkedWriter remembers the first error, so that commands need not look at
// each write and a full disk is still not taken for success.
type checkedWriter struct {
	w   io.Writer
	err error
}

func (c *checkedWriter) Write(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.w.Write(p)
	c.err = err
	return n, err
}
