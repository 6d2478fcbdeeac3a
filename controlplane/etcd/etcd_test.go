package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/goleak"
)

// openedDir is the environment variable that makes the test binary open a store
// and say how that went: what damage does must not end the tests.
const openedDir = "RESEAL_TEST_OPEN_DIR"

func TestMain(m *testing.M) {
	wal.SegmentSizeBytes = 4 << 20 // the tests copy logs
	if dir := os.Getenv(openedDir); dir != "" {
		s, err := Open(context.Background(), Config{DataDir: dir, Logger: slog.New(slog.DiscardHandler)})
		if err == nil {
			// What is damaged may show when it is read.
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			go func() {
				_, _ = s.Client.Get(ctx, "", clientv3.WithFromKey())
				cancel()
			}()
			if err = s.Run(ctx); err == nil {
				fmt.Println("opened")
				os.Exit(0)
			}
		}
		fmt.Println(err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

const testQuota = 16 << 20

func open(t *testing.T, dir string, options ...func(*Config)) *Store {
	t.Helper()
	cfg := Config{DataDir: dir, QuotaBytes: testQuota, Logger: slog.New(slog.DiscardHandler)}
	for _, option := range options {
		option(&cfg)
	}
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.interval = 20 * time.Millisecond
	return s
}

// keep runs the upkeep until the test ends, or until stop.
func keep(t *testing.T, s *Store) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		s.Close()
	})
	t.Cleanup(stop)
	return stop
}

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

var value = strings.Repeat("x", 512<<10)

func put(t *testing.T, s *Store, key string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := s.Client.Put(ctx, key, value)
	if err != nil && !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatal(err)
	}
	return err
}

