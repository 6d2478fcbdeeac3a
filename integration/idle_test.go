package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// maxIdleMemory is what an edge with a small configuration and no clients may
// use, in bytes.
const maxIdleMemory = 40 << 20

// TestIdleMemory measures an edge as it is shipped, without the race detector.
func TestIdleMemory(t *testing.T) {
	p := newPairOf(newWorldOf(t, harness.NewShipped(t)))
	p.serve(0)
	var resident int64
	harness.Settle(t, func() error {
		var err error
		if resident, err = residentMemory(p.edges[0].PID()); err != nil {
			return err
		}
		if resident >= maxIdleMemory {
			return fmt.Errorf("an idle edge uses %.1f MB, want less than %d", float64(resident)/(1<<20), maxIdleMemory>>20)
		}
		return nil
	})
	t.Logf("an idle edge uses %.1f MB", float64(resident)/(1<<20))
	p.memoryPerClient(t)
}

// memoryPerClient only reports.
func (p *pair) memoryPerClient(t *testing.T) {
	before, err := residentMemory(p.edges[1].PID())
	if err != nil {
		t.Fatal(err)
	}
	const clients = 200
	for range clients {
		client := p.Client(t, p.addresses[1], false)
		if err := harness.Get(t.Context(), client, "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(500 * time.Millisecond)
	after, err := residentMemory(p.edges[1].PID())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d idle client connections cost %.1f KB each", clients, float64(after-before)/clients/1024)
}

// residentMemory is VmRSS of a process, in bytes.
func residentMemory(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kilobytes int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kilobytes); n == 1 {
			return kilobytes << 10, nil
		}
	}
	return 0, fmt.Errorf("no VmRSS in /proc/%d/status", pid)
}
