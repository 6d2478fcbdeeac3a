package backend

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"
)

// A panic is a bug, of ours or of what we call. It costs the connection or the
// request that it happened on, and leaves a stack in the log; the process, which
// serves everybody else, lives on.

// caught is deferred where a panic is to become an error.
func (b *Backend) caught(what string, err *error) {
	if p := recover(); p != nil {
		*err = b.panicked(what, p)
	}
}

func (b *Backend) panicked(what string, p any) error {
	b.cfg.Logger.Error("panic: this is a bug", "during", what, "panic", p, "stack", string(debug.Stack()))
	return fail(ReasonInternal, fmt.Errorf("panic during %s: %v", what, p))
}

// guarded runs f and reports what it panicked with, if it did.
func (b *Backend) guarded(what string, f func()) (err error) {
	defer b.caught(what, &err)
	f()
	return nil
}

// spawn runs f on a goroutine that Run waits for.
func (b *Backend) spawn(what string, f func()) {
	b.live.add()
	go func() {
		defer b.live.done()
		_ = b.guarded(what, f)
	}()
}

// restartPause is how long a loop rests after a panic.
const restartPause = time.Second

// loop runs f until it returns, again after each panic while ctx lasts.
func (b *Backend) loop(ctx context.Context, what string, f func(context.Context)) {
	for b.guarded(what, func() { f(ctx) }) != nil {
		timer := time.NewTimer(restartPause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// guard is what connections have of the backend.
type guard struct{ b *Backend }

// Spawn implements conn.Guard.
func (g guard) Spawn(what string, f func()) { g.b.spawn(what, f) }

// Caught implements conn.Guard.
func (g guard) Caught(what string, err *error) {
	if p := recover(); p != nil {
		*err = g.b.panicked(what, p)
	}
}
