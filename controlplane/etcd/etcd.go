// Package etcd opens the etcd that the control plane keeps everything in, in this
// process or elsewhere, and looks after its space: it compacts and defragments
// the embedded one, and says by name what is wrong with either.
package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

const (
	// An embedded store takes larger transactions than etcd's defaults (128
	// operations, 1.5 MiB), so that a whole directory of manifests is one apply.
	embeddedMaxOps   = 20_000
	embeddedMaxBytes = 10 << 20
	externalMaxOps   = 128
	externalMaxBytes = 1_400_000

	// DefaultQuotaBytes is etcd's own default.
	DefaultQuotaBytes = 2 << 30

	// Entries of the log that etcd keeps in memory, at 10 MiB each in the worst
	// case. There is no other member that might have to catch up.
	snapshotCount   = 20
	catchUpEntries  = 5
	maxSnapshotFile = 2
	maxWALFiles     = 2

	// The kernel's limit for the path of a unix socket is 108 bytes with the
	// final zero.
	maxSocketPath = 107
)

// Config says where etcd is. It is read once, by Open.
type Config struct {
	// DataDir holds the embedded store, in the folder etcd. It must exist.
	DataDir string
	// Endpoints is the external cluster. Empty: a store in this process.
	Endpoints []string
	// CA, Cert and Key are PEM files for TLS to the external cluster.
	CA, Cert, Key string
	// QuotaBytes bounds the embedded store's database file. Default 2 GiB. An
	// external cluster has its own (--quota-backend-bytes).
	QuotaBytes int64
	// Logger gets what goes wrong. Required.
	Logger *slog.Logger
	// Registerer takes the metrics. Nil: none.
	Registerer prometheus.Registerer
}

// Store is a client of an embedded or external etcd.
type Store struct {
	// Client is the connection. It is closed by Close.
	Client *clientv3.Client
	// MaxOps and MaxBytes bound a transaction.
	MaxOps   int
	MaxBytes int

	cfg      Config
	log      *slog.Logger
	embedded *embed.Etcd // nil for an external cluster
	sockets  string      // folder of the embedded store's sockets
	closing  atomic.Bool
	fatal    *fatal
	space    atomic.Pointer[space]
	interval time.Duration // checkInterval, but for tests
}

// Open connects to the external cluster, or starts the embedded store. A store
// that is damaged is an error, in one sentence.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.QuotaBytes <= 0 {
		cfg.QuotaBytes = DefaultQuotaBytes
	}
	s := &Store{cfg: cfg, log: cfg.Logger, fatal: newFatal(), interval: checkInterval}
	var err error
	if len(cfg.Endpoints) > 0 {
		err = s.dial()
	} else {
		err = s.start(ctx)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	s.space.Store(&space{embedded: s.embedded != nil})
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(&collector{s})
	}
	return s, nil
}

// Embedded tells whether the store is in this process.
func (s *Store) Embedded() bool { return s.embedded != nil }

func (s *Store) dial() error {
	tlsConfig, err := clientTLS(s.cfg)
	if err != nil {
		return err
	}
	s.MaxOps, s.MaxBytes = externalMaxOps, externalMaxBytes
	s.Client, err = newClient(s.cfg.Endpoints, tlsConfig, externalMaxBytes*2)
	if err != nil {
		return fmt.Errorf("etcd at %v: %w", s.cfg.Endpoints, err)
	}
	return nil
}

func clientTLS(cfg Config) (*tls.Config, error) {
	if cfg.CA == "" && cfg.Cert == "" && cfg.Key == "" {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CA != "" {
		pem, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, fmt.Errorf("--etcd-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--etcd-ca: %s holds no PEM certificate", cfg.CA)
		}
	}
	if cfg.Cert != "" || cfg.Key != "" {
		certificate, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
		if err != nil {
			return nil, fmt.Errorf("--etcd-cert and --etcd-key: %w", err)
		}
		config.Certificates = []tls.Certificate{certificate}
	}
	return config, nil
}

