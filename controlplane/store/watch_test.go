package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// privateEtcd is an etcd that a test may stop.
func privateEtcd(t *testing.T) *testEtcd {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	e, err := startEtcd(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.stop() })
	return e
}

func TestCompactionUnderAWatcher(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	writer := run(t, cfg)
	line := newProxy(t, shared.socket)
	watched, log := cfg, &journal{}
	watched.Client, watched.Logger = newClient(t, line.endpoint()), newLogger(log)
	watcher := run(t, watched)
	held := watcher.Snapshot()

	line.cut()
	for i := range 20 {
		mustApply(t, writer, pool("a", fmt.Sprintf("10.0.0.%d:443", i)), pool(fmt.Sprintf("p%d", i)))
	}
	newest := mustDelete(t, writer, ref("BackendPool", "p3")).Revision
	if _, err := cfg.Client.Compact(t.Context(), newest); err != nil {
		t.Fatal(err)
	}
	if watcher.Snapshot() != held {
		t.Error("the snapshot changed without etcd")
	}
	line.mend()
	snapshot, err := watcher.Next(within(t, 10*time.Second), newest-1)
	if err != nil {
		t.Fatal(err)
	}
	diff(t, "after compaction", encoded(t, snapshot), encoded(t, writer.Snapshot()))
	if !log.contains("compacted") {
		t.Error("the log does not tell of the compaction")
	}
	mustApply(t, watcher, pool("after", "10.0.0.1:443"))
}

func TestRestartOfEtcd(t *testing.T) {
	t.Parallel()
	etcd := privateEtcd(t)
	cfg, _ := testConfig(t)
	cfg.Client = newClient(t, "unix://"+etcd.socket)
	cfg.RequestTimeout = 500 * time.Millisecond
	s := run(t, cfg)
	before := mustApply(t, s, pool("a", "10.0.0.1:443")).Revision
	held := encoded(t, s.Snapshot())
	etcd.stop()
	diff(t, "while etcd is down", encoded(t, s.Snapshot()), held)
	if _, err := s.At(t.Context(), before); err != nil {
		t.Errorf("At while etcd is down: %v", err)
	}
	begin := time.Now()
	_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("b", "10.0.0.1:443")}})
	if !errors.Is(err, ErrUnavailable) {
		t.Errorf("apply while etcd is down: %v after %v", err, time.Since(begin))
	}
	if err := etcd.start(); err != nil {
		t.Fatal(err)
	}
	var made *resealv1.ApplyResponse
	waitFor(t, "etcd to be back", func() bool {
		made, err = s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("b", "10.0.0.1:443")}})
		return err == nil
	})
	if made.Revision <= before || s.Snapshot().Revision() != made.Revision || s.Snapshot().Get("BackendPool", "a") == nil {
		t.Errorf("after the restart: revision %d, snapshot %v", made.Revision, s.Snapshot().All())
	}
}

// A store that starts before its etcd waits for it.
func TestStartsBeforeEtcd(t *testing.T) {
	t.Parallel()
	etcd := privateEtcd(t)
	etcd.stop()
	cfg, log := testConfig(t)
	cfg.Client = newClient(t, "unix://"+etcd.socket)
	cfg.RequestTimeout = 200 * time.Millisecond
	s, _ := runStoppable(t, cfg)
	waitFor(t, "a complaint", func() bool { return log.contains("lost track of etcd") })
	if _, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a")}}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("apply before etcd: %v", err)
	}
	if err := etcd.start(); err != nil {
		t.Fatal(err)
	}
	awaitReady(t, s)
}

// Another etcd in place of the first, whose revisions start anew.
func TestReplacedEtcd(t *testing.T) {
	t.Parallel()
	first, second := privateEtcd(t), privateEtcd(t)
	cfg, log := testConfig(t)
	line := newProxy(t, first.socket)
	cfg.Client = newClient(t, line.endpoint())
	s := run(t, cfg)
	for i := range 5 {
		mustApply(t, s, pool("a", fmt.Sprintf("10.0.0.%d:443", i)))
	}
	old := s.Snapshot()
	line.cut()
	line.mu.Lock()
	line.target = second.socket
	line.mu.Unlock()
	line.mend()
	// The periodic check is what finds out; here it is made at once.
	st := s.published.Load().state
	var err error
	waitFor(t, "the check", func() bool {
		err = s.check(t.Context(), &quietCheck{cluster: old.ClusterID()}, st)
		return err != nil
	})
	if !errors.Is(err, errReload) {
		t.Fatalf("check: %v", err)
	}
	other := New(cfg)
	other.published.Store(s.published.Load())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- other.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	snapshot, err := other.Next(within(t, 10*time.Second), old.Revision())
	if err != nil || snapshot.ClusterID() == old.ClusterID() || snapshot.Revision() >= old.Revision() || snapshot.Len() != 1 {
		t.Fatalf("new numbering: %v, %v", snapshot, err)
	}
	if !log.contains("revisions start anew") {
		t.Error("the log does not tell")
	}
	// In the new numbering Next waits again.
	if _, err := other.Next(within(t, 30*time.Millisecond), snapshot.Revision()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Next: %v", err)
	}
}

