package feed

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	edgefeed "github.com/reseal/reseal/edge/feed"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// An edge previews what it would get of a change, with secrets in clear, and is sent
// updates meanwhile. Edges that can't tell say why.
func TestPreview(t *testing.T) {
	s := base()
	p := startPlane(t, s)
	n := &node{}
	begun, goOn := make(chan *resealv1.Snapshot, 2), make(chan struct{})
	conn := p.dial("e1")
	n.feed = edgefeed.New(edgefeed.Config{
		Edge: "e1", BootID: "b", Client: resealv1.NewFeedServiceClient(conn), Previews: resealv1.NewPreviewServiceClient(conn),
		State: newDisk(), Logger: testLogger(&lockedWriter{n}), Apply: n.apply,
		Preview: func(_ context.Context, candidate edgefeed.Candidate) *resealv1.EdgeImpact {
			begun <- candidate.Snapshot
			<-goOn
			return &resealv1.EdgeImpact{Pools: []*resealv1.PoolImpact{{Name: "app\x1b", Connections: 3}}}
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = n.feed.Run(ctx) })
	defer running.Wait()
	defer cancel()
	p.node("old", nil, newDisk())
	await(t, func() bool { return p.edge("e1").GetAckedRevision() == 1 && p.edge("old").GetAckedRevision() == 1 })

	candidate := s.Snapshot().With(1, many(pool("app", "a:9")), nil)
	type answer struct {
		impacts []*resealv1.EdgeImpact
		err     error
	}
	answers := make(chan answer, 1)
	go func() {
		impacts, err := p.server.PreviewEdges(t.Context(), candidate, []string{"e1", "old", "gone"})
		answers <- answer{impacts, err}
	}()
	got := <-begun
	if got.Get("BackendPool", "app").GetBackendPool().GetEndpoints()[0].GetAddress() != "a:9" ||
		got.Get("Certificate", "site").GetCertificate().GetPrivateKeyPem() != "clear k1" {
		t.Errorf("the edge previews %v", got.All())
	}
	// A second one has to wait; an update has not.
	if _, err := p.server.PreviewEdges(t.Context(), candidate, []string{"e1"}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a second preview got %v", err)
	}
	s.apply(many(pool("app", "a:2")))
	await(t, func() bool { return p.edge("e1").GetAckedRevision() == 2 })
	close(goOn)
	a := <-answers
	if a.err != nil || len(a.impacts) != 3 {
		t.Fatalf("got %v, %v", a.impacts, a.err)
	}
	if pools := a.impacts[0].GetPools(); a.impacts[0].GetEdge() != "e1" || len(pools) != 1 || pools[0].GetConnections() != 3 || strings.Contains(pools[0].GetName(), "\x1b") {
		t.Errorf("e1 says %v", a.impacts[0])
	}
	for i, want := range map[int]string{1: "its version does not preview changes", 2: "it is not connected any more"} {
		if a.impacts[i].GetUnknown() != want {
			t.Errorf("got %v, want %q", a.impacts[i], want)
		}
	}
	if newest := n.newest(); newest.Revision() != 2 || newest.Get("BackendPool", "app").GetBackendPool().GetEndpoints()[0].GetAddress() != "a:2" {
		t.Errorf("after the preview the edge serves %v", newest.All())
	}
	// Nobody else's order can be followed.
	stream, err := resealv1.NewPreviewServiceClient(p.dial("old")).Preview(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&resealv1.PreviewRequest{Message: &resealv1.PreviewRequest_Start{Start: &resealv1.PreviewStart{Edge: "e1", Id: 1}}})
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an edge that speaks as another got %v", err)
	}
}

func await(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
	}
}
