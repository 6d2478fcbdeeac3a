package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestFirstStartMakesTheDefaultKeyringOnce(t *testing.T) {
	cfg, _ := testConfig(t)
	inert := New(cfg)
	if got := inert.Snapshot(); got == nil || got.Revision() != 0 || got.Len() != 0 {
		t.Errorf("snapshot before Run: %v", got)
	}
	replicas := make([]*Store, 4)
	for i := range replicas {
		replicas[i], _ = runStoppable(t, cfg)
	}
	for i, replica := range replicas {
		<-replica.Ready()
		snapshot := replica.Snapshot()
		if snapshot.Len() != 1 || snapshot.Get("Keyring", "default").GetMetadata().GetUid() == "" {
			t.Errorf("replica %d: %v", i, snapshot.All())
		}
		diff(t, "replicas agree", encoded(t, snapshot), encoded(t, replicas[0].Snapshot()))
	}
	resp, err := replicas[0].Revisions(t.Context(), &resealv1.ListRevisionsRequest{})
	if err != nil || len(resp.Revisions) != 1 {
		t.Fatalf("%d revisions after first start (%v)", len(resp.GetRevisions()), err)
	}
	if r := resp.Revisions[0]; r.Author != "system" || r.Revision != replicas[0].Snapshot().Revision() {
		t.Errorf("first revision: %v", r)
	}
	cluster := fmt.Sprintf("%x", uint64(shared.server.Server.Cluster().ID()))
	if got := replicas[0].Snapshot().ClusterID(); got != cluster {
		t.Errorf("cluster id %q, want %q", got, cluster)
	}
	// A later start finds it and makes nothing.
	again := run(t, cfg)
	diff(t, "started again", encoded(t, again.Snapshot()), encoded(t, replicas[0].Snapshot()))
}

func TestNext(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	first := s.Snapshot().Revision()
	if snapshot, err := s.Next(t.Context(), first-1); err != nil || snapshot.Revision() != first {
		t.Errorf("what is there already: %v, %v", snapshot, err)
	}
	const waiters = 8
	var wg sync.WaitGroup
	got := make([]int64, waiters)
	for i := range waiters {
		wg.Go(func() {
			if snapshot, err := s.Next(t.Context(), first); err == nil {
				got[i] = snapshot.Revision()
			}
		})
	}
	want := mustApply(t, s, pool("a", "10.0.0.1:443")).Revision
	wg.Wait()
	for i, revision := range got {
		if revision != want {
			t.Errorf("waiter %d got revision %d, want %d", i, revision, want)
		}
	}
	if _, err := s.Next(within(t, 20*time.Millisecond), want); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nothing new: %v", err)
	}
}

func TestStopped(t *testing.T) {
	cfg, _ := testConfig(t)
	s, stop := runStoppable(t, cfg)
	<-s.Ready()
	revision := s.Snapshot().Revision()
	ended := make(chan error, 1)
	go func() {
		_, err := s.Next(context.Background(), revision)
		ended <- err
	}()
	stop()
	if err := <-ended; !errors.Is(err, ErrUnavailable) {
		t.Errorf("Next after the end: %v", err)
	}
	if s.Snapshot().Revision() != revision {
		t.Error("the last snapshot is gone")
	}
	if err := s.Run(t.Context()); err == nil {
		t.Error("Run ran twice")
	}
}

// Snapshots that are handed out must stay as they are.
func TestSnapshotsAreImmutable(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	mustApply(t, s, pool("a", "10.0.0.1:443"), certificate("c", "PEM", "KEY"))
	held := s.Snapshot()
	before := encoded(t, held)
	sent := pool("a", "10.0.0.2:443")
	mustApply(t, s, sent, labelled(certificate("c", "PEM", ""), "x", "y"))
	sent.GetBackendPool().Endpoints[0].Address = "10.0.0.99:443"
	mustDelete(t, s, ref("Certificate", "c"))
	diff(t, "a held snapshot", encoded(t, held), before)
	if got := s.Snapshot().Get("BackendPool", "a").GetBackendPool().Endpoints[0].Address; got != "10.0.0.2:443" {
		t.Errorf("the store shares memory with a request: %s", got)
	}
}

