// Package edge wires an edge: identity, feed, plan, the frontend and backend
// legs and the tally.
package edge

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/reseal/reseal/edge/backend"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/failures"
	"github.com/reseal/reseal/edge/feed"
	"github.com/reseal/reseal/edge/files"
	"github.com/reseal/reseal/edge/frontend"
	"github.com/reseal/reseal/edge/identity"
	"github.com/reseal/reseal/edge/keyring"
	"github.com/reseal/reseal/edge/link"
	"github.com/reseal/reseal/edge/loop"
	"github.com/reseal/reseal/edge/observe"
	"github.com/reseal/reseal/edge/session"
	"github.com/reseal/reseal/edge/share"
	"github.com/reseal/reseal/edge/state"
	"github.com/reseal/reseal/edge/tally"
	"github.com/reseal/reseal/edge/upgrade"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// DefaultFeedWait is how long a start waits for the feed.
const DefaultFeedWait = 2 * time.Second

// Config is what an edge needs. It is read once, by New.
type Config struct {
	// ID is the edge's id. Required.
	ID string
	// ControlPlane are the addresses of the control plane's replicas. Required.
	ControlPlane []string
	// Labels are matched by selectors. Those of the join token replace them.
	Labels map[string]string
	// StateDir keeps identity and last good configuration, sealed.
	StateDir string
	// StateKeyFile holds the key that seals the state. Default StateDir/key.
	StateKeyFile string
	// JoinTokenFile holds the join token of the first start.
	JoinTokenFile string
	// CAHash pins the control plane's CA at the first start, for a token that
	// carries no hash.
	CAHash string
	// TrustDomain is the authority of the fleet's identities. Default "reseal".
	TrustDomain string
	// FeedWait is how long a start waits for the feed before it serves the last
	// good configuration.
	FeedWait time.Duration
	// PaceGC has the edge set the pace of the garbage collector (debug.SetGCPercent),
	// which is the process's: a small heap may grow to 24 MiB between two collections.
	PaceGC bool
	// ForgetSessions keeps backend sessions in memory alone: a restart makes
	// full handshakes. Default: they are kept in StateDir, sealed.
	ForgetSessions bool
	// KeepKeys keeps the fleet's ticket keys in StateDir, sealed.
	KeepKeys bool
	// MemoryLimit is what the process may use, in bytes: near it, new connections
	// and requests are refused. 0: no limit. The caller sets the runtime's own
	// (debug.SetMemoryLimit), which is the process's.
	MemoryLimit int64
	// Version is told to the control plane.
	Version string
	// Predecessor is the running process whose place this one takes, nil for none. The
	// edge then has that one's boot id, state, configuration, keys, sessions and counters.
	Predecessor *upgrade.Successor
	// Sockets are listening sockets that listeners use in place of binding their
	// addresses. Nil: none.
	Sockets *upgrade.Sockets
	// Served, if set, is called once: when a configuration is in force, or there is none
	// to be had yet; with a Predecessor, when its place is this process's.
	Served func()
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// AccessLog gets one record per request: a line of JSON by one Write, which must
	// not block, nor keep the line. Nil: none.
	AccessLog io.Writer
	// AccessLogDropped counts the records that AccessLog lost, for the metric. Nil:
	// none are lost.
	AccessLogDropped func() uint64
}

// Edge is one proxy node.
type Edge struct {
	cfg       Config
	bootID    string
	startedAt time.Time
	registry  *prometheus.Registry
	tally     *tally.Tally
	memory    *memory
	sessions  *session.Store
	loops     *loop.Group
	backend   *backend.Backend
	frontend  *frontend.Frontend
	failures  failures.Ring
	observers *observe.Observers

	identity *identity.Identity // set before enrolled is closed
	link     *link.Link         // likewise
	feed     *feed.Feed         // likewise
	keyring  *keyring.Holder    // likewise
	keysBy   time.Time          // how long the first apply waits for keys; likewise
	share    *share.Share       // likewise
	mover    *link.Mover
	enrolled chan struct{}
	state    *state.Dir // set before enrolled is closed
	handover *handover
	reload   chan struct{} // holds a token after Reload

	files files.Reader
	apply configuration
}

