package keyring

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"
	"go.uber.org/zap"
)

// shared is the socket of the etcd that the tests use, each below a prefix of its
// own.
var shared string

type suite struct{ m *testing.M }

// Run starts and stops etcd around the tests, so that the leak check does not see
// it.
func (s suite) Run() int {
	dir, err := os.MkdirTemp("", "keyring")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	server, err := startEtcd(dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, "start etcd:", err)
		return 1
	}
	defer server.Close()
	shared = filepath.Join(dir, "c.sock")
	return s.m.Run()
}

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("rapid.checks").Value.String() == "100" {
		_ = flag.Set("rapid.checks", "500")
	}
	// They mostly wait.
	if err := flag.Set("test.parallel", "10"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(suite{m})
}

// startEtcd runs etcd with its sockets in dir.
func startEtcd(dir string) (*embed.Etcd, error) {
	client := url.URL{Scheme: "unix", Path: filepath.Join(dir, "c.sock")}
	peer := url.URL{Scheme: "unix", Path: filepath.Join(dir, "p.sock")}
	config := embed.NewConfig()
	config.Dir = filepath.Join(dir, "data")
	config.UnsafeNoFsync = true
	config.EnableGRPCGateway = false
	// The shortest lease is one and a half elections.
	config.TickMs, config.ElectionMs = 20, 200
	config.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	config.InitialCluster = config.Name + "=" + peer.String()
	server, err := embed.StartEtcd(config)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	select {
	case <-server.Server.ReadyNotify():
		return server, nil
	case <-ctx.Done():
		server.Close()
		return nil, errors.New("etcd does not get ready")
	}
}
