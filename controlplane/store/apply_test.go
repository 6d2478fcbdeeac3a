package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestApplyReportsWhatBecameOfEachResource(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	first := mustApply(t, s, pool("a", "10.0.0.1:443"), pool("b", "10.0.0.2:443"))
	diff(t, "first apply", actions(first.Changes), []string{"BackendPool/a created", "BackendPool/b created"})

	second := mustApply(t, s, pool("b", "10.0.0.3:443"), pool("a", "10.0.0.1:443"), pool("c", "10.0.0.4:443"))
	diff(t, "second apply", actions(second.Changes),
		[]string{"BackendPool/b configured", "BackendPool/a unchanged", "BackendPool/c created"})
	if second.Revision <= first.Revision {
		t.Errorf("revision %d after %d", second.Revision, first.Revision)
	}
	b := second.Changes[0]
	if b.Before.GetMetadata().GetRevision() != first.Revision || b.After.GetMetadata().GetRevision() != second.Revision {
		t.Errorf("revisions before and after: %d, %d", b.Before.GetMetadata().GetRevision(), b.After.GetMetadata().GetRevision())
	}
	snapshot := s.Snapshot()
	if snapshot.Revision() != second.Revision {
		t.Errorf("snapshot at %d after an apply at %d", snapshot.Revision(), second.Revision)
	}
	diff(t, "what is published", snapshot.Get("BackendPool", "b"), b.After)
	if got := snapshot.Get("BackendPool", "a").GetMetadata().GetRevision(); got != first.Revision {
		t.Errorf("the unchanged resource is at revision %d, want %d", got, first.Revision)
	}

	third := mustApply(t, s, pool("b", "10.0.0.3:443"))
	if third.Revision != second.Revision || s.Snapshot() != snapshot {
		t.Errorf("an apply without effect made revision %d of %d", third.Revision, second.Revision)
	}
}

func TestServerAssignedMetadata(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	sent := pool("a", "10.0.0.1:443")
	sent.Metadata.Uid, sent.Metadata.Generation, sent.Metadata.Revision = "mine", 77, 88
	created := mustApply(t, s, sent).Changes[0].After.GetMetadata()
	if created.Uid == "" || created.Uid == "mine" || created.Generation != 1 || created.CreatedAt == nil || created.UpdatedAt == nil {
		t.Errorf("created with %v", created)
	}
	relabelled := mustApply(t, s, labelled(pool("a", "10.0.0.1:443"), "x", "y")).Changes[0].After.GetMetadata()
	if relabelled.Generation != 1 || relabelled.Uid != created.Uid || !proto.Equal(relabelled.CreatedAt, created.CreatedAt) {
		t.Errorf("labels changed: %v after %v", relabelled, created)
	}
	if !relabelled.UpdatedAt.AsTime().After(created.UpdatedAt.AsTime()) {
		t.Errorf("updated at %v, before at %v", relabelled.UpdatedAt.AsTime(), created.UpdatedAt.AsTime())
	}
	changed := mustApply(t, s, labelled(pool("a", "10.0.0.9:443"), "x", "y")).Changes[0].After.GetMetadata()
	if changed.Generation != 2 || changed.Uid != created.Uid {
		t.Errorf("spec changed: %v", changed)
	}
	mustDelete(t, s, ref("BackendPool", "a"))
	again := mustApply(t, s, pool("a", "10.0.0.9:443")).Changes[0].After.GetMetadata()
	if again.Generation != 1 || again.Uid == created.Uid {
		t.Errorf("created again: %v", again)
	}
}

func TestApplyRefusesAsAWhole(t *testing.T) {
	cfg, _ := testConfig(t)
	cfg.Validate = func(s *resealv1.Snapshot) []*resealv1.Violation {
		var found []*resealv1.Violation
		for _, route := range s.Kind("Route") {
			for i, target := range route.GetRoute().GetPools() {
				if s.Get("BackendPool", target.GetName()) == nil {
					found = append(found, &resealv1.Violation{Resource: route.Ref(), Field: fmt.Sprintf("spec.pools[%d].name", i), Description: "there is no such pool"})
				}
			}
		}
		return found
	}
	s := run(t, cfg)
	route := func(name string, pools ...string) *resealv1.Resource {
		spec := &resealv1.Route{}
		for _, pool := range pools {
			spec.Pools = append(spec.Pools, &resealv1.WeightedPool{Name: pool})
		}
		return &resealv1.Resource{Metadata: &resealv1.Metadata{Name: name}, Spec: &resealv1.Resource_Route{Route: spec}}
	}
	before := mustApply(t, s, pool("a", "10.0.0.1:443"), route("r", "a")).Revision

	apply := func(resources ...*resealv1.Resource) error {
		_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: resources})
		return err
	}
	cases := []struct {
		name string
		err  error
		want []string
	}{
		{"dangling references, all of them", apply(pool("b", "10.0.0.2:443"), route("q", "b", "c"), route("r", "d")),
			[]string{"Route/q: spec.pools[1].name", "Route/r: spec.pools[0].name"}},
		{"named twice", apply(pool("b"), pool("c"), pool("b")), []string{"BackendPool/b: "}},
		{"no kind, no name", apply(&resealv1.Resource{Metadata: &resealv1.Metadata{Name: "x"}}, pool(""), pool("a/b"), nil),
			[]string{"/x: ", "BackendPool/: metadata.name", "BackendPool/a/b: metadata.name", "/: "}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { diff(t, "violations", violationsOf(t, c.err), c.want) })
	}
	_, err := s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{Resources: []*resealv1.ResourceRef{ref("BackendPool", "a")}})
	diff(t, "delete of what is used", violationsOf(t, err), []string{"Route/r: spec.pools[0].name"})
	if got := s.Snapshot().Revision(); got != before {
		t.Errorf("refused changes led from revision %d to %d", before, got)
	}
}

