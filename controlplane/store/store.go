// Package store keeps the configuration in etcd.
//
// Every change is one etcd transaction, guarded by the head key, so changes
// serialise and take effect as a whole or not at all. A revision is the etcd
// revision of such a transaction. Every replica, the one that writes included,
// learns of changes by watch only, and publishes them as immutable snapshots.
//
// Keys, below Config.Prefix:
//
//	head                    the newest change: a record without undo
//	resources/<Kind>/<name> a resealv1.Resource, its secrets sealed
//	history/<20 digits>     one kept change: a record with undo
//	fence                   written to void a transaction of unknown outcome
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// keptSnapshots are the newest snapshots that At answers without undoing
	// anything. They share their resources, so that they cost little, but for those
	// that changed in each.
	keptSnapshots = 4
	// lockTimeout bounds how long a change waits for the others of its replica.
	lockTimeout = 30 * time.Second
)

// Config configures a Store. It is read by New and must not be changed later.
type Config struct {
	// Client is the connection to etcd. Required. The store does not close it.
	Client *clientv3.Client
	// Prefix of all keys. Default "/reseal/v1/".
	Prefix string
	// HistoryLimit is the number of revisions that are kept. They are held in
	// memory, too. Default 100.
	HistoryLimit int
	// HistoryBytes bounds the bytes of the kept revisions: when changes are large,
	// fewer are kept, but always the newest. Default 64 MiB.
	HistoryBytes int
	// Full is asked before anything is added: its error, if any, is the
	// reason to refuse, and is given to the caller as ErrFull. Default: there is room.
	Full func() error
	// MaxOps is etcd's limit for the operations of a transaction
	// (--max-txn-ops). Default 128, as in etcd.
	MaxOps int
	// MaxBytes bounds the bytes of a transaction. It must stay below etcd's
	// --max-request-bytes (1.5 MiB). Default 1,400,000.
	MaxBytes int
	// RequestTimeout bounds one etcd request, and how long a call waits for
	// the watch to reach what it has read or written. Default 5s.
	RequestTimeout time.Duration
	// Seal encrypts a secret. Open with the same context, and only that, gets
	// it back. Required once a resource holds a secret.
	Seal func(plaintext, context []byte) ([]byte, error)
	// Open is the inverse of Seal.
	Open func(sealed, context []byte) ([]byte, error)
	// Validate checks the configuration that a change would lead to. The
	// secrets in it are sealed. Default: anything is valid.
	Validate func(*resealv1.Snapshot) []*resealv1.Violation
	// Edges are the labels of the live edges. It is asked only about changes of edge
	// selectors, and may take some seconds. Default: no edges are known.
	Edges func(context.Context) []map[string]string
	// Audit returns what records a change in its own transaction: guards, and at most
	// 2 operations with 34 KiB. When a guard does not hold it is called again. A change
	// that can't be recorded is not made. The secrets in the changes are redacted.
	// Default: changes are not recorded.
	Audit func(ctx context.Context, message string, changes []*resealv1.Change) ([]clientv3.Cmp, []clientv3.Op, error)
	// Logger gets what goes wrong. Default: slog.Default().
	Logger *slog.Logger
}

// Store is the configuration in etcd. Its methods may be called concurrently.
type Store struct {
	cfg     Config
	client  *clientv3.Client
	keys    keys
	secrets secretFields
	log     *slog.Logger

	published atomic.Pointer[published] // written by Run only
	writing   chan struct{}             // held by the change that this replica is making
	started   atomic.Bool
	ready     chan struct{} // closed by Run once there is a head
	stopped   chan struct{} // closed when Run has ended
}

// published is what readers see. It is immutable.
type published struct {
	state *state
	// recent are the newest snapshots, oldest first.
	recent []*resealv1.Snapshot
	// former is the highest revision before the numbers started anew, because
	// etcd was restored or replaced. 0: they never did.
	former int64
	// next is closed when there is something newer.
	next chan struct{}
}

