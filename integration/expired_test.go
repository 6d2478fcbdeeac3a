package integration

import (
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/peers"
)

// TestEdgeComesBack: an edge that was stopped for longer than its certificate lasts has
// the newest configuration soon after its start, without a new token; not so once it
// was revoked.
func TestEdgeComesBack(t *testing.T) {
	w := newWorld(t)
	const life = 10 * time.Second
	w.StartControlPlane("--edge-cert-ttl", life.String())
	edge := w.StartEdge("e1", "")
	backend := w.Launch(t, peers.Go, peers.Options{})
	w.WaitAcked(w.Apply(w.Pool("app", []*peers.Backend{backend}, "")), edge)
	if err := edge.Stop(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(life + time.Second)
	revision := w.Apply(w.Pool("app", []*peers.Backend{backend}, "  timeouts: {responseHeader: 11s}\n"))
	edge.Start()
	if took := w.WaitAcked(revision, edge); took > 15*time.Second {
		t.Errorf("back after %s", took)
	}
	if err := edge.Stop(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(life + time.Second)
	w.Ctl("revoke", "e1", "--reason", "stolen")
	edge.Start()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(edge.Output(), "stolen"); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the edge does not say that it was revoked")
		}
	}
	if edges := w.Edges(); len(edges) != 0 && edges[0].State == "synced" {
		t.Errorf("it is back: %+v", edges)
	}
}
