package keyring

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"

	"github.com/reseal/reseal/controlplane/etcd/etcdtest"
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
	shared = etcdtest.Socket(dir)
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

// startEtcd runs etcd with its files and sockets in dir.
func startEtcd(dir string) (*embed.Etcd, error) {
	config := etcdtest.Config(dir)
	// The shortest lease is one and a half elections.
	config.TickMs, config.ElectionMs = 20, 200
	return etcdtest.Start(config)
}