func newClient(endpoints []string, tlsConfig *tls.Config, maxBytes int) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:            endpoints,
		TLS:                  tlsConfig,
		DialKeepAliveTime:    5 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		MaxCallSendMsgSize:   maxBytes,
		MaxCallRecvMsgSize:   256 << 20,
		// The default backoff grows to two minutes: too long for a store that
		// is back.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 2 * time.Second,
		})},
		Logger: zap.NewNop(),
	})
}

// start runs etcd in this process. It listens on unix sockets in a folder that
// only this user can enter, never on a port.
func (s *Store) start(ctx context.Context) error {
	var err error
	if s.sockets, err = socketFolder(s.cfg.DataDir); err != nil {
		return err
	}
	s.MaxOps, s.MaxBytes = embeddedMaxOps, embeddedMaxBytes-1<<20
	socket := filepath.Join(s.sockets, "client.sock")
	config := embeddedConfig(s.cfg, socket, filepath.Join(s.sockets, "peer.sock"), s.newLogger())
	if s.embedded, err = s.fatal.startEtcd(config); err != nil {
		return fmt.Errorf("the embedded store in %s can't be opened (%w): %s", config.Dir, err, whatToDo(config.Dir, err))
	}
	select {
	case <-s.embedded.Server.ReadyNotify():
	case err = <-s.embedded.Err():
	case <-s.fatal.happened:
		return fmt.Errorf("the embedded store in %s can't be opened (%w): %s", config.Dir, s.fatal.err, whatToDo(config.Dir, s.fatal.err))
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil {
		s.Client, err = newClient([]string{"unix://" + socket}, nil, embeddedMaxBytes)
	}
	if err != nil {
		return fmt.Errorf("embedded store: %w", err)
	}
	return nil
}

func embeddedConfig(cfg Config, clientSocket, peerSocket string, logger *zap.Logger) *embed.Config {
	clientURL := url.URL{Scheme: "unix", Path: clientSocket}
	peerURL := url.URL{Scheme: "unix", Path: peerSocket}
	config := embed.NewConfig()
	config.Name = "reseal"
	config.Dir = filepath.Join(cfg.DataDir, "etcd")
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{clientURL}, []url.URL{clientURL}
	config.ListenPeerUrls = []url.URL{peerURL}
	// The advertised peer URL is stored in the member; it is never dialled by a
	// single member and must not change with the folder.
	config.AdvertisePeerUrls = []url.URL{{Scheme: "unix", Path: "/reseal-peer"}}
	config.InitialCluster = "reseal=unix:///reseal-peer"
	config.EnableGRPCGateway = false
	config.MaxTxnOps = embeddedMaxOps
	config.MaxRequestBytes = embeddedMaxBytes
	config.QuotaBackendBytes = cfg.QuotaBytes
	config.SnapshotCount, config.SnapshotCatchUpEntries = snapshotCount, catchUpEntries
	config.MaxSnapFiles, config.MaxWalFiles = maxSnapshotFile, maxWALFiles
	config.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logger)
	return config
}

// socketFolder is D/run, or a temporary folder where D is too deep for the
// path of a unix socket.
func socketFolder(dataDir string) (string, error) {
	dir := filepath.Join(dataDir, "run")
	if len(filepath.Join(dir, "client.sock")) > maxSocketPath {
		return os.MkdirTemp("", "reseal-etcd-")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o700)
}

// Close ends the client and the embedded store.
func (s *Store) Close() {
	s.closing.Store(true)
	if s.Client != nil {
		if err := s.Client.Close(); err != nil && !errors.Is(err, context.Canceled) {
			s.log.Warn("close the etcd client", "error", err)
		}
	}
	// After a fatal error etcd can't be closed: a goroutine that others wait for is
	// gone.
	if s.embedded != nil && s.fatal.error() == nil {
		s.embedded.Close()
	}
	if s.sockets != "" {
		if err := os.RemoveAll(s.sockets); err != nil {
			s.log.Warn("remove the embedded store's sockets", "error", err)
		}
	}
}
