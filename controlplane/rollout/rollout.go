// Package rollout brings changes to the edges in stages: it says which of two revisions
// each edge is to serve, the base, which all edges have served, or the candidate.
//
// Where that stands is one small record in etcd. What is next is decided by Step, a pure
// function of time, record and fleet; one replica, elected and fenced, carries it out.
// All replicas follow the record and tell their edges. Which edges have the candidate
// follows from the record and an edge's name, so the record does not grow with the fleet.
//
// Keys in etcd, below Config.Prefix:
//
//	rollout/record     the record
//	rollout-leader/…   candidates for the office
package rollout

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/reseal/reseal/controlplane/mirror"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Source is where changes come from. It is safe for concurrent use.
type Source interface {
	// Snapshot is the newest configuration; before the first is known one with
	// revision 0.
	Snapshot() *resealv1.Snapshot
	// Next waits for a snapshot newer than revision after, or of a new numbering.
	Next(ctx context.Context, after int64) (*resealv1.Snapshot, error)
	// At is what was in force at a kept revision.
	At(ctx context.Context, revision int64) (*resealv1.Snapshot, error)
	// Origin says how a kept revision was made: its number in the history, by whom,
	// and whether with ApplyRequest.now. The number is 0 when it is not kept.
	Origin(revision int64) (change int64, by string, now bool)
	// RevisionOf is the revision of a number in the history, 0 when it is not kept.
	RevisionOf(change int64) int64
}

// Edges looks at the live edges of all replicas. missing are replicas that did not
// answer.
type Edges func(ctx context.Context) (edges []*resealv1.Edge, missing []string, err error)

// Aim says what edges are to serve: those for which moved is true candidate, others base.
type Aim func(ctx context.Context, base, candidate int64, moved func(id string, labels map[string]string) bool)

// Config is what a Server needs. It is read once, by New.
type Config struct {
	// Client is the connection to etcd. Required. It is not closed.
	Client *clientv3.Client
	// Prefix of all keys in etcd. Default "/reseal/v1/".
	Prefix string
	// Name is how others see this replica. Required.
	Name string
	// Source is where changes come from. Required.
	Source Source
	// Edges looks at the fleet. Required.
	Edges Edges
	// Touched says whether edges with labels serve something at base, and are to hold
	// something else at candidate. Required.
	Touched func(ctx context.Context, base, candidate int64) func(labels map[string]string) bool
	// Stats reads the counters of an edge. Nil: nothing is compared.
	Stats Stats
	// Aim is told what this replica's edges are to serve. Required.
	Aim Aim
	// Author names the caller. Default "unknown".
	Author func(ctx context.Context) string
	// LeaderTTL is how long a leader that does not answer keeps its office, in whole
	// seconds. Default 3s: no change goes anywhere for as long.
	LeaderTTL time.Duration
	// RequestTimeout bounds one etcd request. Default 5s.
	RequestTimeout time.Duration
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// Registerer takes the metrics. Nil: none.
	Registerer prometheus.Registerer
}

// Server carries out rollouts, and answers for them.
type Server struct {
	config  Config
	key     string
	office  string
	metrics *metrics
	stopped chan struct{} // closed when Run has ended

	mu       sync.Mutex
	loaded   bool
	record   *Record // nil: there is none
	revision int64   // of its last write, 0: none
	cluster  uint64
	changed  chan struct{} // closed at the next change of the record or the configuration
	moved    counts        // what the leader saw last
}

// counts are what a look at the fleet showed.
type counts struct{ moved, edges int }

// New makes a Server that does nothing before Run. It panics when its metrics are on the
// Registerer already.
func New(config Config) *Server {
	if config.Prefix == "" {
		config.Prefix = "/reseal/v1/"
	}
	if config.Author == nil {
		config.Author = func(context.Context) string { return "unknown" }
	}
	if config.LeaderTTL <= 0 {
		config.LeaderTTL = 3 * time.Second
	}
	if config.RequestTimeout <= 0 {
		config.RequestTimeout = 5 * time.Second
	}
	s := &Server{
		config: config, key: config.Prefix + "rollout/record", office: config.Prefix + "rollout-leader",
		stopped: make(chan struct{}), changed: make(chan struct{}),
	}
	s.metrics = newMetrics(config.Registerer, s)
	return s
}

