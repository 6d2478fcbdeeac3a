package process

import (
	"bytes"
	"fmt"
	"os"
	"time"
)

// Usage is what a running program uses.
type Usage struct {
	// CPU is the processor time since its start.
	CPU time.Duration
	// Resident is its memory, Peak the most that it had so far, in bytes.
	Resident, Peak int64
}

// ticksPerSecond is the unit of CPU times in /proc, on all architectures of Linux
// that Go knows.
const ticksPerSecond = 100

// Usage reads /proc. It fails when the program has ended.
func (p *Process) Usage() (Usage, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	if err != nil {
		return Usage{}, err
	}
	// The name, in parentheses, may hold anything.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	var user, system, pages int64
	for field, into := range map[int]*int64{11: &user, 12: &system, 21: &pages} {
		if len(fields) <= field {
			return Usage{}, fmt.Errorf("/proc/%d/stat has %d fields", p.PID(), len(fields))
		}
		if _, err := fmt.Sscan(string(fields[field]), into); err != nil {
			return Usage{}, fmt.Errorf("/proc/%d/stat: %w", p.PID(), err)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		return Usage{}, err
	}
	var peak int64
	if _, line, ok := bytes.Cut(status, []byte("VmHWM:")); ok {
		_, _ = fmt.Sscan(string(line), &peak)
	}
	return Usage{
		CPU:      time.Duration(user+system) * time.Second / ticksPerSecond,
		Resident: pages * int64(os.Getpagesize()),
		Peak:     peak << 10,
	}, nil
}
