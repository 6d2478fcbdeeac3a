package budget

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is what a Server looks at.
type world struct {
	mu       sync.Mutex
	snapshot *resealv1.Snapshot
	base     *resealv1.Snapshot
	members  []fleet.Member
	complete bool
	changed  chan struct{}
	looks    int
	told     int // times that shares changed
	log      strings.Builder
}

func (w *world) with(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) Next(ctx context.Context, after int64) (*resealv1.Snapshot, error) {
	for {
		w.mu.Lock()
		newest, changed := w.snapshot, w.changed
		w.mu.Unlock()
		if newest.Revision() > after {
			return newest, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (w *world) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(line)
}

// apply makes the budgets of pools those of the next revision. 0 is none.
func (w *world) apply(budgets map[string]uint32) {
	w.with(func() {
		var pools []*resealv1.Resource
		for name, n := range budgets {
			limits := &resealv1.Connections{}
			if n > 0 {
				limits.MaxPerFleet = &n
			}
			pools = append(pools, &resealv1.Resource{
				Metadata: &resealv1.Metadata{Name: name},
				Spec:     &resealv1.Resource_BackendPool{BackendPool: &resealv1.BackendPool{Connections: limits}},
			})
		}
		w.snapshot = w.snapshot.With(w.snapshot.Revision()+1, pools, nil)
	})
}

// start runs a Server in a bubble.
func start(t *testing.T) (*world, *Server) {
	w := &world{snapshot: resealv1.NewSnapshot("c", 1, nil), complete: true, changed: make(chan struct{})}
	s := New(Config{
		Source: w,
		Base: func() *resealv1.Snapshot {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.base
		},
		Live: func() ([]fleet.Member, bool, <-chan struct{}) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.looks++
			return w.members, w.complete, w.changed
		},
		Pools:   pools,
		Changed: func() { w.mu.Lock(); w.told++; w.mu.Unlock() },
		Logger:  slog.New(slog.NewTextHandler(w, nil)),
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	synctest.Wait()
	return w, s
}

func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (s *Server) want(t *testing.T, edge, pool string, budget, want uint32) {
	t.Helper()
	got, ok := s.Share(edge, pool, budget)
	if got != want || ok != (want > 0) {
		t.Errorf("edge %s has %d of %d of pool %s (known: %t), want %d", edge, got, budget, pool, ok, want)
	}
}

func TestServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, s := start(t)
		w.with(func() { w.members = members("a", "b") })
		after(time.Hour)
		if w.looks != 0 {
			t.Errorf("without a budget the fleet was looked at %d times", w.looks)
		}
		w.apply(map[string]uint32{"all": 10, "some": 0})
		after(time.Second)
		s.want(t, "a", "all", 10, 5)
		s.want(t, "a", "some", 10, 0)

		// While a change is under way both budgets are divided.
		w.with(func() { w.base = w.snapshot })
		w.apply(map[string]uint32{"all": 2})
		after(time.Second)
		s.want(t, "a", "all", 10, 5)
		s.want(t, "a", "all", 2, 1)

		told := w.told
		w.with(func() {}) // news that say nothing
		after(time.Second)
		if w.told != told {
			t.Error("edges were looked at though nothing had changed")
		}
		w.with(func() { w.members = members("a", "b", "c") })
		after(time.Second)
		s.want(t, "c", "all", 10, 1)
		if !strings.Contains(w.log.String(), "maxPerFleet is exceeded") {
			t.Errorf("2 connections for 3 edges are not told of: %s", w.log.String())
		}
		after(settle)
		if share, _ := s.Share("c", "all", 10); share < 3 {
			t.Errorf("c has %d of 10 among 3", share)
		}
		w.with(func() { w.members = members("a", "b"); w.base = nil })
		after(time.Minute)
		s.want(t, "a", "all", 2, 1)
		if !strings.Contains(w.log.String(), "enough for all edges again") {
			t.Errorf("logged: %s", w.log.String())
		}
		w.apply(map[string]uint32{"all": 0})
		after(time.Second)
		s.want(t, "a", "all", 2, 0)
	})
}

// Before the fleet is known nothing is divided, and what was told stands.
func TestFleetNotKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, s := start(t)
		w.with(func() { w.complete, w.members = false, members("a") })
		w.apply(map[string]uint32{"all": 10})
		after(20 * time.Second)
		s.want(t, "a", "all", 10, 0)
		w.mu.Lock()
		w.complete, w.members = true, members("a", "b") // that only time tells
		w.mu.Unlock()
		after(2 * time.Second)
		s.want(t, "a", "all", 10, 5)

		vague := append(members("a", "b"), fleet.Member{ID: "c", Vague: true})
		w.with(func() { w.members = vague })
		after(patience - time.Second)
		s.want(t, "a", "all", 10, 5)
		after(3 * time.Second)
		if share, _ := s.Share("a", "all", 10); share > 4 {
			t.Errorf("an edge of which nothing is known is not counted: a has %d", share)
		}
	})
}

func TestSelectors(t *testing.T) {
	n := uint32(4)
	pool := &resealv1.Resource{Metadata: &resealv1.Metadata{Name: "p"}, Spec: &resealv1.Resource_BackendPool{BackendPool: &resealv1.BackendPool{}}}
	listener := &resealv1.Resource{Metadata: &resealv1.Metadata{Name: "l"}, Spec: &resealv1.Resource_Listener{Listener: &resealv1.Listener{
		EdgeSelector: &resealv1.EdgeSelector{MatchLabels: map[string]string{"site": "x"}},
	}}}
	if got := Selectors(resealv1.NewSnapshot("c", 1, []*resealv1.Resource{pool, listener})); got != nil {
		t.Errorf("without a budget: %v", got)
	}
	pool.GetBackendPool().Connections = &resealv1.Connections{MaxPerFleet: &n}
	got := Selectors(resealv1.NewSnapshot("c", 1, []*resealv1.Resource{pool, listener}))
	if len(got) != 1 || got[0].GetMatchLabels()["site"] != "x" {
		t.Errorf("got %v", got)
	}
}
