package admin_test

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/reseal/reseal/controlplane/etcd/etcdtest"
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
	server, err := etcdtest.Start(etcdtest.Config(dir))
	if err != nil {
		fmt.Fprintln(os.Stderr, "start etcd:", err)
		return 1
	}
	defer server.Close()
	if etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{etcdtest.Endpoint(dir)}, Logger: zap.NewNop()}); err != nil {
		fmt.Fprintln(os.Stderr, "connect to etcd:", err)
		return 1
	}
	defer etcd.Close()
	return s.m.Run()
}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(suite{m: m})
}
