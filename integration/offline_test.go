package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// historyLimit is small, so that a few applies push a revision out.
const historyLimit = 5

// feedCounts are what a control plane sent since its start.
type feedCounts struct {
	empty, delta, full, resources float64
}

func (p *pair) feedCounts() feedCounts {
	m := p.Control.Metrics()
	return feedCounts{
		empty:     m.Sum("reseal_feed_updates_total", "type", "empty"),
		delta:     m.Sum("reseal_feed_updates_total", "type", "delta"),
		full:      m.Sum("reseal_feed_updates_total", "type", "full"),
		resources: m.Sum("reseal_feed_resources_sent_total"),
	}
}

// sent fails unless exactly want was sent since before.
func (p *pair) sent(t *testing.T, what string, before, want feedCounts) {
	t.Helper()
	after := p.feedCounts()
	got := feedCounts{after.empty - before.empty, after.delta - before.delta, after.full - before.full, after.resources - before.resources}
	if got != want {
		t.Errorf("%s: sent %+v, want %+v", what, got, want)
	}
}

// TestWithoutControlPlane kills the control plane under traffic, restarts an
// edge without it, and counts what is sent when it comes back.
func TestWithoutControlPlane(t *testing.T) {
	p := newPair(t, "--history-limit", fmt.Sprint(historyLimit))
	revision := p.Edges()[0].AckedRevision
	held := p.Edges()[0].Resources

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	traffic := p.traffic(ctx, t, 1)
	traffic.wait(t, 50)
	p.Control.Kill()
	traffic.wait(t, 200)

	// An edge that starts without a control plane serves what it had.
	p.edges[0].Kill()
	start := time.Now()
	p.edges[0].Start()
	p.edges[0].WaitReady()
	t.Logf("restarted edge ready after %v without a control plane", time.Since(start).Round(time.Millisecond))
	p.serve(0)
	if got := p.edges[0].Metrics().Sum("reseal_feed_connected"); got != 0 {
		t.Errorf("reseal_feed_connected is %v without a control plane", got)
	}
	if got := p.edges[0].Metrics().Sum("reseal_config_revision"); int64(got) != revision {
		t.Errorf("the restarted edge serves revision %v, want %d", got, revision)
	}
	traffic.wait(t, 50)

	// Both hold what the control plane has: nothing is sent.
	p.Control.Start()
	p.WaitAcked(revision, p.edges[:]...)
	p.sent(t, "nothing changed", feedCounts{}, feedCounts{empty: 2})

	// One resource changed while an edge was away: a delta of one resource to
	// each.
	if err := p.edges[0].Stop(); err != nil {
		t.Error(err)
	}
	revision = p.Apply(p.Pool("app", p.backends, "  timeouts: {responseHeader: 11s}\n"))
	p.WaitAcked(revision, p.edges[1])
	p.edges[0].Start()
	p.WaitAcked(revision, p.edges[:]...)
	// One that comes back before the change has gone to all edges first hears that it
	// has what it is to have until then.
	p.sent(t, "one resource changed", feedCounts{empty: p.feedCounts().empty}, feedCounts{delta: 2, resources: 2})
	p.serve(0)

	// The history has forgotten what the edge holds, and so has the control plane,
	// which remembers some of it too: everything is sent to the edge.
	if err := p.edges[0].Stop(); err != nil {
		t.Error(err)
	}
	for i := range historyLimit + 1 {
		revision = p.Apply(p.Pool("app", p.backends, fmt.Sprintf("  timeouts: {responseHeader: %ds}\n", 20+i)))
	}
	p.WaitAcked(revision, p.edges[1])
	p.Control.Kill()
	p.Control.Start()
	p.edges[0].Start()
	p.WaitAcked(revision, p.edges[:]...)
	p.sent(t, "history gone", feedCounts{}, feedCounts{empty: 1, full: 1, resources: float64(held)})

	traffic.wait(t, 50)
	cancel()
	traffic.end(t)
	p.serve(0)
	p.serve(1)
}

// TestDamagedState starts an edge whose last good configuration can't be read,
// without a control plane: it must not serve something else, and it must come
// back with one.
func TestDamagedState(t *testing.T) {
	p := newPair(t)
	revision := p.Edges()[0].AckedRevision
	if err := p.edges[0].Stop(); err != nil {
		t.Fatal(err)
	}
	damaged := 0
	entries, err := os.ReadDir(p.edges[0].StateDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		path := filepath.Join(p.edges[0].StateDir, entry.Name())
		data, err := os.ReadFile(path)
		// The largest file holds the configuration.
		if err != nil || len(data) < 2000 {
			continue
		}
		data[len(data)/2] ^= 1
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		damaged++
	}
	if damaged == 0 {
		t.Fatalf("found no file to damage in %v", entries)
	}
	before := p.feedCounts()
	p.edges[0].Start()
	p.WaitAcked(revision, p.edges[0])
	p.serve(0)
	if after := p.feedCounts(); after.full != before.full+1 {
		t.Errorf("%v full updates, want 1 more than %v", after.full, before.full)
	}
}

// traffic sends requests to one edge until it ends.
type traffic struct {
	done   chan struct{}
	count  atomic.Int64
	failed harness.Failures
}

func (p *pair) traffic(ctx context.Context, t *testing.T, edge int) *traffic {
	client := p.Client(t, p.addresses[edge], false)
	tr := &traffic{done: make(chan struct{})}
	go func() {
		defer close(tr.done)
		for ctx.Err() == nil {
			err := harness.Get(context.WithoutCancel(ctx), client, "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small))
			tr.failed.Add(err)
			tr.count.Add(1)
		}
	}()
	return tr
}

// wait returns after n further requests.
func (tr *traffic) wait(t *testing.T, n int64) {
	t.Helper()
	target := tr.count.Load() + n
	deadline := time.Now().Add(30 * time.Second)
	for tr.count.Load() < target {
		if time.Now().After(deadline) {
			t.Fatal("no traffic")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (tr *traffic) end(t *testing.T) {
	t.Helper()
	<-tr.done
	tr.failed.Check(t, tr.count.Load())
	t.Logf("%d requests meanwhile", tr.count.Load())
}