// TestSupersededValuesMakeRoom: changes that add up to many times the quota fit,
// since each replaces what there was.
func TestSupersededValuesMakeRoom(t *testing.T) {
	registry := prometheus.NewRegistry()
	s := open(t, tempDir(t), func(c *Config) { c.Registerer = registry })
	keep(t, s)
	for range 3 * testQuota / len(value) {
		eventually(t, "room for a change", func() bool { return put(t, s, "key") == nil })
	}
	eventually(t, "there is room in the end", func() bool { return s.Full() == nil && s.Problem() == "" })
	if err := put(t, s, "key"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(registry, "reseal_store_bytes", "reseal_store_writable"); err != nil || n != 4 {
		t.Errorf("%d metrics, %v", n, err)
	}
}

// TestFull: a store that is full of what is needed says so, and takes writes
// again on its own once something has been deleted.
func TestFull(t *testing.T) {
	s := open(t, tempDir(t))
	keep(t, s)
	n := 0
	// Before it is full of what is needed, room is made more than once.
	eventually(t, "it says that it is full", func() bool {
		if put(t, s, fmt.Sprint("key", n)) == nil {
			n++
		}
		needed := s.space.Load().inUse
		return float64(needed) >= fullAt*testQuota && errors.Is(s.Full(), ErrFull)
	})
	if n < testQuota/len(value)/2 {
		t.Fatalf("full after %d values", n)
	}
	for _, want := range []string{"--etcd-quota-bytes", "reseal-controlplane compact", "16.0 MiB"} {
		if text := s.Problem(); !strings.Contains(text, want) {
			t.Errorf("%q does not name %s", text, want)
		}
	}
	if _, err := s.Client.Delete(t.Context(), "key", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it takes writes again", func() bool { return s.Full() == nil && put(t, s, "again") == nil })
}

// TestTidy is the way back by command, also for what was left full by a version
// that did not look after its space.
func TestTidy(t *testing.T) {
	dir := tempDir(t)
	s := open(t, dir)
	for put(t, s, "key") == nil {
	}
	s.Close()
	s = open(t, dir)
	defer s.Close()
	if err := put(t, s, "key"); err == nil {
		t.Fatal("the store is not full")
	}
	before, after, err := s.Tidy(t.Context())
	if err != nil || before < testQuota/2 || after > testQuota/4 {
		t.Errorf("%d bytes before, %d after: %v", before, after, err)
	}
	if err := put(t, s, "key"); err != nil {
		t.Errorf("after it: %v", err)
	}
}

// TestWarning: there is one before the store is full.
func TestWarning(t *testing.T) {
	var log strings.Builder
	s := open(t, tempDir(t), func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		c.QuotaBytes = 4 * testQuota // several values between the warning and the end
	})
	stop := keep(t, s)
	for n := 0; s.space.Load().share() < warnAt; n++ {
		if err := put(t, s, fmt.Sprint("key", n)); err != nil {
			t.Fatal(err)
		}
		seen := s.space.Load()
		eventually(t, "the next look", func() bool { return s.space.Load() != seen })
	}
	if full, text := s.Full(), s.Problem(); full != nil || !strings.Contains(text, "% full") {
		t.Errorf("%v; %q", full, text)
	}
	time.Sleep(5 * s.interval)
	stop()
	if n := strings.Count(log.String(), "room in the store is short"); n != 1 {
		t.Errorf("it was said %d times", n)
	}
}

func TestUnreachable(t *testing.T) {
	s := open(t, tempDir(t), func(c *Config) { c.Endpoints = []string{"unix:///nowhere/at/all"} })
	keep(t, s)
	eventually(t, "that is said", func() bool { return strings.Contains(s.Problem(), "etcd does not answer") })
	if s.Full() != nil {
		t.Error("an etcd that can't be reached is called full")
	}
}

// TestDamaged: whatever is wrong with the files, the process ends with one sentence
// that says what to do, not with a trace.
func TestDamaged(t *testing.T) {
	whole := tempDir(t)
	s := open(t, whole, func(c *Config) { c.QuotaBytes = 4 * testQuota }) // nobody makes room here
	for i := range snapshotCount + 5 {
		if err := put(t, s, fmt.Sprint("key", i%5)); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	for name, damage := range map[string]struct {
		file string
		do   func([]byte) []byte
	}{
		"log of zeros":            {"wal/*.wal", zeros},
		"log with garbage":        {"wal/*.wal", garbage},
		"database cut short":      {"snap/db", func(data []byte) []byte { return data[:len(data)/3] }},
		"database without pages":  {"snap/db", func(data []byte) []byte { return data[:8192] }},
		"database of zeros":       {"snap/db", zeros},
		"database with garbage":   {"snap/db", garbage},
		"database is something":   {"snap/db", func([]byte) []byte { return []byte("something") }},
		"snapshot of the log":     {"snap/*.snap", garbage},
		"database is not there":   {"snap/db", nil},
		"log is not there":        {"wal/*.wal", nil},
		"no damage (a control)":   {"snap/db", func(data []byte) []byte { return data }},
		"log cut in its last bit": {"wal/*.wal", func(data []byte) []byte { return data[:len(data)-1] }},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			if err := os.CopyFS(filepath.Join(dir, "etcd"), os.DirFS(filepath.Join(whole, "etcd"))); err != nil {
				t.Fatal(err)
			}
			alter(t, filepath.Join(dir, "etcd", "member", filepath.FromSlash(damage.file)), damage.do)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			command := exec.CommandContext(ctx, os.Args[0])
			command.Cancel = func() error { return command.Process.Signal(syscall.SIGQUIT) }
			command.Env = append(os.Environ(), openedDir+"="+dir)
			output, err := command.CombinedOutput()
			text := strings.TrimSpace(string(output))
			if text == "opened" && err == nil {
				return // etcd mends some, or does not need what is damaged
			}
			if name == "no damage (a control)" || strings.Contains(text, "goroutine ") || strings.Count(text, "\n") > 0 ||
				!strings.Contains(text, "put back a copy") {
				t.Errorf("%v: %.2000s", err, text)
			}
		})
	}
}

func zeros(data []byte) []byte { return make([]byte, len(data)) }

// garbage spoils every 4 KiB.
func garbage(data []byte) []byte {
	for i := range data {
		if i%4096 > 32 && i%4096 < 200 {
			data[i] ^= 0x5a
		}
	}
	return data
}

// alter rewrites the files of a pattern; nil removes them.
func alter(t *testing.T, pattern string, do func([]byte) []byte) {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %d files, %v", pattern, len(files), err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err == nil && do == nil {
			err = os.Remove(file)
		} else if err == nil {
			err = os.WriteFile(file, do(data), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
