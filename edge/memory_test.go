package edge

import (
	"context"
	"runtime"
	"testing"
	"time"
)

// TestMemoryInUse: what is alive counts, what is garbage does not, even when
// nobody allocates.
func TestMemoryInUse(t *testing.T) {
	const size = 64 << 20
	m := &memory{limit: 32 << 20}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.run(ctx) }()
	wait := func(what string, reached func(used int64) bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !reached(m.Used()); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d bytes in use", what, m.Used())
			}
		}
	}
	held := make([]byte, size)
	runtime.GC()
	wait("held", func(used int64) bool { return used >= size })
	runtime.KeepAlive(held)
	held = nil
	_ = held
	wait("let go", func(used int64) bool { return used > 0 && used < size })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
