package controlplane

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// restInterval is how often it is looked whether the process is at rest: whether it
	// has allocated less than restAllocated bytes meanwhile. After restIntervals of them a
	// burst is over.
	restInterval  = time.Second
	restAllocated = 16 << 20
	restIntervals = 5
	// worthFreeing is how much must be there to be given back, in percent of what is in
	// use.
	worthFreeing = 10
)

// memory gives memory back to the system when a burst is over: what a fleet left behind
// that connected, or came back, would stay for minutes otherwise.
type memory struct {
	quiet int // intervals at rest
}

// run does so until ctx ends. It returns nil.
func (m *memory) run(ctx context.Context) error {
	ticker := time.NewTicker(restInterval)
	defer ticker.Stop()
	before := readHeap()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			now := readHeap()
			if m.settled(before, now) {
				debug.FreeOSMemory()
			}
			before = now
		}
	}
}

// settled says whether memory should be given back now. It is so once after each burst.
func (m *memory) settled(before, now heap) bool {
	if now.allocated-before.allocated > restAllocated {
		m.quiet = 0
		return false
	}
	m.quiet++
	spare := now.free + now.objects - min(now.live, now.objects)
	return m.quiet == restIntervals && spare > (now.live+now.stacks)/100*worthFreeing
}

// heap is what the Go runtime says of its memory, in bytes.
type heap struct {
	live      uint64 // at the last collection
	objects   uint64 // live and garbage
	free      uint64 // not in use, and not given back to the system
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
