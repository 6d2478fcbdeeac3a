// Package budget divides what a backend can carry, connections.maxPerFleet of pools,
// over the edges of the fleet.
//
// Nobody is elected for that and nothing is written: which edges live all replicas know
// alike, so each comes to the same division by itself, and tells it to the edges that
// are connected to it. What they know differs for a moment after a change; that shares
// rise late (division.go) is what makes up for it.
package budget

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/reseal/reseal/controlplane/fleet"
	"github.com/reseal/reseal/controlplane/mirror"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// gather is the least time between two divisions: a crowd of edges that come costs
	// few, each of which looks at all edges.
	gather = 250 * time.Millisecond
	// lookInterval is how often it is looked whether the fleet is known by now, and
	// refreshInterval how often all is, once it is: nobody tells when the edges no longer
	// have Config.Base.
	lookInterval    = time.Second
	refreshInterval = 30 * time.Second
	// patience is how long edges whose labels are not known yet are waited for. Then
	// they count in all pools.
	patience = 10 * time.Second
)

// Source is where snapshots come from. It is safe for concurrent use.
type Source interface {
	// Next waits for a snapshot newer than revision after and returns the
	// newest. When revisions started anew it may return a lower one. It fails
	// when ctx ends or the source has ended.
	Next(ctx context.Context, after int64) (*resealv1.Snapshot, error)
}

// Config is what a Server needs. It is read once, by New. Functions are safe for
// concurrent use.
type Config struct {
	// Source has the pools. Required.
	Source Source
	// Base is a configuration that edges have beside the newest, nil when there is none.
	// Required.
	Base func() *resealv1.Snapshot
	// Live are the edges of the whole fleet that live, with the labels that Selectors
	// ask for. Before they are all known, complete is false. changed is closed when
	// something has changed. Required.
	Live func() (members []fleet.Member, complete bool, changed <-chan struct{})
	// Pools are the names of the pools that an edge with labels has by the newest
	// configuration or Base; with any labels for nil. Required.
	Pools func(labels map[string]string) map[string]bool
	// Changed is called when shares may have changed. It must not block. Required.
	Changed func()
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
}

// Server knows the shares of edges.
type Server struct {
	config Config
	shares atomic.Pointer[table] // nil: none are known
	newest atomic.Pointer[resealv1.Snapshot]
	news   chan struct{} // holds a token when there is a newer snapshot

	// The fields below belong to Run.

	vague time.Time       // since when labels of some edges are not known; zero: they are
	short map[string]bool // pools with less to divide than edges
}

// New makes a Server that knows nothing before Run.
func New(config Config) *Server {
	return &Server{config: config, news: make(chan struct{}, 1)}
}

// Selectors are those by which edges have pools of which there is a budget, nil
// when there is none. Replicas have to agree on them, so they follow from the newest
// configuration alone: edges that have a pool only by the selector of an earlier one
// don't count while they still do.
func Selectors(snapshot *resealv1.Snapshot) []*resealv1.EdgeSelector {
	if len(budgetsOf(snapshot)) == 0 {
		return nil
	}
	var selectors []*resealv1.EdgeSelector
	for _, listener := range snapshot.Kind("Listener") {
		selectors = append(selectors, listener.GetListener().GetEdgeSelector())
	}
	return selectors
}

// budgetsOf are those of all snapshots, sorted by pool.
func budgetsOf(snapshots ...*resealv1.Snapshot) []limited {
	var budgets []limited
	for _, snapshot := range snapshots {
		if snapshot == nil {
			continue
		}
		for _, pool := range snapshot.Kind("BackendPool") {
			if n := pool.GetBackendPool().GetConnections().GetMaxPerFleet(); n > 0 {
				budgets = append(budgets, limited{pool.GetMetadata().GetName(), n})
			}
		}
	}
	slices.SortFunc(budgets, func(a, b limited) int {
		return cmp.Or(cmp.Compare(a.pool, b.pool), cmp.Compare(a.budget, b.budget))
	})
	return slices.Compact(budgets)
}

// Share is how many connections an edge may have to each endpoint of a pool whose
// maxPerFleet is budget. ok is false while that is not known: the edge keeps to what
// it knows.
func (s *Server) Share(edge, pool string, budget uint32) (share uint32, ok bool) {
	return s.shares.Load().share(edge, limited{pool, budget})
}

// Run follows the fleet until ctx ends. It may be called once. It returns nil when ctx
// has ended, and otherwise the source's error.
func (s *Server) Run(ctx context.Context) error {
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error { return mirror.Snapshots(inner, "budget", s.config.Source.Next, s.take) })
	group.Go(func() error { s.divide(inner); return nil })
	err := group.Wait()
	if ctx.Err() != nil {
		// A source that ends with ctx as well may be heard of before inner ends.
		return nil
	}
	return err
}

// take takes a snapshot.
func (s *Server) take(snapshot *resealv1.Snapshot) {
	s.newest.Store(snapshot)
	select {
	case s.news <- struct{}{}:
	default:
	}
}

// divide divides again whenever that may change something, until ctx ends. Without a
// budget that is when the configuration changes.
func (s *Server) divide(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		changed, again := s.step(time.Now())
		timer.Stop()
		if again > 0 {
			timer.Reset(again)
		}
		select {
		case <-s.news:
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		timer.Reset(gather)
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
	}
}

// step divides by what is known now. It returns when to do so again: when changed is
// closed or, if it is above 0, after a time.
func (s *Server) step(now time.Time) (changed <-chan struct{}, again time.Duration) {
	newest := s.newest.Load()
	budgets := budgetsOf(newest, s.config.Base())
	if newest == nil || len(budgets) == 0 {
		s.shares.Store(nil)
		return nil, 0
	}
	members, complete, changed := s.config.Live()
	if !complete || s.await(now, members) {
		return changed, lookInterval
	}
	before := s.shares.Load()
	next, again := before.next(now, members, budgets, s.config.Pools)
	if next != before {
		s.shares.Store(next)
		s.tell(next)
		s.config.Changed()
	}
	if again == 0 {
		again = refreshInterval
	}
	return changed, again
}

// await says whether to wait for the labels of some edges.
func (s *Server) await(now time.Time, members []fleet.Member) bool {
	if !slices.ContainsFunc(members, func(m fleet.Member) bool { return m.Vague }) {
		s.vague = time.Time{}
		return false
	}
	if s.vague.IsZero() {
		s.vague = now
	}
	return now.Sub(s.vague) < patience
}

// tell logs when there is less than one connection for each edge, and when no longer.
func (s *Server) tell(t *table) {
	short := map[string]bool{}
	for of, c := range t.window[len(t.window)-1].cuts {
		if uint64(c.edges) <= uint64(of.budget) {
			continue
		}
		short[of.pool] = true
		if !s.short[of.pool] {
			s.config.Logger.Warn("connections.maxPerFleet is exceeded: there are more edges, each of which needs a connection",
				"pool", of.pool, "max_per_fleet", of.budget, "edges", c.edges)
		}
	}
	for pool := range s.short {
		if !short[pool] {
			s.config.Logger.Info("connections.maxPerFleet is enough for all edges again", "pool", pool)
		}
	}
	s.short = short
}