func TestDelete(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	before := mustApply(t, s, pool("a", "10.0.0.1:443"), pool("b", "10.0.0.2:443")).Revision
	remove := func(refs ...*resealv1.ResourceRef) error {
		_, err := s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{Resources: refs})
		return err
	}
	err := remove(ref("BackendPool", "a"), ref("BackendPool", "x"), ref("Route", "y"))
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "BackendPool/x, Route/y") {
		t.Errorf("delete of missing resources: %v", err)
	}
	diff(t, "the default Keyring", violationsOf(t, remove(ref("Keyring", "default"))), []string{"Keyring/default: "})
	diff(t, "bad refs", violationsOf(t, remove(ref("Pod", "a"), nil, ref("BackendPool", "a"), ref("BackendPool", "a"))),
		[]string{"Pod/a: ", "/: ", "BackendPool/a: "})
	if got := s.Snapshot().Revision(); got != before {
		t.Errorf("refused deletes led from revision %d to %d", before, got)
	}
	resp := mustDelete(t, s, ref("BackendPool", "b"))
	diff(t, "delete", actions(resp.Changes), []string{"BackendPool/b deleted"})
	if resp.Changes[0].Before == nil || resp.Changes[0].After != nil {
		t.Errorf("change of a delete: %v", resp.Changes[0])
	}
	if s.Snapshot().Get("BackendPool", "b") != nil || s.Snapshot().Get("BackendPool", "a") == nil {
		t.Error("the snapshot holds b, or not a")
	}
}

func TestDryRunWritesNothing(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	before := mustApply(t, s, pool("a", "10.0.0.1:443"), certificate("c", "PEM", "KEY"))
	raw := dump(t, cfg)
	resp, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{DryRun: true, Resources: []*resealv1.Resource{
		pool("a", "10.0.0.2:443"), pool("b", "10.0.0.3:443"), certificate("c", "PEM", "KEY2"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	diff(t, "dry apply", actions(resp.Changes), []string{"BackendPool/a configured", "BackendPool/b created", "Certificate/c configured"})
	diff(t, "changed secrets", resp.Changes[2].ChangedSecrets, []string{"spec.privateKeyPem"})
	if uid := resp.Changes[1].After.GetMetadata().GetUid(); resp.Revision != before.Revision || uid != "" {
		t.Errorf("dry apply: revision %d, uid %q", resp.Revision, uid)
	}
	if _, err := s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{DryRun: true, Resources: []*resealv1.ResourceRef{ref("BackendPool", "a")}}); err != nil {
		t.Error(err)
	}
	if _, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{DryRun: true}); err != nil {
		t.Error(err)
	}
	diff(t, "etcd after dry runs", dump(t, cfg), raw)
}

func TestExpectedRevision(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	first := mustApply(t, s, pool("a", "10.0.0.1:443")).Revision
	second := mustApply(t, s, pool("a", "10.0.0.2:443")).Revision
	for _, expected := range []int64{first, second + 100, -1} {
		_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{ExpectedRevision: expected, Resources: []*resealv1.Resource{pool("a", "10.0.0.3:443")}})
		var conflict *ConflictError
		if !errors.As(err, &conflict) || !errors.Is(err, ErrConflict) || conflict.CurrentRevision() != second {
			t.Errorf("expected revision %d: got %v, want a conflict with %d", expected, err, second)
		}
	}
	if _, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{ExpectedRevision: second, Resources: []*resealv1.Resource{pool("a", "10.0.0.3:443")}}); err != nil {
		t.Errorf("with the current revision: %v", err)
	}
}

