package feed

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	edgefeed "github.com/reseal/reseal/edge/feed"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func runs(revision int64, hash []byte) *resealv1.SyncRequest {
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Ack{Ack: &resealv1.Ack{Revision: revision, RunningHash: hash}}}
}

// An edge that serves something else than it acked is shown, and gets its whole
// configuration again, once a minute at most.
func TestDriftIsShownAndRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		stream := p.hello("e1", &resealv1.Hello{Edge: "e1"})
		updates := make(chan *resealv1.Update, 100)
		go func() {
			for {
				message, err := stream.Recv()
				if err != nil {
					return
				}
				updates <- message.GetUpdate()
			}
		}()
		send := func(message *resealv1.SyncRequest) {
			t.Helper()
			if err := stream.Send(message); err != nil {
				t.Fatal(err)
			}
			settle(0)
		}
		update := <-updates
		other := []byte(strings.Repeat("x", 32))
		send(runs(1, other))
		edge := p.edge("e1")
		if !edge.GetDrifted() || string(edge.GetIntendedHash()) != string(update.GetHash()) ||
			string(edge.GetAckedHash()) != string(update.GetHash()) || string(edge.GetRunningHash()) != string(other) {
			t.Errorf("listed as %v", edge)
		}
		if err := testutil.GatherAndCompare(p.registry, strings.NewReader(`# HELP reseal_edges_drifted Live edges that serve something else than they acked.
# TYPE reseal_edges_drifted gauge
reseal_edges_drifted 1
`), "reseal_edges_drifted"); err != nil {
			t.Error(err)
		}
		again := <-updates
		if again.GetBaseRevision() != 0 || again.GetRevision() != 1 || len(again.GetUpserts()) != len(update.GetUpserts()) {
			t.Fatalf("the repair is an update from %d to %d with %d resources", again.GetBaseRevision(), again.GetRevision(), len(again.GetUpserts()))
		}
		// It does not help: the next try comes when a minute is over.
		send(runs(1, other))
		settle(repairInterval - time.Second)
		if len(updates) != 0 {
			t.Error("the edge was repaired twice within a minute")
		}
		settle(2 * time.Second)
		if len(updates) != 1 {
			t.Fatalf("%d updates after a minute", len(updates))
		}
		<-updates
		send(runs(1, update.GetHash()))
		if edge := p.edge("e1"); edge.GetDrifted() || testutil.ToFloat64(p.server.metrics.repairs) != 2 {
			t.Errorf("after the repair the edge is listed as %v", edge)
		}
		settle(2 * repairInterval)
		if len(updates) != 0 {
			t.Error("a sound edge is repaired")
		}
		// One that does not know is not suspected, nor is one that refuses.
		s.apply(many(pool("app", "a:2")))
		settle(0)
		<-updates
		send(ack(2))
		send(&resealv1.SyncRequest{Message: &resealv1.SyncRequest_Nack{Nack: &resealv1.Nack{Revision: 2, RunningHash: other}}})
		if edge := p.edge("e1"); edge.GetDrifted() {
			t.Errorf("listed as %v", edge)
		}
	})
}

// With a real edge's feed: what it runs comes to differ by itself.
func TestDriftOfAnEdgeHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		n := &node{}
		var lost *resealv1.Snapshot // what it runs instead, nil: what was applied
		n.feed = edgefeed.New(edgefeed.Config{
			Edge: "e1", BootID: "b", Client: resealv1.NewFeedServiceClient(p.dial("e1")), State: newDisk(),
			Logger: testLogger(&lockedWriter{n}),
			Apply: func(ctx context.Context, candidate edgefeed.Candidate) edgefeed.Outcome {
				n.mu.Lock()
				lost = nil
				n.mu.Unlock()
				return n.apply(ctx, candidate)
			},
			Unchanged: func(int64) {},
			Running: func() *resealv1.Snapshot {
				n.mu.Lock()
				defer n.mu.Unlock()
				if lost != nil || len(n.applied) == 0 {
					return lost
				}
				return n.applied[len(n.applied)-1]
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- n.feed.Run(ctx) }()
		settle(time.Second)
		edge := p.edge("e1")
		if edge.GetDrifted() || len(edge.GetRunningHash()) == 0 || string(edge.GetRunningHash()) != string(edge.GetIntendedHash()) {
			t.Fatalf("at first the edge is listed as %v", edge)
		}
		n.mu.Lock()
		lost = n.applied[0].With(1, nil, []*resealv1.ResourceRef{n.applied[0].All()[0].Ref()})
		n.mu.Unlock()
		settle(11 * time.Second) // the edge looks every 10 s
		n.mu.Lock()
		applied := len(n.applied)
		n.mu.Unlock()
		if applied != 2 || testutil.ToFloat64(p.server.metrics.repairs) != 1 || p.edge("e1").GetDrifted() {
			t.Errorf("applied %d times, %g repairs, listed as %v", applied, testutil.ToFloat64(p.server.metrics.repairs), p.edge("e1"))
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
