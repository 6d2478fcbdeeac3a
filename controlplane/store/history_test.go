package store

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestHistoryLimit(t *testing.T) {
	cfg, _ := testConfig(t)
	cfg.HistoryLimit = 5
	s := run(t, cfg)
	var made []int64
	for i := range 12 {
		made = append(made, mustApply(t, s, pool("a", fmt.Sprintf("10.0.0.%d:443", i))).Revision)
	}
	resp, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var listed []int64
	for _, revision := range resp.Revisions {
		listed = append(listed, revision.Revision)
	}
	want := slices.Clone(made[7:])
	slices.Reverse(want)
	diff(t, "kept revisions", listed, want)
	histories := 0
	for key := range dump(t, cfg) {
		if strings.HasPrefix(key, cfg.Prefix+"history/") {
			histories++
		}
	}
	if histories != 5 {
		t.Errorf("%d history keys, want 5", histories)
	}
	for _, store := range []*Store{s, run(t, cfg)} {
		for i, revision := range made {
			snapshot, err := store.At(t.Context(), revision)
			if kept := i >= 7; kept && (err != nil || snapshot.Get("BackendPool", "a").GetBackendPool().Endpoints[0].Address != fmt.Sprintf("10.0.0.%d:443", i)) {
				t.Errorf("At(%d) of apply %d: %v", revision, i, err)
			} else if !kept && !errors.Is(err, ErrNotKept) {
				t.Errorf("At(%d) of apply %d: %v, want ErrNotKept", revision, i, err)
			}
		}
		if _, err := store.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{ToRevision: made[6]}); !errors.Is(err, ErrNotKept) {
			t.Errorf("rollback to a dropped revision: %v", err)
		}
		if _, err := store.At(t.Context(), made[11]+1); !errors.Is(err, ErrNotKept) {
			t.Errorf("At a revision to come: %v", err)
		}
	}
	// A lower limit takes effect with the next change.
	cfg.HistoryLimit = 2
	lower := run(t, cfg)
	mustApply(t, lower, pool("b", "10.0.0.1:443"))
	if resp, err := lower.Revisions(t.Context(), &resealv1.ListRevisionsRequest{}); err != nil || len(resp.Revisions) != 2 {
		t.Errorf("%d revisions with limit 2 (%v)", len(resp.GetRevisions()), err)
	}
}

func TestRevisionsTellWhoDidWhat(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	first, err := s.Apply(t.Context(), "alice", &resealv1.ApplyRequest{Message: "two pools", Resources: []*resealv1.Resource{
		pool("a", "10.0.0.1:443"), pool("b", "10.0.0.2:443"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Apply(t.Context(), "bob", &resealv1.ApplyRequest{Message: "move a", Resources: []*resealv1.Resource{
		pool("a", "10.0.0.9:443"), pool("b", "10.0.0.2:443"),
	}}); err != nil {
		t.Fatal(err)
	}
	mustDelete(t, s, ref("BackendPool", "a"))
	if _, err := s.Rollback(t.Context(), "carol", &resealv1.RollbackRequest{ToRevision: first.Revision, Message: "no"}); err != nil {
		t.Fatal(err)
	}
	resp, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range resp.Revisions {
		line := fmt.Sprintf("%s %q", r.Author, r.Message)
		for _, c := range r.Changes {
			from, to := "-", "-"
			if endpoints := c.Before.GetBackendPool().GetEndpoints(); len(endpoints) > 0 {
				from = endpoints[0].Address
			}
			if endpoints := c.After.GetBackendPool().GetEndpoints(); len(endpoints) > 0 {
				to = endpoints[0].Address
			}
			line += fmt.Sprintf(" %s %s>%s", actions([]*resealv1.Change{c})[0], from, to)
			if c.After != nil && c.After.GetMetadata().GetRevision() != r.Revision {
				t.Errorf("%s: after is of revision %d, not %d", line, c.After.GetMetadata().GetRevision(), r.Revision)
			}
		}
		got = append(got, line)
	}
	diff(t, "history", got, []string{
		`carol "no" BackendPool/a created ->10.0.0.1:443`,
		`tester "" BackendPool/a deleted 10.0.0.9:443>-`,
		`bob "move a" BackendPool/a configured 10.0.0.1:443>10.0.0.9:443`,
		`alice "two pools" BackendPool/a created ->10.0.0.1:443 BackendPool/b created ->10.0.0.2:443`,
		`system "first start" Keyring/default created ->-`,
	})
	if r := resp.Revisions[0]; r.RolledBackTo != first.Revision || r.Time.AsTime().Before(resp.Revisions[1].Time.AsTime()) {
		t.Errorf("rollback: %v", r)
	}
	one, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{Revision: first.Revision})
	if err != nil || len(one.Revisions) != 1 {
		t.Fatalf("one revision: %v, %v", one, err)
	}
	diff(t, "one revision", one.Revisions[0], resp.Revisions[3])
	if two, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{Limit: 2}); err != nil || len(two.Revisions) != 2 {
		t.Errorf("limit 2: %v, %v", two, err)
	}
	if _, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{Revision: first.Revision - 1000}); !errors.Is(err, ErrNotKept) {
		t.Errorf("a revision that is not kept: %v", err)
	}
}

func TestRevisionsStayBelowTheMessageLimit(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	cfg.MaxBytes = 1_500_000
	s := run(t, cfg)
	for i := range 6 {
		big := pool("big", fmt.Sprintf("10.0.0.%d:443", i))
		big.Metadata.Annotations = map[string]string{"note": strings.Repeat("x", 500_000)}
		mustApply(t, s, big)
	}
	resp, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if size := proto.Size(resp); size > 4<<20 || len(resp.Revisions) != 7 {
		t.Errorf("%d revisions in %d bytes", len(resp.Revisions), size)
	}
	if resp.Revisions[0].Changes[0].Before == nil || resp.Revisions[5].Changes[0].After != nil {
		t.Error("the newest lacks its resources, or an old one has them")
	}
	one, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{Revision: resp.Revisions[5].Revision})
	if err != nil || one.Revisions[0].Changes[0].After == nil {
		t.Errorf("an old one alone: %v", err)
	}
}