func TestQuietCheck(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	mustApply(t, s, pool("a", "10.0.0.1:443"))
	at := func(revision int64) *state {
		return &state{snapshot: resealv1.NewSnapshot(s.Snapshot().ClusterID(), revision, nil)}
	}
	last := &quietCheck{cluster: s.Snapshot().ClusterID()}
	current := s.Snapshot().Revision()
	if err := s.check(t.Context(), last, at(current)); err != nil {
		t.Errorf("in step: %v", err)
	}
	if err := s.check(t.Context(), last, at(current+1)); !errors.Is(err, errReload) {
		t.Errorf("etcd went back: %v", err)
	}
	if err := s.check(t.Context(), &quietCheck{cluster: "other"}, at(current)); !errors.Is(err, errReload) {
		t.Errorf("another cluster: %v", err)
	}
	last = &quietCheck{cluster: s.Snapshot().ClusterID()}
	if err := s.check(t.Context(), last, at(current-1)); err != nil {
		t.Errorf("behind for the first time: %v", err)
	}
	if err := s.check(t.Context(), last, at(current-1)); !errors.Is(err, errReload) {
		t.Errorf("still behind: %v", err)
	}
}

// All that etcdctl can do to the store's keys.
func TestForeignWrites(t *testing.T) {
	t.Parallel()
	cfg, log := testConfig(t)
	s := run(t, cfg)
	mustApply(t, s, pool("a", "10.0.0.1:443"))
	before := s.Snapshot()
	put := func(key, value string) {
		t.Helper()
		if _, err := cfg.Client.Put(t.Context(), cfg.Prefix+key, value); err != nil {
			t.Fatal(err)
		}
	}
	// Others keep keys below the prefix, also between the store's.
	put("identity/ca", "x")
	put("resource", "x")
	if s.Snapshot() != before {
		t.Error("a foreign key changed the snapshot")
	}
	// A kind of a newer version is left alone.
	put("resources/Teapot/x", "x")
	waitFor(t, "the warning", func() bool { return log.contains("Teapot/x") })
	if got := mustApply(t, s, pool("b", "10.0.0.1:443")); s.Snapshot().Revision() != got.Revision {
		t.Error("stuck after an unknown kind")
	}
	// A write past the head shows with the next change, and is complained about.
	if _, err := cfg.Client.Delete(t.Context(), cfg.Prefix+"resources/BackendPool/b"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the complaint", func() bool { return log.contains("changed in etcd without the store") })
	mustApply(t, s, pool("c", "10.0.0.1:443"))
	if s.Snapshot().Get("BackendPool", "b") != nil {
		t.Error("b is still there")
	}
	fresh := run(t, cfg)
	diff(t, "a replica that was not there", encoded(t, fresh.Snapshot()), encoded(t, s.Snapshot()))

	// Damage keeps the last good snapshot, until it is repaired.
	held := s.Snapshot()
	put("resources/BackendPool/c", "\xff\xff")
	waitFor(t, "the error", func() bool { return log.contains("damaged resource BackendPool/c") })
	if s.Snapshot() != held {
		t.Error("damage changed the snapshot")
	}
	if _, err := cfg.Client.Delete(t.Context(), cfg.Prefix+"resources/BackendPool/c"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the repair", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := s.Apply(ctx, "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("d", "10.0.0.1:443")}})
		return err == nil
	})

	// Everything removed is a first start.
	if _, err := cfg.Client.Delete(t.Context(), cfg.Prefix, clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a new beginning", func() bool { return s.Snapshot().Len() == 1 && s.Snapshot().Get("Keyring", "default") != nil })
}