func TestTooLargeIsRefusedByName(t *testing.T) {
	cfg, _ := testConfig(t)
	cfg.MaxBytes, cfg.MaxOps = 20_000, 13
	s := run(t, cfg)
	before := dump(t, cfg)
	big := pool("big", "10.0.0.1:443")
	big.Metadata.Annotations = map[string]string{"note": strings.Repeat("x", 19_000)}
	many := make([]*resealv1.Resource, 11)
	for i := range many {
		many[i] = pool(fmt.Sprintf("p%d", i), "10.0.0.1:443")
	}
	many[7].Metadata.Annotations = map[string]string{"note": "the longest of them"}
	cases := []struct {
		name      string
		resources []*resealv1.Resource
		want      []string
	}{
		{"bytes", []*resealv1.Resource{pool("a", "10.0.0.1:443"), big, pool("b", "10.0.0.1:443"), certificate("c", strings.Repeat("y", 900), "k")},
			[]string{"BackendPool/big", "at most 20000"}},
		{"operations", many, []string{"changes 11 resources", "at most 10", "BackendPool/p7"}},
	}
	for _, c := range cases {
		for _, dryRun := range []bool{true, false} {
			_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: c.resources, DryRun: dryRun})
			if !errors.Is(err, ErrTooLarge) {
				t.Fatalf("%s: %v, want ErrTooLarge", c.name, err)
			}
			for _, text := range c.want {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%s: %q does not say %q", c.name, err, text)
				}
			}
		}
	}
	diff(t, "etcd after refusals", dump(t, cfg), before)
	mustApply(t, s, many[:10]...)
}

// What etcd takes by default must be what the defaults here allow.
func TestDefaultLimitsAreWhatEtcdTakes(t *testing.T) {
	t.Parallel()
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	most := make([]*resealv1.Resource, 125)
	for i := range most {
		most[i] = pool(fmt.Sprintf("p%03d", i), "10.0.0.1:443")
		most[i].Metadata.Annotations = map[string]string{"note": strings.Repeat("x", 10_000)}
	}
	mustApply(t, s, most...)
	_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: append(most, pool("q", "10.0.0.1:443"))})
	if err != nil {
		t.Errorf("unchanged resources count: %v", err)
	}
	// A change needs room for what was before, too.
	for _, resource := range most {
		resource.GetBackendPool().Endpoints[0].Address = "10.0.0.2:443"
	}
	if _, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: most}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("2.9 MB: %v, want ErrTooLarge", err)
	}
	// etcd says so itself when its limits are lower than configured.
	cfg.MaxBytes, cfg.MaxOps = 10<<20, 1000
	other := run(t, cfg)
	if _, err := other.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: most}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("beyond etcd's own limit: %v, want ErrTooLarge", err)
	}
}

func TestEndedContext(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Apply(ctx, "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("a")}}); !errors.Is(err, context.Canceled) {
		t.Errorf("Apply: %v", err)
	}
	if _, err := s.At(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("At: %v", err)
	}
	if _, err := s.Revisions(ctx, &resealv1.ListRevisionsRequest{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Revisions: %v", err)
	}
}

// TestRuleThatIsNew: stored resources that break it are named, and stop only
// changes of themselves.
func TestRuleThatIsNew(t *testing.T) {
	cfg, _ := testConfig(t)
	strict := false
	cfg.Validate = func(s *resealv1.Snapshot) []*resealv1.Violation {
		var found []*resealv1.Violation
		for _, pool := range s.Kind("BackendPool") {
			if count := len(pool.GetBackendPool().GetEndpoints()); strict && count != 1 {
				found = append(found, &resealv1.Violation{Resource: pool.Ref(), Field: "spec.endpoints", Description: fmt.Sprintf("there are %d", count)})
			}
		}
		return found
	}
	s := run(t, cfg)
	mustApply(t, s, pool("old", "10.0.0.1:443", "10.0.0.2:443"))
	strict = true
	response := mustApply(t, s, pool("new", "10.0.0.1:443"))
	if warnings := response.GetWarnings(); len(warnings) != 1 || warnings[0].Text() != "BackendPool/old: spec.endpoints: there are 2" {
		t.Errorf("warnings: %v", warnings)
	}
	for name, resource := range map[string]*resealv1.Resource{
		"one more that breaks it":      pool("other", "10.0.0.1:443", "10.0.0.2:443"),
		"it changes and breaks it yet": labelled(pool("old", "10.0.0.1:443", "10.0.0.2:443"), "x", "y"),
		"it breaks it in another way":  pool("old", "10.0.0.1:443", "10.0.0.2:443", "10.0.0.3:443"),
	} {
		var refused *resealv1.ViolationsError
		if _, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{resource}}); !errors.As(err, &refused) || len(refused.Violations) != 1 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if response := mustApply(t, s, pool("old", "10.0.0.1:443")); len(response.GetWarnings()) != 0 {
		t.Errorf("mended: %v", response.GetWarnings())
	}
}