func TestRollback(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	if _, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{}); !errors.Is(err, ErrNotKept) {
		t.Errorf("rollback of the first revision: %v", err)
	}
	good := mustApply(t, s, pool("a", "10.0.0.1:443"), certificate("c", "PEM1", secretA), pool("stays", "10.0.0.5:443")).Revision
	old := s.Snapshot()
	mustApply(t, s, pool("a", "10.0.0.2:443"), certificate("c", "PEM2", secretB), pool("new", "10.0.0.3:443"))
	mustApply(t, s, pool("a", "10.0.0.3:443"))
	before := mustDelete(t, s, ref("BackendPool", "a")).Revision

	resp, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{ToRevision: good, ExpectedRevision: before})
	if err != nil {
		t.Fatal(err)
	}
	diff(t, "changes", actions(resp.Changes),
		[]string{"BackendPool/a created", "Certificate/c configured", "BackendPool/new deleted"})
	diff(t, "secrets", resp.Changes[1].ChangedSecrets, []string{"spec.privateKeyPem"})
	assertNoSecret(t, "response", resp.String())
	if resp.RolledBackTo != good || resp.Revision <= before {
		t.Errorf("rolled back to %d as %d", resp.RolledBackTo, resp.Revision)
	}
	now := s.Snapshot()
	a, wasA := now.Get("BackendPool", "a"), old.Get("BackendPool", "a")
	diff(t, "spec", a.GetBackendPool(), wasA.GetBackendPool())
	if a.Metadata.Uid != wasA.Metadata.Uid || a.Metadata.Generation != 4 || !proto.Equal(a.Metadata.CreatedAt, wasA.Metadata.CreatedAt) {
		t.Errorf("recreated with %v, was %v", a.Metadata, wasA.Metadata)
	}
	diff(t, "untouched", now.Get("BackendPool", "stays"), old.Get("BackendPool", "stays"))
	clear, err := s.Unseal(now.Get("Certificate", "c"))
	if err != nil || clear.GetCertificate().GetPrivateKeyPem() != secretA || clear.GetCertificate().GetCertificatePem() != "PEM1" {
		t.Errorf("certificate: %v, %v", clear, err)
	}
	if sealed, was := now.Get("Certificate", "c").GetCertificate().GetPrivateKeyPem(), old.Get("Certificate", "c").GetCertificate().GetPrivateKeyPem(); sealed != was {
		t.Error("the key was sealed anew")
	}
	if generation := now.Get("Certificate", "c").Metadata.Generation; generation != 3 {
		t.Errorf("generation %d of the certificate, want 3", generation)
	}

	// To where it is already: nothing happens.
	same, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{ToRevision: resp.Revision})
	if err != nil || same.Revision != resp.Revision || len(same.Changes) != 0 {
		t.Errorf("to the current revision: %v, %v", same, err)
	}
	// The default is the one before: undo the rollback.
	undone, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{})
	if err != nil || undone.RolledBackTo != before {
		t.Fatalf("undo: %v, %v", undone, err)
	}
	if s.Snapshot().Get("BackendPool", "a") != nil || s.Snapshot().Get("BackendPool", "new") == nil {
		t.Error("undo did not undo")
	}
	var conflict *ConflictError
	if _, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{ExpectedRevision: before}); !errors.As(err, &conflict) {
		t.Errorf("rollback with an old expected revision: %v", err)
	}
}

