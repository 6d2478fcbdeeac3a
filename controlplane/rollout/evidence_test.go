package rollout

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// An edge that fails requests since it has the candidate stops it, others and its own
// past being well; one that does as before does not.
func TestEvidence(t *testing.T) {
	for _, spoil := range []bool{false, true} {
		r, f, i := begun(t, 3, nil)
		ill, round := f.Edges[i].ID, uint64(1)
		e := &evidence{stats: func(_ context.Context, edge string, since time.Duration) (*resealv1.EdgeStats, error) {
			if edge == f.Edges[(i+1)%3].ID {
				return nil, status.Error(codes.NotFound, "it does not report")
			}
			listener := &resealv1.Stats{Name: "web", Requests: 100 * round}
			if since == 0 && edge == ill && spoil {
				listener.Errors = map[string]uint64{"no_route": 80 * (round - 1)}
			}
			return &resealv1.EdgeStats{Edge: edge, Listeners: []*resealv1.Stats{listener}}, nil
		}}
		for ; round <= 2; round++ {
			e.compared = time.Time{}
			shares, err := e.shares(t.Context(), r, f.Edges)
			if err != nil {
				t.Fatal(err)
			}
			f.Shares = shares
			next := Step(start.Add(time.Second), r, f)
			if stopped := next.Phase == resealv1.Rollout_PHASE_UNDONE; stopped != (spoil && round == 2) {
				t.Errorf("round %d, spoilt %v: %s %q", round, spoil, next.Phase, next.Reason)
			} else if stopped && !strings.Contains(next.Reason, "80.0% of 100 requests of clients failed") {
				t.Errorf("%q", next.Reason)
			}
		}
	}
}

// An edge's own past is what it counted before the change began: that it fails requests
// since then must not make its past look bad.
func TestPastIsBeforeTheChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, f, _ := begun(t, 2, nil)
		time.Sleep(time.Until(start) + 10*time.Minute)
		r.Begun, r.Entered = time.Now(), time.Now()
		time.Sleep(20 * time.Second)
		// The edge serves 10 requests a second; since the change all fail.
		e := &evidence{stats: func(_ context.Context, edge string, since time.Duration) (*resealv1.EdgeStats, error) {
			failed := 10 * uint64(time.Since(r.Begun).Seconds())
			all := 10 * uint64(since.Seconds())
			if since == 0 {
				all = 10 * uint64(time.Since(start).Seconds())
			}
			return &resealv1.EdgeStats{Edge: edge, Listeners: []*resealv1.Stats{{
				Name: "web", Requests: all, Errors: map[string]uint64{"no_route": min(failed, all)},
			}}}, nil
		}}
		shares, err := e.shares(t.Context(), r, f.Edges)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := shares.Errors[0].Past, (Share{Count: 0, Of: 600}); got != want {
			t.Errorf("the past is %+v, want %+v", got, want)
		}
	})
}

// What backends answer and how long clients wait counts, against something to compare
// with, and for waits once the edge has its connections again.
func TestStatusesAndWaits(t *testing.T) {
	type counted struct {
		answers, waits map[string]uint64
	}
	well := counted{map[string]uint64{"2xx": 100}, map[string]uint64{"10ms": 90, "30ms": 10}}
	for name, test := range map[string]struct {
		moved counted
		want  string // in the reason
	}{
		"as before":             {well, ""},
		"5xx of the backend":    {counted{map[string]uint64{"2xx": 60, "5xx": 40}, well.waits}, "40.0% of 200 requests of clients were answered with 5xx on edges that have it, 0.0% on edges without it"},
		"4xx":                   {counted{map[string]uint64{"4xx": 100}, well.waits}, ""},
		"a little slower":       {counted{well.answers, map[string]uint64{"10ms": 40, "30ms": 60}}, ""},
		"much slower":           {counted{well.answers, map[string]uint64{"10ms": 40, "300ms": 60}}, "60.0% of 100 requests of clients waited longer than 100ms on edges that have it, 0.0% longer than 30ms on edges without it"},
		"too few to say":        {counted{map[string]uint64{"5xx": 9}, map[string]uint64{"longer": 19}}, ""},
		"slower than all there": {counted{well.answers, map[string]uint64{"longer": 100}}, "100.0% of 100 requests of clients waited longer than 10s"},
	} {
		t.Run(name, func(t *testing.T) {
			r, f, i := begun(t, 4, nil)
			round := uint64(0)
			times := func(m map[string]uint64) map[string]uint64 {
				grown := map[string]uint64{}
				for key, n := range m {
					grown[key] = n * round
				}
				return grown
			}
			e := &evidence{stats: func(_ context.Context, edge string, since time.Duration) (*resealv1.EdgeStats, error) {
				is := well
				if edge == f.Edges[i].ID {
					is = test.moved
				}
				return &resealv1.EdgeStats{Edge: edge, Listeners: []*resealv1.Stats{{
					Name: "web", Requests: 100 * round, Answers: times(is.answers), Waits: times(is.waits),
				}}}, nil
			}}
			for ; round <= 2; round++ {
				e.compared = time.Time{}
				shares, err := e.shares(t.Context(), r, f.Edges)
				if err != nil {
					t.Fatal(err)
				}
				f.Shares = shares
				if f.Shares.Latency[0].Moved.Of > 0 != (round == 2) {
					t.Errorf("in round %d %d waits are compared", round, f.Shares.Latency[0].Moved.Of)
				}
			}
			next := Step(start.Add(time.Second), r, f)
			if stopped := next.Phase == resealv1.Rollout_PHASE_UNDONE; stopped != (test.want != "") || !strings.Contains(next.Reason, test.want) {
				t.Errorf("%s: %q, want %q", next.Phase, next.Reason, test.want)
			}
		})
	}
}
