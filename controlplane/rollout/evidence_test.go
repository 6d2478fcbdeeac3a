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
