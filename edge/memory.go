package edge

import (
	"context"
	"runtime"
	"runtime/debug"
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

const (
	// restInterval is how often it is looked whether the edge is at rest, and
	// restAllocated is what it may have allocated in that time, in bytes.
	restInterval  = 2 * time.Second
	restAllocated = 4 << 20
	// worthFreeing is how much must have been allocated since memory was given back
	// to the system, in percent of the heap, and freeLeast in bytes.
	worthFreeing = 25
	freeLeast    = 16 << 20
	// heapFloor is up to what size, in bytes, the heap may always grow between two
	// collections. With little alive the collector would otherwise run many times a
	// second. It is no more than this since what lives long comes to lie scattered among
	// garbage, in memory that can't be given back: the larger the heap grew while
	// clients connected, the more their idle connections hold.
	heapFloor = 24 << 20
	// heapLeast is what is taken to be alive at least, before a collection has told.
	heapLeast = 4 << 20
)

// memory measures what the process uses: what was alive at the last garbage
// collection, and stacks. What is garbage does not count, since it goes when
// memory becomes short (debug.SetMemoryLimit), and, when the edge comes to rest, by
// run.
type memory struct {
	limit int64 // 0: none
	paced bool  // the collector's pace is set here
	used  atomic.Int64

	percent int // the pace that was set last; run's
}

// Used is the last measurement, in bytes.
func (m *memory) Used() int64 { return m.used.Load() }

// run measures until ctx ends.
func (m *memory) run(ctx context.Context) error {
	rest := time.NewTicker(restInterval)
	defer rest.Stop()
	var measure <-chan time.Time // never without a limit
	if m.limit > 0 {
		ticker := time.NewTicker(memoryInterval)
		defer ticker.Stop()
		measure = ticker.C
	}
	before, collected := readHeap(), time.Now()
	var freed heap // after memory was given back
	m.used.Store(before.used())
	m.pace(before)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-measure:
			now := readHeap()
			m.used.Store(now.used())
			m.pace(now)
			if m.Used() > m.limit/100*collectAbove && time.Since(collected) >= collectInterval {
				runtime.GC()
				collected = time.Now()
			}
		case <-rest.C:
			now := readHeap()
			m.pace(now)
			if now.atRest(before, freed) {
				// Clients that connected left garbage, as many times of what they hold now
				// as the collector lets grow. Without traffic nothing would collect it for
				// minutes.
				debug.FreeOSMemory()
				now = readHeap()
				freed = now
			}
			before = now
		}
	}
}

// pace lets the heap grow to heapFloor between two collections, or to twice what is
// alive. A limit that comes near has its own way (debug.SetMemoryLimit).
func (m *memory) pace(now heap) {
	if percent := now.percent(); m.paced && percent != m.percent {
		m.percent = percent
		debug.SetGCPercent(percent)
	}
}

// heap is what the Go runtime says of its memory, in bytes.
type heap struct {
	live      uint64 // at the last collection
	objects   uint64 // live and garbage
	free      uint64 // may be given back to the system
	stacks    uint64
	allocated uint64 // ever
}

func readHeap() heap {
	samples := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/stacks:bytes"}, {Name: "/gc/heap/allocs:bytes"},
	}
	metrics.Read(samples)
	return heap{
		live: samples[0].Value.Uint64(), objects: samples[1].Value.Uint64(), free: samples[2].Value.Uint64(),
		stacks: samples[3].Value.Uint64(), allocated: samples[4].Value.Uint64(),
	}
}

func (h heap) used() int64 { return int64(h.live + h.stacks) }

// percent is by how much the heap may grow over what is alive, in percent, in steps
// so that it rarely changes.
func (h heap) percent() int {
	percent := 100
	for percent < 1600 && max(h.live, heapLeast)*uint64(2*percent+100)/100 <= heapFloor {
		percent *= 2
	}
	return percent
}

// atRest reports whether next to nothing was allocated since before, and enough
// since memory was given back that a collection may find much. What is garbage is
// only known by one.
func (h heap) atRest(before, freed heap) bool {
	since := h.allocated - freed.allocated
	return h.allocated-before.allocated < restAllocated && since > freeLeast && since > (h.objects+h.free)/100*worthFreeing
}
