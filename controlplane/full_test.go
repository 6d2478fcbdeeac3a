package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/reseal/reseal/controlplane/etcd/etcdtest"
	"github.com/reseal/reseal/controlplane/store"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// startEtcd runs an external etcd with a small quota, on a unix socket.
func startEtcd(t *testing.T, quota int64) (endpoint string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	config := etcdtest.Config(dir)
	config.QuotaBackendBytes = quota
	server, err := etcdtest.Start(config)
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			server.Close()
		}
	}
	t.Cleanup(stop)
	return etcdtest.Endpoint(dir), stop
}

func readyz(plane *ControlPlane) (int, string) {
	recorder := httptest.NewRecorder()
	plane.Handler().ServeHTTP(recorder, httptest.NewRequest("GET", "/readyz", nil))
	return recorder.Code, recorder.Body.String()
}

func waitReadyz(t *testing.T, plane *ControlPlane, want string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		code, text := readyz(plane)
		if code == 200 && strings.Contains(text, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("/readyz: %d %q, want %q", code, text, want)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestStartsWhileEtcdIsFull: a start needs no write, and what does not work is said.
func TestStartsWhileEtcdIsFull(t *testing.T) {
	endpoint, stopEtcd := startEtcd(t, 8<<20)
	cfg := testConfig(t.TempDir())
	cfg.EtcdEndpoints = []string{endpoint}
	plane, stop := start(t, cfg)
	revision := plane.store.Snapshot().Revision()
	waitReadyz(t, plane, "ok\n")

	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for i := 0; err == nil; i++ {
		_, err = client.Put(t.Context(), fmt.Sprint("/someone-else/", i), strings.Repeat("x", 100_000))
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatal(err)
	}
	waitReadyz(t, plane, "but: the store is full")
	stop()

	plane, stop = start(t, cfg)
	if got := plane.store.Snapshot().Revision(); got != revision {
		t.Errorf("revision %d after the restart, want %d", got, revision)
	}
	waitReadyz(t, plane, "etcdctl compact")
	pool := resealv1.NewResource("BackendPool")
	pool.Metadata.Name = "a"
	pool.GetBackendPool().Endpoints = []*resealv1.Endpoint{{Address: "127.0.0.1:1"}}
	_, err = plane.store.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool}})
	if !errors.Is(err, store.ErrFull) || !strings.Contains(err.Error(), "disarm") {
		t.Errorf("an apply: %v", err)
	}

	// Without etcd the last configuration is still served.
	stopEtcd()
	waitReadyz(t, plane, "etcd does not answer")
	stop()
}

// TestCompactCommand: it works on a store that is not in use, and says so when it
// is.
func TestCompactCommand(t *testing.T) {
	cfg := testConfig(t.TempDir())
	var out strings.Builder
	if err := Compact(t.Context(), cfg, &out); err == nil || !strings.Contains(err.Error(), "no embedded store") {
		t.Errorf("without a store: %v", err)
	}
	plane, stop := start(t, cfg)
	for i := range 5 {
		pool := resealv1.NewResource("BackendPool")
		pool.Metadata.Name = "a"
		pool.GetBackendPool().Endpoints = []*resealv1.Endpoint{{Address: fmt.Sprintf("127.0.0.1:%d", i+1)}}
		if _, err := plane.store.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool}}); err != nil {
			t.Fatal(err)
		}
	}
	revision := plane.store.Snapshot().Revision()
	if err := Compact(t.Context(), cfg, &out); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("while it is in use: %v", err)
	}
	stop()
	cfg.HistoryLimit = 2
	if err := Compact(context.WithoutCancel(t.Context()), cfg, &out); err != nil || !strings.Contains(out.String(), "removed 4 old revisions") {
		t.Errorf("%v; %q", err, out.String())
	}
	plane, _ = start(t, cfg)
	if got := plane.store.Snapshot().Revision(); got != revision {
		t.Errorf("revision %d afterwards, want %d", got, revision)
	}
	resp, err := plane.store.Revisions(t.Context(), &resealv1.ListRevisionsRequest{})
	if err != nil || len(resp.GetRevisions()) != 2 {
		t.Errorf("%d revisions are kept: %v", len(resp.GetRevisions()), err)
	}
}