// The same key under another seal is not a change.
func TestRollbackComparesSecretsInClear(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	first := mustApply(t, s, certificate("c", "PEM", secretA)).Revision
	mustApply(t, s, certificate("c", "PEM", secretB))
	third := mustApply(t, s, certificate("c", "PEM", secretA)).Revision
	resp, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{ToRevision: first})
	if err != nil || len(resp.Changes) != 0 || resp.Revision != third {
		t.Errorf("rollback to the same key: %v, %v", resp, err)
	}
}

// A resource that was deleted and made anew is another one; going back brings
// back the first.
func TestRollbackAcrossRecreation(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	first := mustApply(t, s, pool("a", "10.0.0.1:443"))
	mustApply(t, s, pool("a", "10.0.0.2:443"))
	mustDelete(t, s, ref("BackendPool", "a"))
	mustApply(t, s, pool("a", "10.0.0.1:443"))
	if _, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{ToRevision: first.Revision}); err != nil {
		t.Fatal(err)
	}
	got := s.Snapshot().Get("BackendPool", "a").Metadata
	if got.Uid != first.Changes[0].After.Metadata.Uid || got.Generation != 3 {
		t.Errorf("restored with %v, was %v", got, first.Changes[0].After.Metadata)
	}
}

// model is what a random run did.
type model struct {
	live      map[string]string // "Kind/name" -> what the resource is about
	revisions []int64
	states    map[int64]map[string]string // by revision
	encoded   map[int64]map[string]string // likewise, as published
}

func (m *model) record(t testing.TB, s *Store, revision int64) {
	m.revisions = append(m.revisions, revision)
	m.states[revision] = maps.Clone(m.live)
	m.encoded[revision] = encoded(t, s.Snapshot())
}

// The store against a model, over random histories: what is published, and what
// every kept revision looks like for a replica that was not there.
func TestAtOverRandomHistories(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	cfg.HistoryLimit = 8
	rapid.Check(t, func(rt *rapid.T) {
		cfg := cfg
		cfg.Prefix = newPrefix()
		s, stop := runStoppable(t, cfg)
		defer stop()
		<-s.Ready()
		m := &model{live: map[string]string{}, states: map[int64]map[string]string{}, encoded: map[int64]map[string]string{}}
		m.record(t, s, s.Snapshot().Revision())
		for range rapid.IntRange(1, 14).Draw(rt, "changes") {
			before := s.Snapshot().Revision()
			randomChange(rt, s, m)
			if after := s.Snapshot().Revision(); after != before {
				m.record(t, s, after)
			} else if !maps.Equal(m.live, m.states[before]) {
				rt.Fatalf("a change made no revision: %v, was %v", m.live, m.states[before])
			}
			checkLive(rt, s, m)
		}
		fresh, stopFresh := runStoppable(t, cfg)
		defer stopFresh()
		<-fresh.Ready()
		for i, revision := range m.revisions {
			checkAt(rt, t, []*Store{s, fresh}, m, revision, i >= len(m.revisions)-cfg.HistoryLimit)
		}
	})
}

func randomChange(rt *rapid.T, s *Store, m *model) {
	names := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"a", "b", "c", "d"}), 1, 3, rapid.ID[string]).Draw(rt, "names")
	switch rapid.SampledFrom([]string{"apply", "apply", "apply", "delete", "rollback"}).Draw(rt, "what") {
	case "apply":
		var resources []*resealv1.Resource
		for _, name := range names {
			content := rapid.SampledFrom([]string{"1", "2", "3"}).Draw(rt, "content")
			label := rapid.SampledFrom([]string{"x", "y"}).Draw(rt, "label")
			resource := labelled(pool(name, "10.0.0."+content+":443"), "l", label)
			if name == "d" {
				resource = labelled(certificate(name, "PEM", "key"+content), "l", label)
			}
			resources = append(resources, resource)
			m.live[resource.Ref().Key()] = content + label
		}
		if _, err := s.Apply(rt.Context(), "rapid", &resealv1.ApplyRequest{Resources: resources}); err != nil {
			rt.Fatal(err)
		}
	case "delete":
		var refs []*resealv1.ResourceRef
		for _, key := range slices.Sorted(maps.Keys(m.live)) {
			if kind, name, _ := strings.Cut(key, "/"); slices.Contains(names, name) {
				refs = append(refs, ref(kind, name))
				delete(m.live, key)
			}
		}
		if _, err := s.Delete(rt.Context(), "rapid", &resealv1.DeleteRequest{Resources: refs}); err != nil {
			rt.Fatal(err)
		}
	case "rollback":
		kept := m.revisions[max(0, len(m.revisions)-s.cfg.HistoryLimit):]
		to := rapid.SampledFrom(kept).Draw(rt, "to")
		if _, err := s.Rollback(rt.Context(), "rapid", &resealv1.RollbackRequest{ToRevision: to}); err != nil {
			rt.Fatal(err)
		}
		m.live = maps.Clone(m.states[to])
	}
}

