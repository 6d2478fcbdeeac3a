package admin_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"
	"go.uber.org/zap"
)

// etcd is the client of an etcd in this process.
var etcd *clientv3.Client

var prefixes atomic.Int64

func newPrefix() string { return fmt.Sprintf("/t%d/", prefixes.Add(1)) }

type suite struct{ m *testing.M }

// Run starts and stops etcd around the tests, so that the leak check sees
// neither.
func (s suite) Run() int {
	dir, err := os.MkdirTemp("", "admin")
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
	defer etcd.Close()
	return s.m.Run()
}

func startEtcd(dir string) (*embed.Etcd, error) {
	client := url.URL{Scheme: "unix", Path: filepath.Join(dir, "c.sock")}
	peer := url.URL{Scheme: "unix", Path: filepath.Join(dir, "p.sock")}
	config := embed.NewConfig()
	config.Dir = filepath.Join(dir, "data")
	config.UnsafeNoFsync = true
	config.EnableGRPCGateway = false
	config.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	config.InitialCluster = config.Name + "=" + peer.String()
	server, err := embed.StartEtcd(config)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	select {
	case <-server.Server.ReadyNotify():
	case <-ctx.Done():
		return nil, errors.New("etcd does not get ready")
	}
	etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{client.String()}, Logger: zap.NewNop()})
	return server, err
}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(suite{m: m})
}