// New makes a Store. It does nothing until Run.
func New(cfg Config) *Store {
	if cfg.Prefix == "" {
		cfg.Prefix = "/reseal/v1/"
	}
	if cfg.HistoryLimit <= 0 {
		cfg.HistoryLimit = 100
	}
	if cfg.HistoryBytes <= 0 {
		cfg.HistoryBytes = 64 << 20
	}
	if cfg.Full == nil {
		cfg.Full = func() error { return nil }
	}
	if cfg.Edges == nil {
		cfg.Edges = func(context.Context) []map[string]string { return nil }
	}
	if cfg.MaxOps <= 0 {
		cfg.MaxOps = 128
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = 1_400_000
	}
	if cfg.RequestTimeout <= 0 {
		cfg.RequestTimeout = 5 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	s := &Store{
		cfg:     cfg,
		client:  cfg.Client,
		keys:    keys{prefix: cfg.Prefix},
		secrets: findSecrets((&resealv1.Resource{}).ProtoReflect().Descriptor()),
		log:     cfg.Logger,
		writing: make(chan struct{}, 1),
		ready:   make(chan struct{}),
		stopped: make(chan struct{}),
	}
	empty := &state{snapshot: resealv1.NewSnapshot("", 0, nil)}
	s.published.Store(&published{state: empty, next: make(chan struct{})})
	return s
}

// Run loads the configuration and follows it until ctx ends. It creates the
// default Keyring on first start. When etcd fails, that is logged and tried
// again; the last snapshot stands meanwhile. Run may be called once.
func (s *Store) Run(ctx context.Context) error {
	if s.started.Swap(true) {
		return errors.New("store: Run was called before")
	}
	defer close(s.stopped)
	wait := newBackoff(100*time.Millisecond, 5*time.Second)
	for ctx.Err() == nil {
		begin := time.Now()
		err := s.follow(ctx)
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, errReload) || time.Since(begin) > time.Minute {
			wait.reset()
		}
		s.log.Warn("lost track of etcd, loading again", "error", err, "revision", s.Snapshot().Revision())
		wait.sleep(ctx)
	}
	return nil
}

// Ready is closed once a snapshot was loaded that holds at least the default
// Keyring.
func (s *Store) Ready() <-chan struct{} { return s.ready }

// Snapshot is the newest configuration that this replica knows. It is never
// nil; before Ready it is empty, with revision 0. Secrets in it are sealed.
func (s *Store) Snapshot() *resealv1.Snapshot { return s.published.Load().state.snapshot }

// Next waits for a snapshot whose revision is above after, and returns the
// newest one. It may skip revisions. When etcd was restored or replaced, so
// that revisions start anew below after, it returns the first snapshot of the
// new numbering. It fails with the error of ctx, or with ErrUnavailable when
// Run has ended.
func (s *Store) Next(ctx context.Context, after int64) (*resealv1.Snapshot, error) {
	p, err := s.until(ctx, func(p *published) bool {
		revision := p.state.revision()
		return revision > after || after > revision && after <= p.former
	})
	if err != nil {
		return nil, err
	}
	return p.state.snapshot, nil
}

// until waits for something published that satisfies ok.
func (s *Store) until(ctx context.Context, ok func(*published) bool) (*published, error) {
	for {
		p := s.published.Load()
		if ok(p) {
			return p, nil
		}
		select {
		case <-p.next:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.stopped:
			return nil, fmt.Errorf("%w: it has stopped", ErrUnavailable)
		}
	}
}

// publish shows next to readers. Only Run calls it.
func (s *Store) publish(next *state) {
	old := s.published.Load()
	p := &published{state: next, former: old.former, next: make(chan struct{})}
	switch {
	case next.revision() == old.state.revision() && next.snapshot.ClusterID() == old.state.snapshot.ClusterID():
		return
	case old.state.revision() > 0 && (next.revision() <= old.state.revision() || next.snapshot.ClusterID() != old.state.snapshot.ClusterID()):
		s.log.Warn("etcd was restored or replaced, revisions start anew",
			"revision", next.revision(), "before", old.state.revision(), "cluster", next.snapshot.ClusterID())
		p.former = max(old.former, old.state.revision())
	default:
		p.recent = slices.Clone(old.recent[max(0, len(old.recent)-keptSnapshots+1):])
	}
	p.recent = append(p.recent, next.snapshot)
	s.published.Store(p)
	close(old.next)
	if next.revision() > 0 {
		select {
		case <-s.ready:
		default:
			close(s.ready)
		}
	}
}
