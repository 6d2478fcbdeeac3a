// Package controlplane wires the control plane: the store on etcd, trust, the
// gRPC services and the metrics page.
package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/admin"
	"github.com/reseal/reseal/controlplane/audit"
	"github.com/reseal/reseal/controlplane/backup"
	"github.com/reseal/reseal/controlplane/budget"
	"github.com/reseal/reseal/controlplane/etcd"
	"github.com/reseal/reseal/controlplane/feed"
	"github.com/reseal/reseal/controlplane/fleet"
	"github.com/reseal/reseal/controlplane/gate"
	"github.com/reseal/reseal/controlplane/intent"
	"github.com/reseal/reseal/controlplane/keyring"
	"github.com/reseal/reseal/controlplane/replicas"
	"github.com/reseal/reseal/controlplane/rollout"
	"github.com/reseal/reseal/controlplane/sessions"
	"github.com/reseal/reseal/controlplane/store"
	"github.com/reseal/reseal/controlplane/tally"
	"github.com/reseal/reseal/controlplane/trust"
	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Config is what a control plane needs. It is read once, by New.
type Config struct {
	// DataDir holds the embedded store, the key-encryption key and the admin
	// context. It is created with mode 0700.
	DataDir string
	// Listen is the address of the gRPC services. Default ":7443".
	Listen string
	// Advertise are the addresses that the admin context names. Default:
	// 127.0.0.1 with the port of Listen.
	Advertise []string
	// ReplicaName is how the replicas of a fleet call this one: letters, digits, ".",
	// "_" and "-", another one for each. Default: the host's name or address, and
	// the port of Listen.
	ReplicaName string
	// ReplicaAddress is where other replicas reach Listen, host:port. Default: the
	// address of Listen; when that is any address, the one from which the etcd
	// cluster is reached.
	ReplicaAddress string
	// EtcdEndpoints is the external cluster. Empty: a store in this process.
	EtcdEndpoints []string
	// EtcdCA, EtcdCert and EtcdKey are PEM files for TLS to the external
	// cluster.
	EtcdCA, EtcdCert, EtcdKey string
	// KEKFile holds the key that encrypts all other secrets. Default
	// DataDir/kek, generated when it does not exist.
	KEKFile string
	// TrustDomain is the authority of the spiffe:// identities. Default
	// "reseal".
	TrustDomain string
	// EdgeCertTTL is how long an edge's certificate is valid. Default 24h.
	EdgeCertTTL time.Duration
	// ExpiredGrace is for how long after an edge's certificate has expired the edge may
	// come back with it, by proof of its key; later it needs a new join token. Default
	// 0: not at all.
	ExpiredGrace time.Duration
	// EtcdQuotaBytes bounds the database of the embedded store. Default 2 GiB.
	EtcdQuotaBytes int64
	// HistoryLimit is how many revisions are kept. Default 100.
	HistoryLimit int
	// HistoryBytes bounds the bytes of the kept revisions. Default 64 MiB.
	HistoryBytes int
	// AuditLog gets every entry of the audit log as a line of JSON. Default: no file
	// does.
	AuditLog string
	// Version is shown to operators.
	Version string
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
}

// ControlPlane is one replica.
type ControlPlane struct {
	cfg      Config
	registry *prometheus.Registry
	ready    chan struct{}
	etcd     atomic.Pointer[etcd.Store] // nil before it is open
	// edges are the labels of the live edges of all replicas. Nil before it is known
	// who they are.
	edges atomic.Pointer[func(context.Context) []map[string]string]

	audit *audit.Log   // set before trust is open
	trust *trust.Trust // set before ready is closed
	store *store.Store // likewise

	sessions *sessions.Server // set before trust runs
	keyring  *keyring.Server  // likewise
}

