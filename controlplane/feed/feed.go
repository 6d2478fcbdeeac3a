// Package feed brings configuration from the store to the edges, over one
// stream per edge, and knows which edges live.
package feed

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"

	"github.com/reseal/reseal/controlplane/fleet"
	"github.com/reseal/reseal/controlplane/mirror"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// keptGenerations bounds the older snapshots whose views are kept for edges
	// that come back.
	keptGenerations = 8
	// historyTimeout bounds a look into the store's history. An edge that waits
	// longer gets a full update instead.
	historyTimeout = 5 * time.Second
	expireInterval = time.Second
)

// Source is where snapshots come from. Snapshots and the resources in them are
// immutable. All methods are safe for concurrent use.
type Source interface {
	// Snapshot returns the newest one. It never returns nil; before the first
	// is known it returns one with revision 0.
	Snapshot() *resealv1.Snapshot
	// Next waits for a snapshot newer than revision after and returns the
	// newest. When the store was replaced or restored, so that revisions start
	// anew, it may return one with a lower revision. It fails when ctx ends or
	// the source has ended.
	Next(ctx context.Context, after int64) (*resealv1.Snapshot, error)
	// At returns what was in force at a revision of the past, also of one that
	// was written before this process started. Any error means that it can't be
	// had.
	At(ctx context.Context, revision int64) (*resealv1.Snapshot, error)
}

// Config is what the feed needs. It is read once, by New.
type Config struct {
	// Source is where snapshots come from. Required.
	Source Source
	// Unseal returns a copy of a resource with its secrets in clear, or the
	// resource itself when it has none. Its result must not depend on anything
	// but the resource. Default: resources hold no secrets.
	Unseal func(*resealv1.Resource) (*resealv1.Resource, error)
	// Edge names the caller of a stream. Labels that it returns replace those
	// that the edge says it has; nil lets the edge's own stand. An error that
	// carries no gRPC status is PERMISSION_DENIED. Required.
	Edge func(ctx context.Context) (id string, labels map[string]string, err error)
	// Drained is the order for an edge to drain, nil when there is none. Whoever
	// changes that calls FollowDrain. Nil: only what DrainEdge says counts, while
	// the edge is live.
	Drained func(id string) *resealv1.Drain
	// Aimed says that Aim decides what edges are to serve, and that they wait for it.
	// Default: they serve the newest revision.
	Aimed bool
	// Share is how many connections an edge may have to each endpoint of a pool whose
	// connections.maxPerFleet is budget; ok is false while that is not known. Whoever
	// changes that calls Reshare. Nil: it never is.
	Share func(edge, pool string, budget uint32) (share uint32, ok bool)
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// Registerer takes the metrics. Nil: none.
	Registerer prometheus.Registerer
}

// Server implements FeedService and FleetService. Edges that connect before Run,
// or before the source has a revision above 0, wait for their first Update: an
// edge never hears of a configuration that is only empty because it has not been
// loaded yet.
type Server struct {
	resealv1.UnimplementedFeedServiceServer
	resealv1.UnimplementedFleetServiceServer

	config  Config
	work    work
	table   *table
	metrics *metrics
	lines   *fleet.Lines
	stopped chan struct{} // closed when Run has ended
	history singleflight.Group
	aims    atomic.Pointer[aim] // written under mu

	previewing   chan struct{} // has room for one
	observations observations

	mu        sync.Mutex
	encoder   *encoder
	newest    *generation   // nil: none yet
	published chan struct{} // closed at the next publish
	past      []*generation // oldest use first
}

// New makes a feed that sends nothing before Run. It panics when its metrics are
// on the Registerer already.
func New(config Config) *Server {
	if config.Unseal == nil {
		config.Unseal = func(resource *resealv1.Resource) (*resealv1.Resource, error) { return resource, nil }
	}
	s := &Server{
		config:    config,
		lines:     fleet.NewLines(),
		stopped:   make(chan struct{}),
		published: make(chan struct{}),

		previewing: make(chan struct{}, 1),
	}
	s.aims.Store(&aim{})
	s.encoder = newEncoder(config.Unseal, &s.work)
	s.metrics = newMetrics(config.Registerer, s)
	s.table = newTable(func(took time.Duration) { s.metrics.convergence.Observe(took.Seconds()) })
	s.table.target = func(row *edge) int64 { return s.aims.Load().revision(row.id, row.hello.GetLabels()) }
	return s
}