// checkLive compares what is published with the model.
func checkLive(rt *rapid.T, s *Store, m *model) {
	got := map[string]string{}
	for _, resource := range s.Snapshot().All() {
		if resource.Kind() == keyringKind {
			continue
		}
		clear, err := s.Unseal(resource)
		if err != nil {
			rt.Fatal(err)
		}
		content := strings.TrimPrefix(clear.GetCertificate().GetPrivateKeyPem(), "key")
		if endpoints := clear.GetBackendPool().GetEndpoints(); len(endpoints) > 0 {
			content = strings.TrimSuffix(strings.TrimPrefix(endpoints[0].Address, "10.0.0."), ":443")
		}
		got[resource.Ref().Key()] = content + resource.GetMetadata().GetLabels()["l"]
	}
	if !maps.Equal(got, m.live) {
		rt.Fatalf("published %v, want %v", got, m.live)
	}
}

func checkAt(rt *rapid.T, t *testing.T, stores []*Store, m *model, revision int64, kept bool) {
	for i, store := range stores {
		snapshot, err := store.At(rt.Context(), revision)
		switch {
		case !kept:
			if !errors.Is(err, ErrNotKept) {
				rt.Fatalf("store %d: At(%d): %v, want ErrNotKept", i, revision, err)
			}
		case err != nil:
			rt.Fatalf("store %d: At(%d): %v", i, revision, err)
		case !maps.Equal(encoded(t, snapshot), m.encoded[revision]):
			rt.Fatalf("store %d: At(%d) is\n%q, was\n%q", i, revision, encoded(t, snapshot), m.encoded[revision])
		}
	}
}

// TestHistoryBytes: large changes leave fewer revisions, in etcd and in memory, but
// always the newest; small ones as many as the limit says.
func TestHistoryBytes(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	cfg.HistoryBytes = 300_000
	s := run(t, cfg)
	var revisions []int64
	large := func(i int) *resealv1.Resource {
		return labelled(pool("p", fmt.Sprintf("%s%d:1", strings.Repeat("h", 50_000), i)), "n", fmt.Sprint(i))
	}
	for i := range 20 {
		revisions = append(revisions, mustApply(t, s, large(i)).GetRevision())
	}
	stored := func() (count int, bytes int) {
		found, err := cfg.Client.Get(t.Context(), s.keys.histories(), clientv3.WithPrefix())
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range found.Kvs {
			bytes += len(kv.Value)
		}
		return len(found.Kvs), bytes
	}
	count, bytes := stored()
	if bytes > cfg.HistoryBytes || count < 3 || count != len(s.published.Load().state.history) {
		t.Errorf("%d revisions of %d bytes are kept, %d in memory", count, bytes, len(s.published.Load().state.history))
	}
	if _, err := s.At(t.Context(), revisions[len(revisions)-count]); err != nil {
		t.Errorf("the oldest that is kept: %v", err)
	}
	if _, err := s.At(t.Context(), revisions[0]); !errors.Is(err, ErrNotKept) {
		t.Errorf("the first one: %v", err)
	}
	// A lower limit holds from the start on, and a command removes what is beyond.
	cfg.HistoryBytes = 1
	less := run(t, cfg)
	if n := len(less.published.Load().state.history); n != 1 {
		t.Errorf("%d revisions are held in memory", n)
	}
	if removed, err := less.TrimHistory(t.Context()); err != nil || removed != int64(count-1) {
		t.Errorf("%d removed, want %d: %v", removed, count-1, err)
	}
	if count, _ := stored(); count != 1 {
		t.Errorf("%d are left", count)
	}
	if _, err := less.At(t.Context(), less.Snapshot().Revision()); err != nil {
		t.Error(err)
	}
}

// TestFullStore: what adds is refused by name, and with the reason; reads, dry runs
// and deletes go on.
func TestFullStore(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	var full atomic.Bool
	cfg.Full = func() error {
		if full.Load() {
			return errors.New("the database has 9 of 10; do this")
		}
		return nil
	}
	s := run(t, cfg)
	mustApply(t, s, pool("a", "a:1"))
	mustApply(t, s, pool("b", "b:1"))
	full.Store(true)
	_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("c", "c:1")}})
	if !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "do this") {
		t.Errorf("apply: %v", err)
	}
	if _, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{}); !errors.Is(err, ErrFull) {
		t.Errorf("rollback: %v", err)
	}
	if _, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("c", "c:1")}, DryRun: true}); err != nil {
		t.Errorf("dry run: %v", err)
	}
	mustDelete(t, s, ref("BackendPool", "a"))
	full.Store(false)
	mustApply(t, s, pool("c", "c:1"))
}