// Run follows the record, and carries rollouts out while this replica is the leader,
// until ctx ends. Trouble with etcd is logged and tried again; edges keep what they have
// meanwhile. It may be called once. It returns nil when ctx has ended, and otherwise the
// source's error.
func (s *Server) Run(ctx context.Context) error {
	defer close(s.stopped)
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error { s.follow(inner); return nil })
	group.Go(func() error {
		return mirror.Snapshots(inner, "rollout", s.config.Source.Next, func(*resealv1.Snapshot) { s.notify() })
	})
	group.Go(func() error { s.tell(inner); return nil })
	group.Go(func() error { s.stand(inner); return nil })
	err := group.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (s *Server) follow(ctx context.Context) {
	mirror.Follow(ctx, mirror.Config{
		Client:         s.config.Client,
		Prefix:         s.key,
		RequestTimeout: s.config.RequestTimeout,
		Logger:         s.config.Logger,
		Subject:        "the rollout",
		Load: func(found mirror.Contents) {
			s.mu.Lock()
			if s.cluster != 0 && s.cluster != found.Cluster {
				s.revision = 0 // means nothing in another cluster
			}
			known := s.cluster == found.Cluster && s.revision > found.Revision
			s.cluster = found.Cluster
			s.mu.Unlock()
			switch {
			case len(found.Keys) > 0:
				s.take(found.Keys[0], found.Revision)
			case !known: // it may have been written here meanwhile
				s.set(nil, 0)
			}
		},
		Take: func(events []*clientv3.Event) {
			for _, event := range events {
				if event.Type == clientv3.EventTypeDelete {
					s.set(nil, 0)
				} else {
					s.take(event.Kv, event.Kv.ModRevision)
				}
			}
		},
	})
}

func (s *Server) take(kv *mvccpb.KeyValue, at int64) {
	r, err := decode(kv.Value)
	if err != nil {
		// What stands here stands; without anything, edges wait rather than get what
		// nobody has tried.
		s.config.Logger.Error("the rollout can't be read, edges keep what they have; a newer control plane may have written it", "error", err)
		return
	}
	s.mu.Lock()
	older := kv.ModRevision < s.revision && at < s.revision
	s.mu.Unlock()
	if !older {
		s.set(r, kv.ModRevision)
	}
}

// set makes r the record that was written at a revision.
func (s *Server) set(r *Record, revision int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.loaded && s.revision == revision {
		return
	}
	s.loaded, s.record, s.revision = true, r, revision
	s.notifyLocked()
}

// notify has everybody look at the record and the configuration again.
func (s *Server) notify() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notifyLocked()
}

func (s *Server) notifyLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// current is the newest record and the revision of its last write. ok is false before
// it was looked for. changed is closed when there is another one, or another
// configuration.
func (s *Server) current() (r *Record, revision int64, changed <-chan struct{}, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.record, s.revision, s.changed, s.loaded
}

// Record is where the newest change stands, nil when that is not known.
func (s *Server) Record() *Record {
	r, _, _, _ := s.current()
	return r
}

// tell tells this replica's edges what to serve, after every change of the record.
// Without one the newest revision is the base.
func (s *Server) tell(ctx context.Context) {
	var told *Record // what the edges go by, nil: none
	for ctx.Err() == nil {
		r, _, changed, ok := s.current()
		snapshot := s.config.Source.Snapshot()
		if newest := snapshot.Revision(); ok && newest > 0 {
			switch {
			case r == nil || r.Cluster != snapshot.ClusterID() && r.Candidate == r.Base:
				s.config.Aim(ctx, newest, newest, nil)
				told = nil
			case r == told, r.Cluster != snapshot.ClusterID():
				// In another cluster the leader decides; until then nobody gets anything new.
			case r.underWay():
				s.config.Aim(ctx, r.Base, r.Candidate, r.Has)
				told = r
			default:
				s.config.Aim(ctx, r.Base, r.Base, nil)
				told = r
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}