func TestDamagedHistory(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	var made []int64
	for i := range 4 {
		made = append(made, mustApply(t, s, pool("a", fmt.Sprintf("10.0.0.%d:443", i))).Revision)
	}
	if _, err := cfg.Client.Put(t.Context(), s.keys.history(5), "{"); err != nil {
		t.Fatal(err)
	}
	damaged := run(t, cfg)
	if _, err := damaged.At(t.Context(), made[0]); err == nil || errors.Is(err, ErrNotKept) {
		t.Errorf("At through a damaged record: %v", err)
	}
	if _, err := damaged.Revisions(t.Context(), &resealv1.ListRevisionsRequest{}); err == nil {
		t.Error("a damaged history was listed")
	}
	if _, err := cfg.Client.Delete(t.Context(), s.keys.history(4)); err != nil {
		t.Fatal(err)
	}
	if _, err := cfg.Client.Delete(t.Context(), s.keys.history(5)); err != nil {
		t.Fatal(err)
	}
	gap := run(t, cfg)
	if _, err := gap.At(t.Context(), made[0]); !errors.Is(err, ErrNotKept) || !strings.Contains(err.Error(), "gap") {
		t.Errorf("At across a gap: %v", err)
	}
	mustApply(t, gap, pool("b", "10.0.0.1:443"))
}

// A watch that etcd cancels, for whatever reason, is begun anew.
func TestCancelledWatch(t *testing.T) {
	cfg, log := testConfig(t)
	breaking := &breakingWatcher{Watcher: cfg.Client.Watcher, answers: make(chan clientv3.WatchResponse)}
	cfg.Client.Watcher = breaking
	s := run(t, cfg)
	breaking.answers <- clientv3.WatchResponse{Canceled: true}
	waitFor(t, "the warning", func() bool { return log.contains("lost track of etcd") })
	mustApply(t, s, pool("a", "10.0.0.1:443"))
}

// breakingWatcher gives its first watch the answers of the test.
type breakingWatcher struct {
	clientv3.Watcher
	answers chan clientv3.WatchResponse
	used    bool
}

func (w *breakingWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	if !w.used {
		w.used = true
		return w.answers
	}
	return w.Watcher.Watch(ctx, key, opts...)
}

// A writer reads what it wrote, however late the watch is.
func TestApplyWaitsForItsOwnRevision(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	slow := &slowWatcher{Watcher: cfg.Client.Watcher}
	slow.delay.Store(int64(50 * time.Millisecond))
	cfg.Client.Watcher = slow
	s := run(t, cfg)
	for i := range 5 {
		made := mustApply(t, s, pool("a", fmt.Sprintf("10.0.0.%d:1", i)))
		if got := s.Snapshot().Revision(); got != made.Revision {
			t.Errorf("snapshot at %d after an apply at %d", got, made.Revision)
		}
	}
	// Its deadline is the only limit, and doesn't undo what was done.
	slow.delay.Store(int64(time.Minute))
	made, err := s.Apply(within(t, time.Second), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("b")}})
	if err != nil || s.Snapshot().Revision() >= made.Revision {
		t.Errorf("made %v, %v; snapshot at %d", made, err, s.Snapshot().Revision())
	}
}

// slowWatcher holds back every answer for a while.
type slowWatcher struct {
	clientv3.Watcher
	delay atomic.Int64 // a time.Duration
}

func (w *slowWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	slow := make(chan clientv3.WatchResponse)
	answers := w.Watcher.Watch(ctx, key, opts...)
	go func() {
		defer close(slow)
		for answer := range answers {
			held := newBackoff(0, time.Hour)
			held.next = 2 * time.Duration(w.delay.Load())
			held.sleep(ctx)
			select {
			case slow <- answer:
			case <-ctx.Done():
			}
		}
	}()
	return slow
}

// Many resources are loaded in pages, as of one revision.
func TestLoadInPages(t *testing.T) {
	t.Parallel()
	etcd := privateEtcd(t)
	cfg, _ := testConfig(t)
	cfg.Client = newClient(t, "unix://"+etcd.socket)
	s := run(t, cfg)
	for part := range 11 {
		var resources []*resealv1.Resource
		for i := range 100 {
			resources = append(resources, pool(fmt.Sprintf("p%02d-%03d", part, i), "10.0.0.1:443"))
		}
		mustApply(t, s, resources...)
	}
	fresh := run(t, cfg)
	if fresh.Snapshot().Len() != 1101 {
		t.Fatalf("%d resources, want 1101", fresh.Snapshot().Len())
	}
	diff(t, "loaded", encoded(t, fresh.Snapshot()), encoded(t, s.Snapshot()))
}