// New makes an edge that does nothing before Run.
func New(cfg Config) *Edge {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	counters := tally.New(registry)
	e := &Edge{
		cfg:       cfg,
		bootID:    randomID(),
		startedAt: time.Now(),
		registry:  registry,
		tally:     counters,
		memory:    &memory{limit: cfg.MemoryLimit, paced: cfg.PaceGC},
		handover:  newHandover(),
		mover:     link.NewMover(),
		enrolled:  make(chan struct{}),
		reload:    make(chan struct{}, 1),
		apply:     newConfiguration(),
		sessions:  session.New(session.Config{Logger: cfg.Logger.With("part", "session")}),
		observers: observe.New(cfg.ID),
	}
	if cfg.Predecessor != nil {
		e.bootID, e.startedAt = cfg.Predecessor.Terms.BootID, cfg.Predecessor.Terms.StartedAt
	}
	e.loops = loop.New(loop.Config{Panicked: func(bug any, stack []byte) {
		cfg.Logger.Error("panic on an event loop: this is a bug", "panic", bug, "stack", string(stack))
	}})
	e.backend = backend.New(backend.Config{
		Handshaker: e.sessions,
		Counters:   func(pool string) exchange.Counters { return counters.Pool(pool) },
		Logger:     cfg.Logger.With("part", "backend"),
		Loops:      e.loops,
	})
	e.frontend = frontend.New(frontend.Config{
		Loops:    e.loops,
		Upstream: e.backend,
		Counters: func(listener string) frontend.Counters { return counters.Listener(listener) },
		TicketKeys: func(ring, listener, policyKey string) frontend.TicketKeys {
			return e.keyring.Keys(ring, listener, policyKey)
		},
		MemoryLimit: cfg.MemoryLimit,
		MemoryUsed:  e.memory.Used,
		Inherited:   cfg.Sockets.Claim,
		Logger:      cfg.Logger.With("part", "frontend"),
		AccessLog:   cfg.AccessLog,
		Failed:      e.failures.Note,
		Observer:    e.observers,
	})
	registerFeedMetrics(registry, e)
	registerLogMetrics(registry, cfg.AccessLogDropped)
	registerMemoryMetrics(registry, cfg.MemoryLimit)
	registerUpgradeMetrics(registry, e)
	return e
}

// Reload has the edge look at the files of its configuration now. It does not
// wait for that.
func (e *Edge) Reload() {
	select {
	case e.reload <- struct{}{}:
	default:
	}
}

func randomID() string {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails (crypto/rand)
	return hex.EncodeToString(id)
}

// Run serves until ctx ends or another process has taken over (HandOver), then drains
// and returns when all that it started has ended. It returns an error when the state
// directory can't be used, enrolment is refused or the place of a predecessor can't be
// taken; an unreachable control plane is not an error.
func (e *Edge) Run(ctx context.Context) error {
	err := e.run(ctx)
	if e.cfg.Predecessor != nil {
		if err != nil {
			e.cfg.Predecessor.Fail(err)
		}
		_ = e.cfg.Predecessor.Close() // it may be gone
	}
	e.cfg.Sockets.Close()
	return err
}

