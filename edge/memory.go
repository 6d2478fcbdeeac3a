package edge

import (
	"context"
	"runtime"
	"runtime/metrics"
	"sync/atomic"
	"time"
)

const (
	// memoryInterval is how often the memory in use is looked at.
	memoryInterval = 100 * time.Millisecond
	// collectInterval is how often a garbage collection is asked for while the
	// memory in use keeps new requests out: without requests there might be none,
	// and what is in use is only known by one.
	collectInterval = time.Second
	// collectAbove is the share of the limit, in percent, from where it is.
	collectAbove = 75
)

// memory measures what the process uses: what was alive at the last garbage
// collection, and stacks. What is garbage does not count, since it goes when
// memory becomes short (debug.SetMemoryLimit).
type memory struct {
	limit int64 // 0: none
	used  atomic.Int64
}

// Used is the last measurement, in bytes.
func (m *memory) Used() int64 { return m.used.Load() }

// run measures until ctx ends.
func (m *memory) run(ctx context.Context) error {
	if m.limit <= 0 {
		return nil
	}
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	ticker := time.NewTicker(memoryInterval)
	defer ticker.Stop()
	collected := time.Now()
	for {
		metrics.Read(samples)
		m.used.Store(int64(samples[0].Value.Uint64() + samples[1].Value.Uint64()))
		if m.Used() > m.limit/100*collectAbove && time.Since(collected) >= collectInterval {
			runtime.GC()
			collected = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}
