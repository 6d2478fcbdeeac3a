package controlplane

import (
	"context"
	"io/fs"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testConfig(dir string) Config {
	return Config{DataDir: dir, Listen: "127.0.0.1:0", Version: "v-test", Logger: slog.New(slog.DiscardHandler)}
}

// start runs a control plane until the test or stop ends it.
func start(t *testing.T, cfg Config) (plane *ControlPlane, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	plane = New(cfg)
	ended := make(chan error, 1)
	go func() { ended <- plane.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	select {
	case <-plane.ready:
	case err := <-ended:
		t.Fatalf("ended early: %v", err)
	case <-time.After(30 * time.Second):
		t.Fatal("not ready")
	}
	return plane, stop
}

// The data directory may be deeper than the path of a unix socket can be, and
// nothing in it is readable by others.
func TestEmbeddedStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("deep/", 25))
	plane, stop := start(t, testConfig(dir))
	recorder := httptest.NewRecorder()
	plane.Handler().ServeHTTP(recorder, httptest.NewRequest("GET", "/readyz", nil))
	if recorder.Code != 200 {
		t.Errorf("/readyz: %d", recorder.Code)
	}
	for _, name := range []string{"admin.yaml", "kek"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("data directory: %v, %v", info, err)
	}

	if err := New(testConfig(dir)).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "in use by another control plane") {
		t.Errorf("a second process on the same directory: %v", err)
	}

	// The next start finds what the first one made.
	before := read(t, filepath.Join(dir, "admin.yaml"))
	revision := plane.store.Snapshot().Revision()
	stop()
	plane, _ = start(t, testConfig(dir))
	if got := plane.store.Snapshot().Revision(); got != revision {
		t.Errorf("revision %d after a restart, want %d", got, revision)
	}
	if plane.trust.Created() {
		t.Error("the restart made another certificate authority")
	}
	// Only the port, which is a free one here, may differ.
	if after := read(t, filepath.Join(dir, "admin.yaml")); certificate(after) != certificate(before) {
		t.Error("the restart made another admin certificate")
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func certificate(context string) string {
	_, after, _ := strings.Cut(context, "certificatePem:")
	return after
}

func TestPortInUse(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	cfg := testConfig(t.TempDir())
	cfg.Listen = taken.Addr().String()
	if err := New(cfg).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(filepath.Join(cfg.DataDir, "etcd")); !os.IsNotExist(err) {
		t.Errorf("a store was left behind: %v", err)
	}
}

// The store listens on unix sockets that are gone with it, and on no port.
func TestEmbeddedStoreSockets(t *testing.T) {
	cfg := testConfig(t.TempDir())
	_, stop := start(t, cfg)
	var sockets int
	err := filepath.WalkDir(filepath.Join(cfg.DataDir, "run"), func(_ string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type()&fs.ModeSocket != 0 {
			sockets++
		}
		return err
	})
	if err != nil || sockets == 0 {
		t.Errorf("%d sockets, %v", sockets, err)
	}
	stop()
	if _, err := os.Stat(filepath.Join(cfg.DataDir, "run")); !os.IsNotExist(err) {
		t.Errorf("the sockets' folder is left: %v", err)
	}
}
