package store

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// shared is the etcd that most tests use, each below its own prefix.
var shared *testEtcd

type suite struct{ m *testing.M }

// Run starts and stops etcd around the tests, so that the leak check sees
// neither.
func (s suite) Run() int {
	dir, err := os.MkdirTemp("", "store")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if shared, err = startEtcd(dir); err != nil {
		fmt.Fprintln(os.Stderr, "start etcd:", err)
		return 1
	}
	defer shared.stop()
	return s.m.Run()
}

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("rapid.checks").Value.String() == "100" {
		_ = flag.Set("rapid.checks", "25")
	}
	goleak.VerifyTestMain(suite{m: m},
		// A member that is killed while another one asks for its version keeps
		// that handler: etcd closes its backend with the lock held.
		goleak.IgnoreAnyFunction("go.etcd.io/etcd/server/v3/etcdserver.(*EtcdServer).StorageVersion"))
}
