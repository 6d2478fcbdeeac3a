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

// TestMemoryAtRest: what clients have left behind is given back to the system when
// nothing more happens, and not before.
func TestMemoryAtRest(t *testing.T) {
	const size = 128 << 20
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	litter(size)
	go func() { done <- (&memory{}).run(ctx) }()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		now := readHeap()
		if now.objects+now.free < size/2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes of objects and %d of free memory are kept", now.objects, now.free)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}

	freed := heap{objects: 1 << 30, allocated: 1 << 40}
	for name, test := range map[string]struct {
		allocated, lately uint64 // since memory was given back, since it was looked at last
		want              bool
	}{
		"at rest":      {1 << 28, 0, true},
		"hardly used":  {1 << 28, restAllocated - 1, true},
		"traffic":      {1 << 28, restAllocated, false},
		"little since": {1 << 27, 0, false},
	} {
		now := heap{objects: 1 << 30, allocated: freed.allocated + test.allocated}
		before := heap{allocated: now.allocated - test.lately}
		if got := now.atRest(before, freed); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// litter leaves garbage behind. The caller's stack has held nothing of it.
//
//go:noinline
func litter(size int) {
	garbage := make([]byte, size)
	for i := range garbage {
		garbage[i] = 1
	}
	runtime.KeepAlive(garbage)
}

// TestPace: a small heap may grow to 24 MiB, a larger one to twice what is alive.
func TestPace(t *testing.T) {
	for live, want := range map[uint64]int{
		0: 400, 1 << 20: 400, 6 << 20: 200, 8 << 20: 200, 10 << 20: 100, 1 << 30: 100,
	} {
		if got := (heap{live: live}).percent(); got != want {
			t.Errorf("%d bytes alive: %d%%, want %d%%", live, got, want)
		}
	}
}
