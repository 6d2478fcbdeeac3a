package backend

import (
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// watchdog ends a transfer in which no byte moves for a time while somebody
// waits for one. A reader that takes its time does not count as idle.
type watchdog struct {
	limit   time.Duration
	bite    func()
	waiting atomic.Int32
	client  atomic.Int32 // how many of them wait for the client
	last    atomic.Int64 // when a byte moved, in ns since start
	start   time.Time

	mu      sync.Mutex
	timer   *time.Timer
	stopped bool
}

// newWatchdog returns a watchdog that calls bite, once, on its own goroutine.
// No limit, no watchdog: a nil *watchdog is valid.
func newWatchdog(limit time.Duration, bite func()) *watchdog {
	if limit <= 0 {
		return nil
	}
	w := &watchdog{limit: limit, bite: bite, start: time.Now()}
	w.mu.Lock()
	w.timer = time.AfterFunc(limit, w.check)
	w.mu.Unlock()
	return w
}

// touch notes that a byte has moved.
func (w *watchdog) touch() {
	if w != nil {
		w.last.Store(int64(time.Since(w.start)))
	}
}

// wait notes that somebody begins (1) or ends (-1) to wait for bytes.
func (w *watchdog) wait(delta int32) {
	if w == nil {
		return
	}
	if w.waiting.Add(delta) == 1 && delta > 0 {
		w.touch() // the first to wait
	}
}

// forClient reports whether somebody waits for the client.
func (w *watchdog) forClient() bool { return w.client.Load() > 0 }

// clientReader is a client's body that notes while it is waited for.
type clientReader struct {
	src io.Reader
	dog *watchdog
}

// Read implements io.Reader.
func (r clientReader) Read(p []byte) (int, error) {
	if r.dog == nil {
		return r.src.Read(p)
	}
	r.dog.client.Add(1)
	defer r.dog.client.Add(-1)
	return r.src.Read(p)
}

// idleFor is how long no byte has moved.
func (w *watchdog) idleFor() time.Duration {
	return time.Since(w.start) - time.Duration(w.last.Load())
}

func (w *watchdog) check() {
	idle := w.idleFor()
	w.mu.Lock()
	if w.stopped {
		w.mu.Unlock()
		return
	}
	if idle < w.limit || w.waiting.Load() == 0 {
		left := w.limit - idle
		if left <= 0 {
			left = w.limit
		}
		w.timer.Reset(left)
		w.mu.Unlock()
		return
	}
	w.stopped = true
	w.mu.Unlock()
	w.bite()
}

func (w *watchdog) stop() {
	if w == nil {
		return
	}
	w.mu.Lock()
	w.stopped = true
	w.timer.Stop()
	w.mu.Unlock()
}