// New makes a control plane that does nothing before Run.
func New(cfg Config) *ControlPlane {
	if cfg.Listen == "" {
		cfg.Listen = ":7443"
	}
	if cfg.KEKFile == "" {
		cfg.KEKFile = filepath.Join(cfg.DataDir, "kek")
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return &ControlPlane{cfg: cfg, registry: registry, ready: make(chan struct{})}
}

// Registry holds the control plane's metrics.
func (c *ControlPlane) Registry() *prometheus.Registry { return c.registry }

// Run serves until ctx ends and returns when all that it started has ended. It
// returns an error when the store, the trust material or the listening address
// can't be had.
func (c *ControlPlane) Run(ctx context.Context) error {
	if err := os.MkdirAll(c.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	unlock, err := lockDir(c.cfg.DataDir)
	if err != nil {
		return err
	}
	defer unlock()
	// Listening comes first: a port in use must not leave a store behind that
	// was started for nothing.
	listener, err := net.Listen("tcp", c.cfg.Listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer listener.Close()

	kept, err := etcd.Open(ctx, c.etcdConfig())
	if err != nil {
		return err
	}
	defer kept.Close()
	c.etcd.Store(kept)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return kept.Run(ctx) })
	group.Go(func() error { return new(memory).run(ctx) })
	group.Go(func() error {
		if err := c.checkRestored(ctx, kept); err != nil {
			return err
		}
		c.audit = audit.New(audit.Config{Client: kept.Client, Caller: c.author, Diff: manifest.Diff, File: c.cfg.AuditLog, Logger: c.cfg.Logger.With("part", "audit")})
		if err := c.openTrust(ctx, kept, listener); err != nil {
			return err
		}
		c.store = store.New(c.storeConfig(kept))
		return c.serve(ctx, kept, listener)
	})
	return group.Wait()
}

func (c *ControlPlane) etcdConfig() etcd.Config {
	return etcd.Config{
		DataDir:    c.cfg.DataDir,
		Endpoints:  c.cfg.EtcdEndpoints,
		CA:         c.cfg.EtcdCA,
		Cert:       c.cfg.EtcdCert,
		Key:        c.cfg.EtcdKey,
		QuotaBytes: c.cfg.EtcdQuotaBytes,
		Logger:     c.cfg.Logger,
		Registerer: c.registry,
	}
}

func (c *ControlPlane) storeConfig(kept *etcd.Store) store.Config {
	config := store.Config{
		Client:       kept.Client,
		HistoryLimit: c.cfg.HistoryLimit,
		HistoryBytes: c.cfg.HistoryBytes,
		Full:         kept.Full,
		MaxOps:       kept.MaxOps,
		MaxBytes:     kept.MaxBytes,
		Validate:     manifest.ValidateSnapshot,
		Logger:       c.cfg.Logger.With("part", "store"),
		Edges: func(ctx context.Context) []map[string]string {
			if edges := c.edges.Load(); edges != nil {
				return (*edges)(ctx)
			}
			return nil
		},
	}
	if c.trust != nil {
		config.Seal, config.Open = c.trust.Seal, c.trust.Unseal
	}
	if c.audit != nil {
		config.Audit = c.audit.Change
	}
	return config
}

// Compact makes room in the store that cfg names, and says on out what it did: it
// removes history beyond the limits, drops superseded values, gives back their
// room and disarms etcd's alarm. An embedded store must not be in use. In an
// external cluster all users lose the revisions of the past; their newest values
// stay.
func Compact(ctx context.Context, cfg Config, out io.Writer) error {
	c := New(cfg)
	if len(cfg.EtcdEndpoints) == 0 {
		if _, err := os.Stat(filepath.Join(cfg.DataDir, "etcd")); err != nil {
			return fmt.Errorf("--data-dir: no embedded store there: %w", err)
		}
		unlock, err := lockDir(cfg.DataDir)
		if err != nil {
			return fmt.Errorf("%w; stop it first", err)
		}
		defer unlock()
	}
	kept, err := etcd.Open(ctx, c.etcdConfig())
	if err != nil {
		return err
	}
	defer kept.Close()
	removed, err := store.New(c.storeConfig(kept)).TrimHistory(ctx)
	if err != nil {
		return err
	}
	before, after, err := kept.Tidy(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "removed %d old revisions from the history; the database has %d bytes now, %d before; the store takes changes\n", removed, after, before)
	return nil
}

// openTrust loads or makes the certificate authority, and writes the admin
// context of the replica that made it.
func (c *ControlPlane) openTrust(ctx context.Context, kept *etcd.Store, listener net.Listener) error {
	c.trust = trust.New(trust.Config{
		Client:       kept.Client,
		TrustDomain:  c.cfg.TrustDomain,
		KEKFile:      c.cfg.KEKFile,
		EdgeCertTTL:  c.cfg.EdgeCertTTL,
		ExpiredGrace: c.cfg.ExpiredGrace,
		Revoked:      c.cutOff,
		HeldKeys:     c.heldKeys,
		Refused:      c.audit.Refused,
		Logger:       c.cfg.Logger.With("part", "trust"),
	})
	if err := c.trust.Open(ctx); err != nil {
		return err
	}
	path := filepath.Join(c.cfg.DataDir, "admin.yaml")
	_, statErr := os.Stat(path)
	if !kept.Embedded() && !c.trust.Created() && errors.Is(statErr, os.ErrNotExist) {
		return nil // a further replica does not mint administrators
	}
	servers := c.cfg.Advertise
	if len(servers) == 0 {
		_, port, err := net.SplitHostPort(listener.Addr().String())
		if err != nil {
			return err
		}
		servers = []string{net.JoinHostPort("127.0.0.1", port)}
	}
	if err := c.trust.WriteAdminContext(path, servers); err != nil {
		return fmt.Errorf("write the admin context: %w", err)
	}
	return nil
}

func (c *ControlPlane) serve(ctx context.Context, kept *etcd.Store, listener net.Listener) error {
	var feedServer *feed.Server
	orders := intent.New(intent.Config{
		Client:  kept.Client,
		Changed: func(edge string) { feedServer.FollowDrain(edge) },
		Logger:  c.cfg.Logger.With("part", "intent"),
	})
	var budgetServer *budget.Server
	feedServer = feed.New(feed.Config{
		Source:  c.store,
		Unseal:  c.store.Unseal,
		Edge:    c.edge,
		Drained: orders.Drained,
		Aimed:   true,
		Share: func(edge, pool string, of uint32) (uint32, bool) {
			return budgetServer.Share(edge, pool, of)
		},
		Logger:     c.cfg.Logger.With("part", "feed"),
		Registerer: c.registry,
	})
	var rolloutServer *rollout.Server
	served := &serving{store: c.store, record: func() *rollout.Record { return rolloutServer.Record() }}
	tallyServer := tally.New(tally.Config{
		Edge: c.edgeID,
		Assigned: func(ctx context.Context) (pools, listeners map[string]bool) {
			_, labels, err := c.trust.Edge(ctx)
			if err != nil {
				labels = nil // what is not known now counts as what was never given
			}
			return served.assigned(labels)
		},
		Live:       feedServer.Live,
		Logger:     c.cfg.Logger.With("part", "tally"),
		Registerer: c.registry,
	})
	adminServer := admin.New(admin.Config{
		Store:     c.store,
		Author:    c.author,
		Annotate:  func(revisions []*resealv1.Revision) { rolloutServer.Annotate(revisions) },
		Codes:     storeCodes,
		ReadAudit: c.audit.Read,
		Validate:  manifest.Validate,
		Logger:    c.cfg.Logger.With("part", "admin"),
	})
	group, err := c.newGroup(kept, listener.Addr(), feedServer.Connected)
	if err != nil {
		return err
	}
	keyringServer := keyring.New(keyring.Config{
		Client:     kept.Client,
		Name:       leaderName(c.cfg.ReplicaName, listener.Addr()),
		Source:     c.store,
		Seal:       c.trust.Seal,
		Unseal:     c.trust.Unseal,
		Edge:       c.edge,
		Selectors:  budget.Selectors,
		Author:     c.author,
		Logger:     c.cfg.Logger.With("part", "keyring"),
		Registerer: c.registry,
	})
	budgetServer = budget.New(budget.Config{
		Source: c.store,
		Base:   served.behind,
		Live:   keyringServer.Live,
		Pools: func(labels map[string]string) map[string]bool {
			pools, _ := served.assigned(labels)
			return pools
		},
		Changed: feedServer.Reshare,
		Logger:  c.cfg.Logger.With("part", "budget"),
	})
	sessionServer := sessions.New(sessions.Config{
		Edge:     c.edge,
		Pools:    served.shared,
		Revision: func() int64 { return c.store.Snapshot().Revision() },
		Roots:    c.roots,
		Logger:   c.cfg.Logger.With("part", "sessions"),
	})
	c.sessions, c.keyring = sessionServer, keyringServer
	door := gate.New(gate.Limits{}, c.cfg.Logger.With("part", "gate"))
	server, health := newGRPCServer(c.trust, c.audit, door, fleet.Codec{}, c.cfg.Version)
	resealv1.RegisterAdminServiceServer(server, adminServer)
	resealv1.RegisterFeedServiceServer(server, feedServer)
	previewer := feedServer.Previewer()
	resealv1.RegisterPreviewServiceServer(server, previewer)
	observer := feedServer.Observer()
	resealv1.RegisterObservationServiceServer(server, observer)
	everywhere := replicas.Services{
		Fleet:       feedServer,
		Tally:       tallyServer,
		FromReplica: trust.FromReplica,
		Store:       kept.Status,
		Orders:      c.orders(orders),
		Preview: replicas.Preview{
			Candidate: func(ctx context.Context, change *resealv1.ApplyRequest) (*resealv1.Snapshot, error) {
				dry := proto.CloneOf(change)
				dry.DryRun = true
				if _, err := adminServer.Apply(ctx, dry); err != nil {
					return nil, err
				}
				return c.store.Candidate(ctx, dry)
			},
			Ask: feedServer.PreviewEdges,
		},
	}
	fleetServer := replicas.NewFleet(group, everywhere)
	labels := fleetServer.Labels
	c.edges.Store(&labels)
	fleetTally := replicas.NewTally(group, everywhere)
	rolloutServer = c.newRollout(kept, listener.Addr(), feedServer, fleetServer, fleetTally)
	everywhere.Rollout = rolloutServer
	resealv1.RegisterFleetServiceServer(server, replicas.NewFleet(group, everywhere))
	resealv1.RegisterTallyServiceServer(server, fleetTally)
	resealv1.RegisterEnrollmentServiceServer(server, c.trust)
	resealv1.RegisterKeyringServiceServer(server, keyringServer)
	resealv1.RegisterSessionServiceServer(server, sessionServer)
	resealv1.RegisterBackupServiceServer(server, backup.NewServer(kept.Client, prefix, c.trust, c.cfg.Logger.With("part", "backup")))
	resealv1.RegisterReplicaServiceServer(server, relaying{sessions: sessionServer})
	links := fleet.NewLinks(map[string]fleet.Service{
		resealv1.FeedService_Sync_FullMethodName:           feedServer.Syncs(),
		resealv1.KeyringService_Hold_FullMethodName:        keyringServer.Holds(),
		resealv1.TallyService_Report_FullMethodName:        tallyServer.Reports(),
		resealv1.PreviewService_Preview_FullMethodName:     previewer.Service(),
		resealv1.ObservationService_Observe_FullMethodName: observer.Service(),
	})
	resealv1.RegisterLinkServiceServer(server, links)

	// A stop lets the edges go to other replicas first.
	outer := ctx
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	running, ctx := errgroup.WithContext(ctx)
	running.Go(func() error {
		select {
		case <-outer.Done():
			group.MoveOut(ctx, feedServer.Move)
			stop()
		case <-ctx.Done():
		}
		return nil
	})
	for _, run := range []func(context.Context) error{
		c.trust.Run, c.audit.Run, c.store.Run, orders.Run, feedServer.Run, tallyServer.Run, sessionServer.Run, keyringServer.Run, budgetServer.Run, rolloutServer.Run, door.Run, links.Run,
		relay(group, sessionServer),
		func(ctx context.Context) error { return group.Balance(ctx, feedServer.Move) },
		func(ctx context.Context) error { return c.joinGroup(ctx, group) },
		func(ctx context.Context) error { return c.serveGRPC(ctx, server, health, door.Listener(listener)) },
	} {
		running.Go(func() error { return run(ctx) })
	}
	return running.Wait()
}

// serveGRPC takes calls once the store holds a snapshot, so that no edge hears
// of an empty configuration, and revocations are known.
func (c *ControlPlane) serveGRPC(ctx context.Context, server *grpc.Server, health *healthServer, listener net.Listener) error {
	for _, ready := range []<-chan struct{}{c.store.Ready(), c.trust.Ready()} {
		select {
		case <-ready:
		case <-ctx.Done():
			return nil
		}
	}
	close(c.ready)
	health.serving()
	c.cfg.Logger.Info("control plane is ready", "listen", listener.Addr().String(), "version", c.cfg.Version,
		"revision", c.store.Snapshot().Revision(), "admin_context", filepath.Join(c.cfg.DataDir, "admin.yaml"))
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("gRPC server: %w", err)
	case <-ctx.Done():
	}
	health.Shutdown()
	// Streams of edges don't end by themselves; calls get a moment to finish.
	force := time.AfterFunc(time.Second, server.Stop)
	defer force.Stop()
	server.GracefulStop()
	// nil, unless the stop overtook Serve on its way.
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("gRPC server: %w", err)
	}
	return nil
}