// Run publishes what the source brings until ctx ends, then ends all streams. It
// may be called once. It returns nil when ctx has ended, otherwise the source's
// error.
func (s *Server) Run(ctx context.Context) error {
	defer s.lines.End(fleet.ErrStopping)
	defer close(s.stopped)
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error {
		return mirror.Snapshots(inner, "feed", s.config.Source.Next, func(snapshot *resealv1.Snapshot) {
			s.publish(snapshot)
			s.resolve(inner)
		})
	})
	group.Go(func() error {
		ticker := time.NewTicker(expireInterval)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				s.table.expire()
			case <-inner.Done():
				return nil
			}
		}
	})
	err := group.Wait()
	if ctx.Err() != nil {
		// A source that ends with ctx as well may be heard of before inner ends.
		return nil
	}
	return err
}

// publish makes snapshot what edges should serve.
func (s *Server) publish(snapshot *resealv1.Snapshot) {
	s.mu.Lock()
	old := s.newest
	switch {
	case old == nil:
	case old.snapshot.ClusterID() != snapshot.ClusterID() || old.revision() > snapshot.Revision():
		// Another cluster, or one that was restored from a backup. The old
		// numbers mean nothing any more.
		s.encoder, s.past = newEncoder(s.config.Unseal, &s.work), nil
		now := *s.aims.Load()
		now.newest, now.before, now.after = nil, nil, nil
		s.aims.Store(&now)
		s.table.startAnew()
	default:
		s.keepLocked(old)
	}
	s.encoder.retain(snapshot)
	s.newest = newGeneration(snapshot, s.encoder, time.Now())
	before, now := s.publishedLocked(s.newest)
	close(s.published)
	s.published = make(chan struct{})
	// Under the lock, so that no edge acks a revision that the table does not
	// know yet.
	s.table.publish(s.newest.revision(), s.newest.seen)
	s.mu.Unlock()
	s.turn(before, now)
	s.config.Logger.Debug("revision published", "revision", snapshot.Revision(), "resources", snapshot.Len())
}

// current returns the newest generation, nil when there is none, and a channel
// that is closed when there is a newer one.
func (s *Server) current() (*generation, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newest, s.published
}

func (s *Server) keepLocked(g *generation) {
	s.past = append(s.past, g)
	if len(s.past) > keptGenerations {
		s.past = s.past[1:]
	}
}

// at returns the generation of a past revision, from memory or from the store's
// history, or nil when it can't be had. A crowd of edges that come back with the
// same revision reads it once.
func (s *Server) at(ctx context.Context, revision int64) *generation {
	if g := s.remembered(revision); g != nil {
		return g
	}
	found, err, _ := s.history.Do(strconv.FormatInt(revision, 10), func() (any, error) {
		if g := s.remembered(revision); g != nil {
			return g, nil
		}
		// The result is for all who wait, not only for the first.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), historyTimeout)
		defer cancel()
		snapshot, err := s.config.Source.At(ctx, revision)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		g := newGeneration(snapshot, s.encoder, time.Now())
		s.keepLocked(g)
		return g, nil
	})
	if err != nil {
		s.config.Logger.Debug("revision is not in history", "revision", revision, "error", err)
		return nil
	}
	return found.(*generation)
}

// remembered returns a generation that is in memory, and makes it the last to be
// forgotten.
func (s *Server) remembered(revision int64) *generation {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.aims.Load()
	for _, g := range []*generation{s.newest, now.before, now.after} {
		if g != nil && g.revision() == revision {
			return g
		}
	}
	i := slices.IndexFunc(s.past, func(g *generation) bool { return g.revision() == revision })
	if i < 0 {
		return nil
	}
	g := s.past[i]
	s.past = append(slices.Delete(s.past, i, i+1), g)
	return g
}

// Live returns the ids of the edges that are connected, or were within the last
// 30 s, sorted.
func (s *Server) Live() []string { return s.table.ids() }
