package fleetsim

import (
	"os"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// TestFleet runs all of a trial with a fleet that is small, and asserts what does not
// depend on how busy the machine is.
func TestFleet(t *testing.T) {
	trial := &Trial{
		Fleet: harness.NewShipped(t), Size: Size{Pools: 40, Listeners: 10, Routes: 40}, Edges: 200,
		Idle: 3 * reportInterval, Log: t.Logf,
	}
	r, err := trial.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	if r.Goroutines > 12.5 {
		t.Errorf("%.1f goroutines per edge", r.Goroutines)
	}
	if r.ChangeBytes > 2000 {
		t.Errorf("a change of one pool sends %.0f bytes to each edge", r.ChangeBytes)
	}
	if r.IdleBytes > 50 {
		t.Errorf("an edge where nothing happens reports %.0f bytes/s", r.IdleBytes)
	}
	back := r.Return
	if back.Full > 0 || back.Empty < int64(r.Edges) {
		t.Errorf("edges that came back with what they should hold got %d full and %d empty updates", back.Full, back.Empty)
	}
	if back.Dials > int64(r.Edges)*6/5 || back.Failed > int64(r.Edges)/100 {
		t.Errorf("%d edges came back by %d dials, of which %d failed", r.Edges, back.Dials, back.Failed)
	}
	if r.Connect > time.Minute || r.Back > time.Minute {
		t.Errorf("it takes %s to connect, %s to come back", r.Connect, r.Back)
	}
}
