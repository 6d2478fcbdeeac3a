// Package keyring makes, rotates and revokes the ticket keys of the fleet, and
// brings them to the edges.
//
// Each keyring is one record in etcd, with its epochs and their sealed secrets.
// What is due is decided by Step, which is pure. One replica, elected in etcd,
// carries it out; each of its writes names its election key, so that one that was
// paused can't write after another took over. Every replica follows the records
// by watch and serves the edges that are connected to it.
//
// Keys in etcd, below Config.Prefix:
//
//	keyring/<name>          a record
//	keyring-cover/<id>      what a replica tells of itself, on a lease
//	keyring-cover/<id>/<n>  what a part of its edges have acked, on the same lease.
//	                        Nothing in it is as the edge said it, and only changes are written
//	keyring-leader/<lease>  a candidate of the election; the oldest one leads
package keyring

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/reseal/reseal/controlplane/fleet"
	"github.com/reseal/reseal/controlplane/mirror"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Source is where the Keyring resources come from. Snapshots are immutable. It is
// safe for concurrent use.
type Source interface {
	// Next waits for a snapshot newer than revision after and returns the
	// newest. When revisions started anew it may return a lower one. It fails
	// when ctx ends or the source has ended.
	Next(ctx context.Context, after int64) (*resealv1.Snapshot, error)
}

// Config is what the keyring needs. It is read once, by New.
type Config struct {
	// Client is the connection to etcd. Required. It is not closed.
	Client *clientv3.Client
	// Prefix of all keys in etcd. Default "/reseal/v1/".
	Prefix string
	// Name is how Status names this replica: its listening address or host name.
	// Required.
	Name string
	// Source is where the Keyring resources come from. Required.
	Source Source
	// Seal encrypts a secret. Unseal with the same context, and only that, gets
	// it back. Both are required.
	Seal, Unseal func(data, context []byte) ([]byte, error)
	// Edge names the caller of a stream. Labels that it returns replace those
	// that the edge says it has; nil lets the edge's own stand. An error that
	// carries no gRPC status is PERMISSION_DENIED. Required.
	Edge func(ctx context.Context) (id string, labels map[string]string, err error)
	// Selectors are others than those of keyrings, by a configuration, whose labels Live
	// is to tell. It depends on nothing else, so that replicas agree. Nil: none.
	Selectors func(*resealv1.Snapshot) []*resealv1.EdgeSelector
	// Author names the caller of a command in the log. Default "unknown".
	Author func(ctx context.Context) string
	// Tick is how often the leader looks at the clock. Default 1s.
	Tick time.Duration
	// LiveFor is how long an edge counts as live after its stream ended, in
	// whole seconds. While etcd has been watched for less than that, the absence of
	// an edge proves nothing. Default 30s.
	LiveFor time.Duration
	// LeaderTTL is how long a leader that does not answer keeps its office, in
	// whole seconds. Default 10s.
	LeaderTTL time.Duration
	// RequestTimeout bounds one etcd request. Default 5s.
	RequestTimeout time.Duration
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// Registerer takes the metrics. Nil: none.
	Registerer prometheus.Registerer
}

// Server implements KeyringService. Edges that connect before Run, or before etcd
// and the configuration were read, wait for their first response: an edge never
// hears of keys that are only missing because they have not been loaded yet.
type Server struct {
	resealv1.UnimplementedKeyringServiceServer

	config  Config
	keys    keys
	log     *slog.Logger
	state   *state
	vault   *vault
	roster  *roster
	metrics *metrics
	id      string        // of this process, among those that write to etcd
	reload  time.Duration // 0: the mirror's default; tests can't wait for it
	lines   *fleet.Lines
	doubts  chan struct{} // holds a token when the newest record is to be asked for
	stopped chan struct{} // closed when Run has ended
}

// New makes a Server that does nothing before Run. It panics when its metrics
// are on the Registerer already.
func New(config Config) *Server {
	if config.Prefix == "" {
		config.Prefix = "/reseal/v1/"
	}
	if config.Author == nil {
		config.Author = func(context.Context) string { return "unknown" }
	}
	if config.Tick <= 0 {
		config.Tick = time.Second
	}
	if config.LiveFor <= 0 {
		config.LiveFor = 30 * time.Second
	}
	if config.LeaderTTL <= 0 {
		config.LeaderTTL = 10 * time.Second
	}
	if config.RequestTimeout <= 0 {
		config.RequestTimeout = 5 * time.Second
	}
	s := &Server{
		config:  config,
		keys:    keys{prefix: config.Prefix},
		log:     config.Logger,
		id:      randomID(),
		lines:   fleet.NewLines(),
		doubts:  make(chan struct{}, 1),
		vault:   newVault(config.Unseal),
		stopped: make(chan struct{}),
	}
	s.state = newState(s.id, s.lines.Wake)
	s.roster = newRoster(s)
	s.metrics = newMetrics(config.Registerer, s.state)
	return s
}

// Run serves, and rotates while this replica is the leader, until ctx ends; then
// it ends all streams and zeroes the secrets. When etcd fails, that is logged and
// tried again; edges keep what they have meanwhile. It may be called once. It
// returns nil when ctx has ended, and otherwise the source's error.
func (s *Server) Run(ctx context.Context) error {
	defer s.vault.retain(nil)
	defer s.lines.End(fleet.ErrStopping)
	defer close(s.stopped)
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error { return mirror.Snapshots(inner, "keyring", s.config.Source.Next, s.configure) })
	group.Go(func() error { s.follow(inner); return nil })
	group.Go(func() error { return s.roster.run(inner) })
	group.Go(func() error { s.confirm(inner); return nil })
	group.Go(func() error { return s.rotate(inner) })
	err := group.Wait()
	if ctx.Err() != nil {
		// A source that ends with ctx as well may be heard of before inner ends.
		return nil
	}
	return err
}

// configure takes the Keyring resources of a snapshot.
func (s *Server) configure(snapshot *resealv1.Snapshot) {
	specs := specsOf(snapshot)
	asked := termsOf(s.selectors(snapshot, specs))
	s.state.configure(snapshot.Revision(), specs, asked)
	s.roster.ask(asked)
}