// Handler serves /healthz, /readyz and /metrics.
func (c *ControlPlane) Handler() http.Handler {
	return c.admitted(newHandler(c.registry, c.ready, c.problem))
}

// problem says what does not work, "" when all does.
func (c *ControlPlane) problem() string {
	if kept := c.etcd.Load(); kept != nil {
		return kept.Problem()
	}
	return ""
}

// PageTLS serves the handler with mutual TLS: callers need a viewer's, operator's
// or administrator's certificate of this fleet. Handshakes fail until the control
// plane is ready.
func (c *ControlPlane) PageTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			select {
			case <-c.ready:
			default:
				return nil, errors.New("the control plane is not ready")
			}
			return c.trust.PageTLS(), nil
		},
	}
}

// roots is the fleet's authority.
func (c *ControlPlane) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.trust.CAPEM())
	return pool
}

// edge names the calling edge and the labels that its join token gave it.
func (c *ControlPlane) edge(ctx context.Context) (string, map[string]string, error) {
	return c.trust.Edge(ctx)
}

func (c *ControlPlane) edgeID(ctx context.Context) (string, error) {
	id, _, err := c.trust.Edge(ctx)
	return id, err
}

func (c *ControlPlane) author(ctx context.Context) string {
	caller, err := trust.Caller(ctx)
	if err != nil {
		return "unknown"
	}
	return caller.String()
}

// storeCodes is what the store's errors are to a caller.
var storeCodes = []admin.ErrorCode{
	{Is: store.ErrConflict, Code: codes.Aborted},
	{Is: store.ErrNotFound, Code: codes.NotFound},
	{Is: store.ErrNotKept, Code: codes.FailedPrecondition},
	{Is: store.ErrLargeChange, Code: codes.FailedPrecondition},
	{Is: store.ErrTooLarge, Code: codes.ResourceExhausted},
	{Is: store.ErrFull, Code: codes.ResourceExhausted},
	{Is: store.ErrUnavailable, Code: codes.Unavailable},
}
