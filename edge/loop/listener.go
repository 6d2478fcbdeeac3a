package loop

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// Listener accepts connections and can be told to leave new ones in the kernel's
// accept queue.
type Listener struct {
	listener net.Listener
	accept   func(net.Conn)
	failed   func(err error, retry time.Duration)

	mu     sync.Mutex
	paused int
	change chan struct{} // closed when it is no longer paused; nil while it is not
}

// NewListener makes a Listener on l. Each connection is handed to accept, which must
// not block. failed, which may be nil, is told when none can be accepted, as without
// free descriptors, and after which time that is tried again.
func NewListener(l net.Listener, accept func(net.Conn), failed func(err error, retry time.Duration)) *Listener {
	if failed == nil {
		failed = func(error, time.Duration) {}
	}
	return &Listener{listener: l, accept: accept, failed: failed}
}

// Run accepts until ctx ends, closes the listener, and returns nil.
func (l *Listener) Run(ctx context.Context) error {
	defer l.listener.Close()
	stop := context.AfterFunc(ctx, func() { l.listener.Close() })
	defer stop()
	var retry time.Duration
	for l.mayAccept(ctx) {
		conn, err := l.listener.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close() // came too late
			}
			return nil
		case err == nil:
			retry = 0
			l.accept(conn)
		case !passedDeadline(err):
			retry = min(max(2*retry, 5*time.Millisecond), time.Second)
			l.failed(err, retry)
			sleep(ctx, retry)
		}
	}
	return nil
}

// Pause stops accepting. A connection that is being accepted is still handed over.
// Resume must be called as often as Pause.
func (l *Listener) Pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paused++; l.paused == 1 {
		l.change = make(chan struct{})
		l.deadline(time.Unix(1, 0)) // ends an Accept under way
	}
}

// Resume undoes one Pause.
func (l *Listener) Resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paused--; l.paused == 0 {
		l.deadline(time.Time{})
		close(l.change)
		l.change = nil
	}
}

func (l *Listener) deadline(t time.Time) {
	if d, ok := l.listener.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(t) // fails only on a closed listener
	}
}

// mayAccept waits while the Listener is paused, and reports false when ctx ends.
func (l *Listener) mayAccept(ctx context.Context) bool {
	l.mu.Lock()
	change := l.change
	l.mu.Unlock()
	if change == nil {
		return ctx.Err() == nil
	}
	select {
	case <-change:
		return true
	case <-ctx.Done():
		return false
	}
}

// passedDeadline reports whether Accept was ended by Pause.
func passedDeadline(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