func (e *Edge) run(ctx context.Context) error {
	dir, err := e.openState()
	if err != nil {
		return err
	}
	defer dir.Close()
	e.state = dir
	e.identity = identity.New(identity.Config{
		ID:           e.cfg.ID,
		TokenFile:    e.cfg.JoinTokenFile,
		CAHash:       e.cfg.CAHash,
		ControlPlane: e.cfg.ControlPlane,
		TrustDomain:  e.cfg.TrustDomain,
		State:        dir,
		Logger:       e.cfg.Logger.With("part", "identity"),
	})
	if err := e.enrol(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	conn, err := e.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	e.link = link.New(conn, func(err error, again time.Duration) {
		e.cfg.Logger.Warn("the link to the control plane is lost", "error", err, "again_in", again)
	}, resealv1.FeedService_Sync_FullMethodName, resealv1.KeyringService_Hold_FullMethodName, resealv1.TallyService_Report_FullMethodName, resealv1.PreviewService_Preview_FullMethodName,
		resealv1.ObservationService_Observe_FullMethodName)
	e.keyring = keyring.New(keyring.Config{
		Edge:       e.cfg.ID,
		Labels:     e.cfg.Labels,
		Client:     resealv1.NewKeyringServiceClient(e.link),
		State:      dir,
		KeepOnDisk: e.cfg.KeepKeys,
		Logger:     e.cfg.Logger.With("part", "keyring"),
		Registerer: e.registry,
	})
	e.keysBy = time.Now().Add(e.cfg.FeedWait)
	if err := e.inheritKeys(); err != nil {
		return err
	}
	e.newFeed(dir)
	e.newShare(conn)
	close(e.enrolled)
	keeper, err := e.loadSessions(dir)
	if err != nil {
		e.cfg.Logger.Error("the kept sessions are not used", "error", err)
	}
	return e.serve(ctx, keeper)
}

// enrol makes sure that the edge has an identity. One that has expired, after a
// long time without a control plane, does not keep the edge from serving its last
// good configuration: it comes back by proof of its key, or enrols again when a new
// token appears.
func (e *Edge) enrol(ctx context.Context) error {
	err := e.identity.Load(ctx)
	if errors.Is(err, identity.ErrNotEnrolled) {
		return e.identity.Ensure(ctx)
	}
	if errors.Is(err, identity.ErrExpired) {
		e.cfg.Logger.Error("the edge's certificate has expired; still serving, without a control plane until that gives another one", "error", err)
		return nil
	}
	return err
}

func (e *Edge) stateKeyFile() string {
	if e.cfg.StateKeyFile != "" {
		return e.cfg.StateKeyFile
	}
	return filepath.Join(e.cfg.StateDir, "key")
}

func (e *Edge) newFeed(dir *state.Dir) {
	observations := resealv1.NewObservationServiceClient(e.link)
	e.feed = feed.New(feed.Config{
		Edge:      e.cfg.ID,
		BootID:    e.bootID,
		Version:   e.cfg.Version,
		Labels:    e.cfg.Labels,
		StartedAt: e.startedAt,
		Client:    resealv1.NewFeedServiceClient(e.link),
		State:     dir,
		Apply:     e.applyWithKeys,
		Unchanged: e.unchanged,
		Running:   e.running,
		Preview:   e.preview,
		Previews:  resealv1.NewPreviewServiceClient(e.link),
		Probe:     e.probe,
		Failures:  e.failures.Report,
		Observe: func(ctx context.Context, order *resealv1.ObserveOrder) error {
			return e.observers.Follow(ctx, observations, order)
		},
		Drain:  e.frontend.Drain,
		Move:   e.mover.Move,
		Shares: e.backend.Share,
		Logger: e.cfg.Logger.With("part", "feed"),
	})
	e.feed.RecallShares()
}

// loadSessions takes the backend sessions of the last run, or erases them when
// none are to be kept. The keeper is nil then.
func (e *Edge) loadSessions(dir *state.Dir) (*session.Keeper, error) {
	keeper := session.NewKeeper(session.KeeperConfig{
		Store: e.sessions, State: dir, Logger: e.cfg.Logger.With("part", "session"),
	})
	if e.cfg.ForgetSessions {
		return nil, keeper.Erase()
	}
	if e.cfg.Predecessor != nil {
		return keeper, nil // it hands over what it holds when it comes to that
	}
	_, err := keeper.Load()
	return keeper, err
}

// serve starts what an edge consists of, and ends it in the order in which it depends
// on each other. With a predecessor it serves clients first, and does what only one of
// the two may do once the other has stopped to.
func (e *Edge) serve(ctx context.Context, keeper *session.Keeper) error {
	reporter := tally.NewReporter(tally.ReporterConfig{
		Edge:   e.cfg.ID,
		BootID: e.bootID,
		Tally:  e.tally,
		Client: resealv1.NewTallyServiceClient(e.link),
		Logger: e.cfg.Logger.With("part", "tally"),
	})
	// Clients drain first; the backend leg and the reports end after them, so that
	// requests in flight finish and are counted. The loops run until no leg has a
	// connection any more, and sessions are kept last: the closing connections still
	// bring some.
	last, loops, behind, talks := newStage(ctx), newStage(ctx), newStage(ctx), newStage(ctx)
	behind.start(e.own)
	err := e.succeed(ctx)
	if err == nil {
		loops.start(e.loops.Run)
		behind.start(e.backend.Run)
		err = e.serveClients(ctx, func() {
			talks.start(e.link.Run)
			talks.start(reporter.Run)
			talks.start(e.keyring.Run)
			if keeper != nil {
				last.start(keeper.Run)
			}
		}, talks)
	}
	e.endPredecessor()
	err = errors.Join(err, talks.end(), behind.end(), loops.end(), last.end())
	e.sayFarewell()
	return err
}

// serveClients serves until ctx ends, or another process has taken over, and all
// clients have left. Alone is called when this process is the only one of the edge that
// speaks with the control plane and writes the state; talks ends when it is no longer.
func (e *Edge) serveClients(ctx context.Context, alone func(), talks *stage) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer e.handover.close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return e.frontend.Run(ctx) })
	group.Go(func() error { return e.memory.run(ctx) })
	e.takeOver(ctx)
	alone()
	e.handover.open(func() {
		stop()
		_ = talks.end() // their errors are logged; nothing is to be done about them now
	})
	group.Go(func() error { return e.identity.Run(ctx) })
	group.Go(func() error { return e.mover.Run(ctx) })
	group.Go(func() error { return e.feed.Run(ctx) })
	group.Go(func() error { return e.share.Run(ctx) })
	group.Go(func() error { return e.startFromLastGood(ctx) })
	group.Go(func() error { return e.watchFiles(ctx) })
	group.Go(func() error { return e.tellServed(ctx) })
	telling := newStage(ctx)
	telling.start(e.tellDrained)
	return errors.Join(group.Wait(), telling.end())
}

