package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func pools(n int) (all []*resealv1.Resource, refs []*resealv1.ResourceRef) {
	for i := range n {
		all = append(all, pool(fmt.Sprintf("p%02d", i), "127.0.0.1:1"))
		refs = append(refs, all[i].Ref())
	}
	return all, refs
}

func listener(name string, match map[string]string) *resealv1.Resource {
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec: &resealv1.Resource_Listener{Listener: &resealv1.Listener{
			Address: "127.0.0.1:1", EdgeSelector: &resealv1.EdgeSelector{MatchLabels: match},
		}},
	}
}

// wantLarge checks that err refuses a large change and names all texts.
func wantLarge(t *testing.T, err error, texts ...string) {
	t.Helper()
	if !errors.Is(err, ErrLargeChange) {
		t.Fatalf("got %v, want ErrLargeChange", err)
	}
	for _, text := range append(texts, "--allow-large-change") {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the error %q does not say %q", err, text)
		}
	}
}

func TestDeletingMuchNeedsAWord(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	all, refs := pools(16)
	mustApply(t, s, all...)

	_, err := s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{Resources: refs[:11]})
	wantLarge(t, err, "11 of all 17 resources", "11 of 16 BackendPools (p00, p01, p02 and 8 more)")
	if s.Snapshot().Len() != 17 {
		t.Fatalf("a refused change left %d resources, want 17", s.Snapshot().Len())
	}
	dry, err := s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{Resources: refs[:11], DryRun: true})
	if err != nil || len(dry.GetLargeChange()) != 1 {
		t.Fatalf("a dry run got %v, %v, want one reason", dry.GetLargeChange(), err)
	}
	resp, err := s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{Resources: refs[:11], AllowLargeChange: true})
	if err != nil || len(resp.GetLargeChange()) != 1 {
		t.Fatalf("allowed: got %v, %v, want one reason", resp.GetLargeChange(), err)
	}
	history, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{})
	if err != nil || !history.GetRevisions()[0].GetLargeChangeAllowed() || history.GetRevisions()[1].GetLargeChangeAllowed() {
		t.Errorf("the history is %v, %v, want only its newest entry to tell of the permission", history, err)
	}
}

func TestRollbackThatRemovesMuchNeedsAWord(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	mustApply(t, s, pool("first", "127.0.0.1:1"))
	all, _ := pools(12)
	mustApply(t, s, all...)
	_, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{})
	wantLarge(t, err, "12 of all 14 resources")
	if _, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{AllowLargeChange: true}); err != nil {
		t.Fatal(err)
	}
}

func TestEmptyingAKindNeedsAWord(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	all, _ := pools(30)
	var refs []*resealv1.ResourceRef
	for i := range 11 {
		l := listener(fmt.Sprintf("l%02d", i), nil)
		all, refs = append(all, l), append(refs, l.Ref())
	}
	mustApply(t, s, all...)
	mustDelete(t, s, refs[0])
	_, err := s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{Resources: refs[1:]})
	if err != nil {
		t.Fatalf("ten of a kind may go as they like: %v", err)
	}
	mustApply(t, s, all...)
	_, err = s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{Resources: refs})
	wantLarge(t, err, "it removes 11 of 11 Listeners (l00, l01, l02 and 8 more)")
}

func TestSmallChangesNeedNoWord(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	all, refs := pools(10)
	mustApply(t, s, all...)
	mustDelete(t, s, refs...) // all that there are
	all, refs = pools(30)
	mustApply(t, s, all...)
	mustDelete(t, s, refs[:15]...) // fewer than half
}

func TestASelectorThatSelectsNoEdgeAnyMoreNeedsAWord(t *testing.T) {
	cfg, _ := testConfig(t)
	asked := 0
	west, east := map[string]string{"site": "west"}, map[string]string{"site": "east"}
	edges := []map[string]string{west, west, {"site": "south"}}
	cfg.Edges = func(context.Context) []map[string]string { asked++; return edges }
	s := run(t, cfg)
	mustApply(t, s, listener("web", west), listener("spare", east), pool("p", "127.0.0.1:1"))
	mustDelete(t, s, ref("BackendPool", "p"))
	if asked != 0 {
		t.Fatalf("the edges were asked %d times without a selector that changed", asked)
	}
	_, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{listener("web", east)}})
	wantLarge(t, err, `the edgeSelector of Listener "web" selects none of the live edges, and selected 2 before`)
	dry, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{listener("web", east)}, DryRun: true})
	if err != nil || len(dry.GetLargeChange()) != 1 {
		t.Fatalf("a dry run got %v, %v, want one reason", dry.GetLargeChange(), err)
	}
	mustApply(t, s, listener("spare", map[string]string{"site": "north"})) // selected none before
	mustApply(t, s, listener("web", map[string]string{"site": "south"}))   // selects another
	mustDelete(t, s, ref("Listener", "spare"))                             // removing is another matter
	if _, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{
		Resources: []*resealv1.Resource{listener("web", east)}, AllowLargeChange: true,
	}); err != nil {
		t.Fatal(err)
	}
}
