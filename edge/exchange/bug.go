package exchange

import (
	"fmt"
	"path"
	"runtime"
	"strings"
)

const (
	// maxBugReason bounds what of a panic's value is told, in bytes: it may hold
	// anything.
	maxBugReason = 256
	// maxBugFrames is how many callers of a panic are named.
	maxBugFrames = 12
	// module is left out of the names of functions.
	module = "github.com/reseal/reseal/"
)

// Bug is a panic that was caught: a fault of this program, or of a library. It costs
// what it happened in, and not the process, which serves everybody else. What it tells is
// bounded, so that it can be sent to the control plane.
type Bug struct {
	// During says in what it happened.
	During string
	// Reason is what was panicked with, at most 256 bytes of it.
	Reason string
	// Stack are the functions that it happened in with their lines, the innermost
	// first, at most 12.
	Stack string
}

// Error names all of it.
func (b *Bug) Error() string {
	return fmt.Sprintf("a panic while %s, which is a bug: %s [%s]", b.During, b.Reason, b.Stack)
}

// NewBug describes a panic with reason. Only the deferred function that recovered
// it may call it: the stack is still that of the panic there.
func NewBug(during string, reason any) *Bug {
	text := fmt.Sprint(reason)
	if len(text) > maxBugReason {
		text = strings.ToValidUTF8(text[:maxBugReason], "") + "…"
	}
	return &Bug{During: during, Reason: text, Stack: stackOfPanic()}
}

// Guard calls f and returns its error, or a *Bug if it panics.
func Guard(during string, f func() error) (err error) {
	defer func() {
		if reason := recover(); reason != nil {
			err = NewBug(during, reason)
		}
	}()
	return f()
}

// stackOfPanic names the functions below the newest panic.
func stackOfPanic() string {
	var callers [64]uintptr
	frames := runtime.CallersFrames(callers[:runtime.Callers(1, callers[:])])
	var names []string
	panicked := false
	for len(names) < maxBugFrames {
		frame, more := frames.Next()
		switch {
		case frame.Function == "runtime.gopanic":
			panicked, names = true, nil
		case panicked && !strings.HasPrefix(frame.Function, "runtime."):
			names = append(names, fmt.Sprintf("%s (%s:%d)", strings.TrimPrefix(frame.Function, module), path.Base(frame.File), frame.Line))
		}
		if !more {
			break
		}
	}
	return strings.Join(names, " < ")
}