func TestTwoWritersWithTheSameExpectedRevision(t *testing.T) {
	cfg, _ := testConfig(t)
	replicas := []*Store{run(t, cfg), run(t, cfg)}
	for round := range 10 {
		expected := mustApply(t, replicas[0], pool("round", fmt.Sprintf("10.0.0.%d:1", round))).Revision
		errs := make([]error, len(replicas))
		made := make([]int64, len(replicas))
		var wg sync.WaitGroup
		for i, replica := range replicas {
			wg.Go(func() {
				resp, err := replica.Apply(t.Context(), "tester", &resealv1.ApplyRequest{
					ExpectedRevision: expected, Resources: []*resealv1.Resource{pool("a", fmt.Sprintf("10.%d.0.%d:1", i, round))},
				})
				made[i], errs[i] = resp.GetRevision(), err
			})
		}
		wg.Wait()
		winner := 0
		if errs[0] != nil {
			winner = 1
		}
		var conflict *ConflictError
		if errs[winner] != nil || !errors.As(errs[1-winner], &conflict) {
			t.Fatalf("round %d: %v and %v, want one success and one conflict", round, errs[0], errs[1])
		}
		if conflict.Current != made[winner] {
			t.Errorf("round %d: the conflict names revision %d, the winner made %d", round, conflict.Current, made[winner])
		}
	}
}

func TestWritersWithoutExpectedRevisionAllWin(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	replicas := []*Store{run(t, cfg), run(t, cfg), run(t, cfg)}
	const each = 15
	var mu sync.Mutex
	revisions := map[int64]bool{}
	var wg sync.WaitGroup
	for i, replica := range replicas {
		for j := range 2 {
			wg.Go(func() {
				for n := range each {
					// Each sees the applies of all others, as a change of its own label.
					resp, err := replica.Apply(t.Context(), "tester", &resealv1.ApplyRequest{
						Resources: []*resealv1.Resource{pool(fmt.Sprintf("p-%d-%d", i, j), fmt.Sprintf("10.0.0.%d:1", n))},
					})
					if err != nil {
						t.Errorf("replica %d: %v", i, err)
						return
					}
					mu.Lock()
					revisions[resp.Revision] = true
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	if want := len(replicas) * 2 * each; len(revisions) != want {
		t.Errorf("%d revisions, want %d", len(revisions), want)
	}
	newest := int64(0)
	for revision := range revisions {
		newest = max(newest, revision)
	}
	for i, replica := range replicas {
		snapshot, err := replica.Next(within(t, 10*time.Second), newest-1)
		if err != nil || snapshot.Revision() != newest {
			t.Fatalf("replica %d: %v", i, err)
		}
		diff(t, fmt.Sprintf("replica %d", i), encoded(t, snapshot), encoded(t, replicas[0].Snapshot()))
	}
}

// A replica whose watch lags must not decide on what was true before.
func TestLaggingReplicaDecidesOnTheNewestState(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	ahead := run(t, cfg)
	line := newProxy(t, shared.socket)
	lagging := cfg
	lagging.Client = newClient(t, line.endpoint())
	lagging.RequestTimeout = 300 * time.Millisecond
	behind := run(t, lagging)
	mustApply(t, behind, pool("a", "10.0.0.1:443"))

	line.cut()
	mustApply(t, ahead, pool("a", "10.0.0.2:443"))
	_, err := behind.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")}})
	if !errors.Is(err, ErrUnavailable) {
		t.Errorf("cut off: %v, want ErrUnavailable", err)
	}
	line.mend()
	var resp *resealv1.ApplyResponse
	waitFor(t, "the replica to be back", func() bool {
		resp, err = behind.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a", "10.0.0.1:443")}})
		return err == nil
	})
	diff(t, "back again", actions(resp.Changes), []string{"BackendPool/a configured"})
}

func TestConflictErrorSaysWhatToDo(t *testing.T) {
	err := &ConflictError{Expected: 3, Current: 5}
	for _, text := range []string{"3", "5", "read again"} {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q lacks %q", err, text)
		}
	}
}
