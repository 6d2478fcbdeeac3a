package replicas

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Of many edges few are asked, of each kind some, and what they say counts for all.
func TestASampleStandsForTheFleet(t *testing.T) {
	var edges []*resealv1.Edge
	for i := range 10_000 {
		site := "west"
		if i%100 == 0 {
			site = "east"
		}
		edges = append(edges, &resealv1.Edge{Id: fmt.Sprintf("e%05d", i), Labels: map[string]string{"site": site}})
	}
	edges = append(edges, &resealv1.Edge{Id: "gone", DisconnectedAt: timestamppb.Now()})
	s := choose(edges)
	if s.edges != 10_000 || len(s.asked) != maxPreviewed {
		t.Fatalf("of %d edges %d are asked", s.edges, len(s.asked))
	}
	var reports []*resealv1.EdgeImpact
	for i, edge := range s.asked {
		report := &resealv1.EdgeImpact{Edge: edge.GetId(), Pools: []*resealv1.PoolImpact{{Name: "app", Changes: []string{"trust"}, Connections: 2, FullHandshakes: 1}}}
		if edge.GetLabels()["site"] == "east" {
			report.Violations = []*resealv1.Violation{{Resource: &resealv1.ResourceRef{Kind: "Listener", Name: "web"}, Description: "in use"}}
		}
		if i == 1 {
			report = &resealv1.EdgeImpact{Edge: edge.GetId(), Unknown: "too slow"}
		}
		reports = append(reports, report)
	}
	r := s.summarize(reports)
	if r.GetEdges() != 10_000 || r.GetAsked() != maxPreviewed || r.GetAnswered() != maxPreviewed-1 ||
		r.GetFullHandshakes() != 10_000 || r.GetConnections() != 20_000 || len(r.GetPools()) != 1 || r.GetPools()[0].GetEdges() != 10_000 {
		t.Errorf("got %v", r)
	}
	if v := r.GetViolations(); len(v) != 1 || v[0].GetEdges() != 100 || len(v[0].GetNames()) != maxNames {
		t.Errorf("violations: %v", v)
	}
	if u := r.GetUnknown(); len(u) != 1 || u[0].GetEdges() != 1 || u[0].GetReason() != "too slow" {
		t.Errorf("unknown: %v", u)
	}
}

// TestPreviewOfNothing: a request without a change is refused. It ended the process.
func TestPreviewOfNothing(t *testing.T) {
	f := NewFleet(nil, Services{Preview: Preview{Candidate: func(_ context.Context, change *resealv1.ApplyRequest) (*resealv1.Snapshot, error) {
		change.DryRun = true
		return nil, nil
	}}})
	if _, err := f.PreviewChange(t.Context(), &resealv1.PreviewChangeRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
}

func TestASampleOfNothing(t *testing.T) {
	if r := choose(nil).summarize(nil); r.GetEdges() != 0 || r.GetAsked() != 0 {
		t.Errorf("got %v", r)
	}
}
