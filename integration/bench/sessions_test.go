package bench

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// testRequests is a tenth of what `make bench-sessions` makes.
const testRequests = 5000

// TestSessions runs every scenario with Reseal and asserts what the backend
// counted.
func TestSessions(t *testing.T) {
	b := newBench(t)
	for _, s := range Scenarios() {
		t.Run(s.Key, func(t *testing.T) {
			b.Fleet.TB = t
			defer func() { b.Fleet.TB = b.parent }()
			r, err := b.Run(t.Context(), s, ProxyReseal, testRequests)
			if errors.Is(err, process.ErrMissing) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("backend: %+v", r.Counts)
			t.Logf("edge: %+v", r.Ours)
			t.Logf("%d RSTs, %d late ones, %d TIME_WAIT, %d requests retried, took %v", r.Resets, r.LateResets, r.TimeWait, r.Retried, r.Took.Round(time.Millisecond))
			for _, problem := range problems(s, r) {
				t.Error(problem)
			}
		})
	}
}

type testBench struct {
	*Bench
	parent testing.TB
}

// newBench starts a control plane and looks whether captures are possible. The
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

// problems are what is wrong with a result of Reseal.
func problems(s *Scenario, r Result) []string {
	var all []string
	check := func(ok bool, format string, args ...any) {
		if !ok {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	c, clients := r.Counts, int64(s.clientCount())
	check(s.Holds(r), "%d full handshakes at the backend, must be %d; misses: %v", c.Full, s.Must, r.Ours.Misses)
	check(r.Failed == 0, "%d requests failed; the first ones: %v", r.Failed, r.Errors)
	check(c.Failed == 0, "%d handshakes failed at the backend", c.Failed)
	check(r.Unclean == 0, "%d connections ended without close_notify; closes: %v", r.Unclean, r.Ours.Closes)
	check(r.Resets == 0 || r.ResetsByKernel, "%d RSTs from the edge", r.Resets)
	check(r.TimeWait == 0, "%d connections in TIME_WAIT on the edge's side", r.TimeWait)

	// Numbers that show that the scenario took place at all.
	requests := r.Done + r.Aborted
	check(c.Requests >= requests || s.restarts, "the backend had %d requests of %d", c.Requests, requests)
	check(c.Full+c.Resumed() == c.Connections, "%d connections, but %d full and %d resumed handshakes", c.Connections, c.Full, c.Resumed())
	check(c.Connections >= clients, "%d connections only: the clients did not come at the same time", c.Connections)
	check(!s.closeEach || c.Connections >= requests, "%d connections for %d requests: the backend did not close each", c.Connections, requests)
	check(s.aborts == 0 || r.Aborted > 0, "no request was aborted")

	var missed int64
	for _, n := range r.Ours.Misses {
		missed += n
	}
	check(missed == r.Ours.Full, "the edge gives %d reasons for %d full handshakes", missed, r.Ours.Full)
	same := r.Ours.Full == c.Full && r.Ours.Resumed == c.Resumed()
	if s.stops {
		same = r.Ours.Full <= c.Full && r.Ours.Resumed <= c.Resumed()
	}
	check(same, "the edge counts %d full and %d resumed handshakes, the backend %d and %d", r.Ours.Full, r.Ours.Resumed, c.Full, c.Resumed())
	return all
}