// startFromLastGood gives the feed a moment, since what it brings is newer, and
// then serves what the edge served last.
func (e *Edge) startFromLastGood(ctx context.Context) error {
	defer close(e.handover.tried)
	wait := time.NewTimer(e.cfg.FeedWait)
	defer wait.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-e.feed.Synced():
		return nil
	case <-wait.C:
	}
	err := exchange.Guard("the kept configuration was applied", func() error { return e.feed.ApplyLastGood(ctx) })
	switch {
	case errors.Is(err, fs.ErrNotExist) && e.feed.Connected():
		e.cfg.Logger.Warn("no configuration yet: none came from the control plane that can be served, and none is kept")
	case errors.Is(err, fs.ErrNotExist):
		e.cfg.Logger.Warn("no configuration yet: the control plane can't be reached and none is kept", "control_plane", e.cfg.ControlPlane)
	case err != nil:
		e.cfg.Logger.Error("the kept configuration can't be used", "error", err)
	}
	return nil
}

// dial connects to whichever replica answers.
func (e *Edge) dial() (*grpc.ClientConn, error) {
	return link.Dial(link.Config{
		Addresses:   e.cfg.ControlPlane,
		Shuffled:    true,
		Credentials: credentials.NewTLS(e.identity.ClientTLS()),
		Mover:       e.mover,
	})
}

// PageTLS serves the handler with mutual TLS: callers need a certificate of an
// operator of this fleet. Handshakes fail until the edge is enrolled.
func (e *Edge) PageTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			select {
			case <-e.enrolled:
				return e.identity.ServerTLS(), nil
			default:
				return nil, errors.New("the edge is not enrolled yet")
			}
		},
	}
}

// Handler serves /healthz, /readyz, /metrics and /debug/pprof.
func (e *Edge) Handler() http.Handler { return newHandler(e) }

// applyWithKeys gives the ticket keys a moment at the start: an edge that serves
// before it has them declines tickets that the rest of the fleet accepts.
func (e *Edge) applyWithKeys(ctx context.Context, candidate feed.Candidate) feed.Outcome {
	wait := time.NewTimer(time.Until(e.keysBy))
	defer wait.Stop()
	select {
	case <-ctx.Done():
	case <-e.keyring.Synced():
	case <-wait.C:
	}
	return e.Apply(ctx, candidate)
}
