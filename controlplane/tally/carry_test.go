package tally

import (
	"context"
	"io"
	"log/slog"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newTestServer(options ...func(*Config)) *Server {
	config := Config{Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), Registerer: prometheus.NewRegistry()}
	for _, option := range options {
		option(&config)
	}
	return New(config)
}

func newTestStream(id string) *stream {
	return &stream{
		id: id, line: fleet.Detached(), done: make(chan struct{}), reported: make(chan struct{}),
	}
}

// report takes in what an edge says of pools: pairs of names and requests.
func (s *Server) report(t *testing.T, from *stream, boot string, pools map[string]uint64) {
	t.Helper()
	message := &resealv1.ReportRequest{Edge: from.id, BootId: boot}
	for name, count := range pools {
		message.Pools = append(message.Pools, &resealv1.Stats{
			Name: name, Requests: count, Connections: &resealv1.ConnectionStats{Active: 1},
		})
	}
	if err := s.takeMessage(from, message); err != nil {
		t.Fatal(err)
	}
}

// TestTotalsNeverFall: not when an edge starts again, leaves, gives up a pool, or
// counts backwards. What is told of the edges themselves is since their boot.
func TestTotalsNeverFall(t *testing.T) {
	s := newTestServer()
	total := func(want uint64, active int64) {
		t.Helper()
		pools, _ := s.fleet()
		if got := pools["app"]; got.plain[requests] != want || got.active != active {
			t.Errorf("the fleet counts %d requests and %d active, want %d and %d", got.plain[requests], got.active, want, active)
		}
	}
	a, b := newTestStream("a"), newTestStream("b")
	s.report(t, a, "1", map[string]uint64{"app": 1_000_000})
	s.report(t, b, "1", map[string]uint64{"app": 1_000_000})
	total(2_000_000, 2)
	s.report(t, a, "2", map[string]uint64{"app": 3}) // started again
	total(2_000_003, 2)
	s.report(t, a, "2", nil) // the pool is gone for a moment
	total(2_000_003, 1)
	s.report(t, a, "2", map[string]uint64{"app": 5}) // and back
	total(2_000_005, 2)
	s.report(t, a, "2", nil)
	s.report(t, a, "2", map[string]uint64{"app": 1}) // back from 0
	total(2_000_006, 2)
	s.report(t, a, "2", nil)
	s.report(t, a, "3", map[string]uint64{"app": 1}) // gone with its process
	total(2_000_007, 2)
	s.report(t, b, "1", map[string]uint64{"app": 10}) // counts backwards
	total(2_000_017, 2)
	if got := s.words.unpack(s.edges["a"].newest.pools[0]).plain[requests]; got != 1 {
		t.Errorf("edge a itself counts %d", got)
	}
	s.mu.Lock()
	s.forgetLocked(s.edges["a"])
	s.mu.Unlock()
	total(2_000_017, 1)
}

// TestReportsOfOthers: an edge can't report pools that it does not have, nor names
// that no resource can have.
func TestReportsOfOthers(t *testing.T) {
	assigned := map[string]bool{"app": true}
	s := newTestServer(func(c *Config) {
		c.Assigned = func(context.Context) (pools, listeners map[string]bool) { return assigned, nil }
	})
	a := newTestStream("a")
	s.report(t, a, "1", map[string]uint64{"app": 1, "other": 2, "\x1b[2J\a": 3})
	if pools, _ := s.fleet(); len(pools) != 1 || pools["app"].plain[requests] != 1 {
		t.Errorf("the fleet's pools: %v", pools)
	}
	if got := testutil.ToFloat64(s.ignored); got != 2 {
		t.Errorf("%v were counted as ignored, want 2", got)
	}
	// It may serve the configuration from before.
	assigned = map[string]bool{}
	s.report(t, a, "1", map[string]uint64{"app": 2})
	if pools, _ := s.fleet(); pools["app"].plain[requests] != 2 {
		t.Errorf("a pool of an older configuration is lost: %v", pools)
	}
	s.report(t, a, "2", map[string]uint64{"app": 1})
	if got := len(s.edges["a"].newest.pools); got != 0 {
		t.Errorf("a new process reports %d pools", got)
	}
	if word := s.words[byMiss].word(uint64(s.words[byMiss].place([]byte("\x1b]0;")))); word != otherWord {
		t.Errorf("a reason is %q", word)
	}
}

func TestAssignments(t *testing.T) {
	listener := func(name, pool, zone string) *resealv1.Resource {
		r := resealv1.NewResource("Listener")
		r.Metadata.Name = name
		r.GetListener().Pool = pool
		if zone != "" {
			r.GetListener().EdgeSelector = &resealv1.EdgeSelector{MatchLabels: map[string]string{"zone": zone}}
		}
		return r
	}
	route := resealv1.NewResource("Route")
	route.Metadata.Name = "r"
	route.GetRoute().Listeners = []string{"us"}
	route.GetRoute().Pools = []*resealv1.WeightedPool{{Name: "canary"}}
	snapshot := resealv1.NewSnapshot("c", 1, []*resealv1.Resource{listener("all", "app", ""), listener("us", "", "us"), route})
	var assignments Assignments
	for _, test := range []struct {
		labels           map[string]string
		pools, listeners int
	}{{nil, 2, 2}, {map[string]string{}, 1, 1}, {map[string]string{"zone": "us"}, 2, 2}, {map[string]string{"zone": "eu"}, 1, 1}} {
		for range 2 {
			pools, listeners := assignments.Of(snapshot, test.labels)
			if len(pools) != test.pools || len(listeners) != test.listeners {
				t.Errorf("%v: %v, %v", test.labels, pools, listeners)
			}
		}
	}
	if pools, _ := assignments.Of(snapshot.With(2, nil, []*resealv1.ResourceRef{route.Ref()}), nil); len(pools) != 1 {
		t.Errorf("after a change: %v", pools)
	}
}
