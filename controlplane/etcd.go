package controlplane

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

	// The kernel's limit for the path of a unix socket is 108 bytes with the
	// final zero.
	maxSocketPath = 107
)

// etcdStore is a client of an embedded or external etcd.
type etcdStore struct {
	client   *clientv3.Client
	maxOps   int
	maxBytes int
	embedded *embed.Etcd // nil for an external cluster
	sockets  string      // folder of the embedded store's sockets
	closing  atomic.Bool
}

// openEtcd connects to the external cluster, or starts the embedded store.
func openEtcd(ctx context.Context, cfg Config) (*etcdStore, error) {
	if len(cfg.EtcdEndpoints) > 0 {
		return dialEtcd(cfg)
	}
	return startEmbedded(ctx, cfg)
}

func dialEtcd(cfg Config) (*etcdStore, error) {
	tlsConfig, err := etcdTLS(cfg)
	if err != nil {
		return nil, err
	}
	client, err := newEtcdClient(cfg.EtcdEndpoints, tlsConfig, externalMaxBytes*2)
	if err != nil {
		return nil, fmt.Errorf("etcd at %v: %w", cfg.EtcdEndpoints, err)
	}
	return &etcdStore{client: client, maxOps: externalMaxOps, maxBytes: externalMaxBytes}, nil
}

func etcdTLS(cfg Config) (*tls.Config, error) {
	if cfg.EtcdCA == "" && cfg.EtcdCert == "" && cfg.EtcdKey == "" {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.EtcdCA != "" {
		pem, err := os.ReadFile(cfg.EtcdCA)
		if err != nil {
			return nil, fmt.Errorf("--etcd-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--etcd-ca: %s holds no PEM certificate", cfg.EtcdCA)
		}
	}
	if cfg.EtcdCert != "" || cfg.EtcdKey != "" {
		certificate, err := tls.LoadX509KeyPair(cfg.EtcdCert, cfg.EtcdKey)
		if err != nil {
			return nil, fmt.Errorf("--etcd-cert and --etcd-key: %w", err)
		}
		config.Certificates = []tls.Certificate{certificate}
	}
	return config, nil
}

func newEtcdClient(endpoints []string, tlsConfig *tls.Config, maxBytes int) (*clientv3.Client, error) {
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

// startEmbedded runs etcd in this process. It listens on unix sockets in a
// folder that only this user can enter, never on a port.
func startEmbedded(ctx context.Context, cfg Config) (*etcdStore, error) {
	sockets, err := socketFolder(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	store := &etcdStore{maxOps: embeddedMaxOps, maxBytes: embeddedMaxBytes - 1<<20, sockets: sockets}
	clientSocket := filepath.Join(sockets, "client.sock")
	config := embeddedConfig(filepath.Join(cfg.DataDir, "etcd"), clientSocket, filepath.Join(sockets, "peer.sock"),
		newEtcdLogger(cfg.Logger, &store.closing))
	store.embedded, err = embed.StartEtcd(config)
	if err != nil {
		store.close(cfg.Logger)
		return nil, fmt.Errorf("start the embedded store in %s: %w", config.Dir, err)
	}
	select {
	case <-store.embedded.Server.ReadyNotify():
	case err = <-store.embedded.Err():
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil {
		store.client, err = newEtcdClient([]string{"unix://" + clientSocket}, nil, embeddedMaxBytes)
	}
	if err != nil {
		store.close(cfg.Logger)
		return nil, fmt.Errorf("embedded store: %w", err)
	}
	return store, nil
}

func embeddedConfig(dir, clientSocket, peerSocket string, logger *zap.Logger) *embed.Config {
	clientURL := url.URL{Scheme: "unix", Path: clientSocket}
	peerURL := url.URL{Scheme: "unix", Path: peerSocket}
	config := embed.NewConfig()
	config.Name = "reseal"
	config.Dir = dir
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{clientURL}, []url.URL{clientURL}
	config.ListenPeerUrls = []url.URL{peerURL}
	// The advertised peer URL is stored in the member; it is never dialled by a
	// single member and must not change with the folder.
	config.AdvertisePeerUrls = []url.URL{{Scheme: "unix", Path: "/reseal-peer"}}
	config.InitialCluster = "reseal=unix:///reseal-peer"
	config.EnableGRPCGateway = false
	config.MaxTxnOps = embeddedMaxOps
	config.MaxRequestBytes = embeddedMaxBytes
	config.AutoCompactionMode = "periodic"
	config.AutoCompactionRetention = "1h"
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

// failed yields the embedded store's fatal error. It blocks for ever with an
// external cluster.
func (e *etcdStore) failed() <-chan error {
	if e.embedded == nil {
		return nil
	}
	return e.embedded.Err()
}

func (e *etcdStore) close(logger *slog.Logger) {
	e.closing.Store(true)
	if e.client != nil {
		if err := e.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
			logger.Warn("close the etcd client", "error", err)
		}
	}
	if e.embedded != nil {
		e.embedded.Close()
	}
	if e.sockets != "" {
		if err := os.RemoveAll(e.sockets); err != nil {
			logger.Warn("remove the embedded store's sockets", "error", err)
		}
	}
}
