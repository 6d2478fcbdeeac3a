package bench

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// testRequests is a tenth of what `make bench-sessions` makes.
const testRequests = 5000

// TestSessions runs the scenarios of the arranged Jetty with Reseal and asserts
// what the backend counted.
func TestSessions(t *testing.T) {
	runAll(t, arranged(), func(*Scenario) int { return testRequests })
}

// stockRequests are enough to tell one full handshake from one of four. Rows in
// which edges come and go need more: with TLS 1.3 each edge first finds out how
// many tickets it needs.
const stockRequests, stockDriven = 1000, 4000

// TestStock runs the rows of the stock Jetty with Reseal. Other packages' tests run
// beside it, so the bounds are those of a loaded machine, twice those of a quiet
// one, which the command sessions asserts. With RESEAL_LONG=1 three rows run beside
// busy processes too, which would disturb every other test.
func TestStock(t *testing.T) {
	rows := stock()
	for _, s := range rows {
		s.Must, s.pool = 2*s.Must, patientPool
	}
	if os.Getenv("RESEAL_LONG") == "1" {
		for _, s := range loaded() {
			switch s.Key {
			case "loaded-tls12", "loaded-tls13", "loaded-cold":
				rows = append(rows, s)
			}
		}
	}
	runAll(t, rows, func(s *Scenario) int {
		if s.drive != nil {
			return stockDriven
		}
		return stockRequests
	})
}

func runAll(t *testing.T, scenarios []*Scenario, requests func(*Scenario) int) {
	b := newBench(t)
	for _, s := range scenarios {
		t.Run(s.Key, func(t *testing.T) {
			b.Fleet.TB = t
			defer func() { b.Fleet.TB = b.parent }()
			r, err := b.Run(t.Context(), s, ProxyReseal, requests(s))
			if errors.Is(err, process.ErrMissing) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("backend: %+v", r.Counts)
			t.Logf("edge: %+v", r.Ours)
			t.Logf("%d RSTs, %d late ones, %d TIME_WAIT, %d requests retried, took %v", r.Resets, r.LateResets, r.TimeWait, r.Retried, r.Took.Round(time.Millisecond))
			for _, problem := range s.Problems(r) {
				t.Error(problem)
			}
		})
	}
}

type testBench struct {
	*Bench
	parent testing.TB
}

// newBench starts a control plane and checks whether captures are possible. The
// daemons are as users get them: bounds in time are part of what is asserted.
func newBench(t *testing.T) testBench {
	t.Helper()
	authority, err := peers.NewAuthority("bench test")
	if err != nil {
		t.Fatal(err)
	}
	b := testBench{&Bench{Fleet: harness.NewShipped(t), Authority: authority, Dir: t.TempDir(), Capture: true}, t}
	if err := CanCapture(t.Context(), b.Dir); err != nil {
		t.Logf("resets are not asserted, since tshark can't capture: %v", err)
		b.Capture = false
	}
	b.Fleet.StartControlPlane()
	return b
}
