// Package etcdtest runs etcd for tests: embedded, quiet, on sockets of its own.
package etcdtest

import (
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// ready bounds the wait for a server.
const ready = 30 * time.Second

// Socket is where a server that is configured with dir listens.
func Socket(dir string) string { return filepath.Join(dir, "c") }

// Endpoint is the same for a client.
func Endpoint(dir string) string { return "unix://" + Socket(dir) }

// Config configures a server with its files and sockets in dir, whose path must be
// short enough for a socket.
func Config(dir string) *embed.Config {
	client := url.URL{Scheme: "unix", Path: Socket(dir)}
	peer := url.URL{Scheme: "unix", Path: filepath.Join(dir, "p")}
	config := embed.NewConfig()
	config.Dir = filepath.Join(dir, "data")
	config.UnsafeNoFsync = true
	config.EnableGRPCGateway = false
	config.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	config.InitialCluster = config.Name + "=" + peer.String()
	return config
}

// Start starts a server and waits until it serves.
func Start(config *embed.Config) (*embed.Etcd, error) {
	server, err := embed.StartEtcd(config)
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(ready)
	defer timer.Stop()
	select {
	case <-server.Server.ReadyNotify():
		return server, nil
	case <-timer.C:
		server.Close()
		return nil, errors.New("etcd does not get ready")
	}
}

// New is a client of a server that ends with the test.
func New(t *testing.T) *clientv3.Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	server, err := Start(Config(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{Endpoint(dir)}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}
