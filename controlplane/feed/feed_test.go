package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// base is a configuration of four resources, revision 1.
func base() *source {
	s := newSource()
	s.apply(many(listener("web", "app", nil, "site"), pool("app", "a:1"), certificate("site", "k1"), keyring("default", nil)))
	return s
}

func (p *plane) node(id string, labels map[string]string, state *disk, options ...func(*node)) *node {
	p.t.Helper()
	return startNode(p.t, resealv1.NewFeedServiceClient(p.dial(id)), id, labels, state, options...)
}

func TestFullThenDeltas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		n := p.node("e1", nil, newDisk())
		settle(0)
		if diff := cmp.Diff([]string{"BackendPool/app", "Certificate/site", "Keyring/default", "Listener/web"}, keys(n.newest())); diff != "" {
			t.Fatal(diff)
		}
		if got := n.newest().Get("Certificate", "site").GetCertificate().GetPrivateKeyPem(); got != "clear k1" {
			t.Errorf("private key arrived as %q", got)
		}
		s.apply(many(pool("app", "a:2")))
		settle(0)
		s.apply(nil, ref("Keyring", "default"))
		settle(0)
		s.apply(many(pool("unused", "b:1"))) // changes nothing for the edge
		settle(0)
		if got := p.updates(); got != "1 2 1" {
			t.Errorf("updates full, delta, empty: %s", got)
		}
		if got := p.resourcesSent(); got != 5 {
			t.Errorf("%d resources sent, want 4 + 1", got)
		}
		edge := p.edge("e1")
		if edge.GetState() != resealv1.Edge_STATE_SYNCED || edge.GetAckedRevision() != 4 || edge.GetTargetRevision() != 4 || edge.GetResources() != 3 || edge.GetResourcesSent() != 5 {
			t.Errorf("listed as %v", edge)
		}
		if n.feed.Revision() != 4 || !n.feed.Connected() {
			t.Errorf("edge is at revision %d, connected %t", n.feed.Revision(), n.feed.Connected())
		}
	})
}

func TestComingBack(t *testing.T) {
	changed := func(s *source) { s.apply(many(pool("app", "a:2"))) }
	for name, test := range map[string]struct {
		between func(*source)
		updates string // of the second plane: full, delta, empty
		sent    int
	}{
		"nothing changed":          {func(*source) {}, "0 0 1", 0},
		"only others changed":      {func(s *source) { s.apply(many(pool("unused", "b:1"))) }, "0 0 1", 0},
		"changed, base in history": {changed, "0 1 0", 1},
		"changed, base forgotten":  {func(s *source) { changed(s); s.broken = true }, "1 0 0", 4},
		"another cluster": {func(s *source) {
			s.history = []*resealv1.Snapshot{resealv1.NewSnapshot("c2", 1, s.Snapshot().All())}
		}, "1 0 0", 4},
		"history was rewritten": {func(s *source) {
			s.history = s.history[:1]
			s.apply(many(pool("app", "z:1"), listener("web", "app", nil)))
			s.apply(many(pool("app", "z:2")))
		}, "1 0 0", 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, state := base(), newDisk()
				first := startPlane(t, s)
				n := first.node("e1", nil, state)
				settle(0)
				n.stop()
				first.stop()
				test.between(s)
				// Both are started afresh: the edge has its disk, the plane
				// the store's history.
				second := startPlane(t, s)
				n = second.node("e1", nil, state)
				settle(5 * time.Second)
				if got := second.updates(); got != test.updates {
					t.Errorf("updates full, delta, empty: %s, want %s", got, test.updates)
				}
				if got := second.resourcesSent(); got != test.sent {
					t.Errorf("%d resources sent, want %d", got, test.sent)
				}
				if diff := cmp.Diff(chosen(s.Snapshot(), nil), keys(n.newest())); diff != "" {
					t.Error(diff)
				}
				if got := second.edge("e1").GetState(); got != resealv1.Edge_STATE_SYNCED {
					t.Error(got)
				}
			})
		})
	}
}

// A plane that runs on tells edges apart from memory, and asks the store's
// history once for a crowd.
func TestCrowdReadsHistoryOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		first := startPlane(t, s)
		disks := map[string]*disk{}
		var nodes []*node
		for i := range 10 {
			id := fmt.Sprint("e", i)
			disks[id] = newDisk()
			nodes = append(nodes, first.node(id, nil, disks[id]))
		}
		settle(0)
		for _, n := range nodes {
			n.stop()
		}
		first.stop()
		s.apply(many(pool("app", "a:2")))
		second := startPlane(t, s)
		for id, state := range disks {
			second.node(id, nil, state)
		}
		settle(0)
		if got := second.updates(); got != "0 10 0" {
			t.Errorf("updates full, delta, empty: %s", got)
		}
		if got := s.reads[1]; got != 1 {
			t.Errorf("history was read %d times", got)
		}
	})
}

func TestMarshalOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		var nodes []*node
		for i := range 50 {
			labels := map[string]string{"odd": fmt.Sprint(i % 2)}
			nodes = append(nodes, p.node(fmt.Sprint("e", i), labels, newDisk()))
		}
		settle(0)
		if resources, updates := p.server.work.resources.Load(), p.server.work.updates.Load(); resources != 4 || updates != 1 {
			t.Errorf("%d resources and %d updates marshalled for 50 edges, want 4 and 1", resources, updates)
		}
		s.apply(many(pool("app", "a:2")))
		settle(0)
		// A listener for half of them makes two views.
		s.apply(many(listener("odd", "app", map[string]string{"odd": "1"})))
		settle(0)
		if resources, updates := p.server.work.resources.Load(), p.server.work.updates.Load(); resources != 6 || updates != 4 {
			t.Errorf("%d resources and %d updates marshalled, want 6 and 4", resources, updates)
		}
		for i, n := range nodes {
			if got := n.newest().Get("Listener", "odd") != nil; got != (i%2 == 1) {
				t.Errorf("edge %d holds the odd listener: %t", i, got)
			}
			if got := n.newest().Get("BackendPool", "app").GetBackendPool().GetEndpoints()[0].GetAddress(); got != "a:2" {
				t.Errorf("edge %d has the pool at %s", i, got)
			}
		}
	})
}

// A slow edge skips revisions; nothing queues for it.
func TestSlowEdgeSkipsRevisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		n := p.node("slow", nil, newDisk(), func(n *node) { n.slow = 10 * time.Second })
		settle(time.Second)
		for i := range 20 {
			s.apply(many(pool("app", fmt.Sprint("a:", i))))
			settle(100 * time.Millisecond)
		}
		if got := p.edge("slow").GetState(); got != resealv1.Edge_STATE_SYNCING {
			t.Error(got)
		}
		settle(30 * time.Second)
		if got := p.updates(); got != "1 1 0" {
			t.Errorf("updates full, delta, empty: %s", got)
		}
		if got := n.newest().Revision(); got != 21 {
			t.Errorf("serves revision %d", got)
		}
		if got := p.edge("slow").GetConvergence().AsDuration(); got <= 10*time.Second {
			t.Errorf("converged in %s", got)
		}
	})
}

func TestAnswerDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := startPlane(t, base())
		stream := p.hello("stuck", &resealv1.Hello{Edge: "stuck"})
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		_, err := stream.Recv()
		if status.Code(err) != codes.DeadlineExceeded || time.Since(started) != answerTimeout {
			t.Errorf("%v after %s", err, time.Since(started))
		}
	})
}

// An edge that reads nothing holds up neither the plane nor the deadline.
func TestDeadlineWithoutReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		s.apply(many(pool("app", strings.Repeat("x", 8<<20))))
		p := startPlane(t, s)
		p.hello("deaf", &resealv1.Hello{Edge: "deaf"})
		settle(time.Second)
		if got := p.edge("deaf").GetState(); got != resealv1.Edge_STATE_SYNCING {
			t.Fatal(got)
		}
		settle(answerTimeout)
		if got := p.edge("deaf").GetState(); got != resealv1.Edge_STATE_DISCONNECTED {
			t.Error(got)
		}
	})
}

func TestLargeUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		s.apply(many(pool("app", strings.Repeat("x", 8<<20))))
		p := startPlane(t, s)
		n := p.node("e1", nil, newDisk())
		settle(time.Second)
		if got := n.newest().Revision(); got != 2 {
			t.Errorf("serves revision %d", got)
		}
	})
}

func refusePool(address string) func(*resealv1.Snapshot) []*resealv1.Violation {
	return func(snapshot *resealv1.Snapshot) []*resealv1.Violation {
		if snapshot.Get("BackendPool", "app").GetBackendPool().GetEndpoints()[0].GetAddress() != address {
			return nil
		}
		return []*resealv1.Violation{{Resource: ref("BackendPool", "app"), Field: "spec.endpoints[0].address", Description: "is bad"}}
	}
}

func TestNackThenFix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, state := base(), newDisk()
		p := startPlane(t, s)
		n := p.node("e1", nil, state, func(n *node) { n.refuse = refusePool("bad:1") })
		settle(0)
		s.apply(many(pool("app", "bad:1"), pool("other", "b:1"), route("r", []string{"web"}, "other")))
		settle(0)
		edge := p.edge("e1")
		if edge.GetState() != resealv1.Edge_STATE_REFUSED || edge.GetAckedRevision() != 1 || edge.GetNack().GetServingRevision() != 1 {
			t.Errorf("listed as %v", edge)
		}
		if got := edge.GetNack().GetViolations(); len(got) != 1 || got[0].Text() != "BackendPool/app: spec.endpoints[0].address: is bad" {
			t.Errorf("violations %v", got)
		}
		if got := n.newest().Revision(); got != 1 || n.feed.Revision() != 1 {
			t.Errorf("serves revision %d", got)
		}
		if kept, err := n.feed.LoadLastGood(); err != nil || kept.Revision() != 1 {
			t.Errorf("kept revision %d, %v", kept.Revision(), err)
		}
		// The fix is a delta from the refused revision: the route and its pool
		// are not sent again.
		sent := p.resourcesSent()
		s.apply(many(pool("app", "a:3")))
		settle(0)
		if got := p.resourcesSent() - sent; got != 1 {
			t.Errorf("%d resources sent for the fix", got)
		}
		if edge := p.edge("e1"); edge.GetState() != resealv1.Edge_STATE_SYNCED || edge.GetNack() != nil || edge.GetAckedRevision() != 3 {
			t.Errorf("listed as %v", edge)
		}
		if diff := cmp.Diff(chosen(s.Snapshot(), nil), keys(n.newest())); diff != "" {
			t.Error(diff)
		}
		if kept, err := n.feed.LoadLastGood(); err != nil || kept.Revision() != 3 {
			t.Errorf("kept revision %d, %v", kept.Revision(), err)
		}
	})
}

// What is wrong on the edge alone may pass: the edge tries again and says so.
func TestLateAck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		n := p.node("e1", nil, newDisk(), func(n *node) { n.refuse = refusePool("busy:1") })
		settle(0)
		s.apply(many(pool("app", "busy:1")))
		settle(25 * time.Second)
		if edge := p.edge("e1"); edge.GetState() != resealv1.Edge_STATE_REFUSED {
			t.Fatalf("listed as %v", edge)
		}
		n.set(func(n *node) {
			n.refuse = func(*resealv1.Snapshot) []*resealv1.Violation {
				return []*resealv1.Violation{{Description: "something else"}}
			}
		})
		settle(10 * time.Second)
		if got := p.edge("e1").GetNack().GetViolations()[0].GetDescription(); got != "something else" {
			t.Errorf("the list says %q", got)
		}
		n.set(func(n *node) { n.refuse = nil })
		settle(10 * time.Second)
		if edge := p.edge("e1"); edge.GetState() != resealv1.Edge_STATE_SYNCED || edge.GetAckedRevision() != 2 || edge.GetNack() != nil {
			t.Errorf("listed as %v", edge)
		}
		if got := p.updates(); got != "1 1 0" {
			t.Errorf("updates full, delta, empty: %s", got)
		}
		// The stream is still sound.
		s.apply(many(pool("app", "a:9")))
		settle(0)
		if got := n.newest().Revision(); got != 3 {
			t.Errorf("serves revision %d", got)
		}
	})
}

// hello opens a bare stream.
func (p *plane) hello(as string, hello *resealv1.Hello) resealv1.FeedService_SyncClient {
	p.t.Helper()
	return p.say(as, &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Hello{Hello: hello}})
}

// say opens a stream and sends messages. A server that has refused the stream by
// then shows as io.EOF; the reason is what Recv returns.
func (p *plane) say(as string, messages ...*resealv1.SyncRequest) resealv1.FeedService_SyncClient {
	p.t.Helper()
	stream, err := resealv1.NewFeedServiceClient(p.dial(as)).Sync(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	for _, message := range messages {
		if err := stream.Send(message); err != nil && !errors.Is(err, io.EOF) {
			p.t.Fatal(err)
		}
	}
	return stream
}

func ack(revision int64) *resealv1.SyncRequest {
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Ack{Ack: &resealv1.Ack{Revision: revision}}}
}

func helloOf(hello *resealv1.Hello) *resealv1.SyncRequest {
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Hello{Hello: hello}}
}

func TestBadSpeech(t *testing.T) {
	many := map[string]string{}
	for i := range maxLabels + 1 {
		many[fmt.Sprint(i)] = "x"
	}
	long := strings.Repeat("x", maxText+1)
	for name, test := range map[string]struct {
		say  []*resealv1.SyncRequest
		want codes.Code
	}{
		"another's id":      {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e2"})}, codes.PermissionDenied},
		"no id":             {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{})}, codes.PermissionDenied},
		"no hello":          {[]*resealv1.SyncRequest{ack(1)}, codes.InvalidArgument},
		"nothing in it":     {[]*resealv1.SyncRequest{{}}, codes.InvalidArgument},
		"hello twice":       {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e1"}), helloOf(&resealv1.Hello{Edge: "e1"})}, codes.InvalidArgument},
		"ack of the future": {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e1"}), ack(99)}, codes.InvalidArgument},
		"too many labels":   {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e1", Labels: many})}, codes.InvalidArgument},
		"long label":        {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e1", Labels: map[string]string{"a": long}})}, codes.InvalidArgument},
		"long boot id":      {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e1", BootId: long})}, codes.InvalidArgument},
		"steering version":  {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e1", Version: "v1\x1b[2J"})}, codes.InvalidArgument},
		"steering boot id":  {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e1", BootId: "\u009b2J"})}, codes.InvalidArgument},
		"steering label":    {[]*resealv1.SyncRequest{helloOf(&resealv1.Hello{Edge: "e1", Labels: map[string]string{"zone": "\u202eue"}})}, codes.InvalidArgument},
		"silence":           {nil, codes.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				stream := startPlane(t, base()).say("e1", test.say...)
				var err error
				for err == nil {
					_, err = stream.Recv()
				}
				if status.Code(err) != test.want {
					t.Errorf("ended with %v, want %s", err, test.want)
				}
			})
		})
	}
}

func TestUnknownCallers(t *testing.T) {
	for _, test := range []struct {
		err  error
		want codes.Code
	}{
		{errors.New("who are you"), codes.PermissionDenied},
		{status.Error(codes.Unavailable, "trust is down"), codes.Unavailable},
	} {
		synctest.Test(t, func(t *testing.T) {
			p := startPlane(t, base())
			p.server.config.Edge = func(context.Context) (string, map[string]string, error) { return "", nil, test.err }
			_, err := p.hello("e1", &resealv1.Hello{Edge: "e1"}).Recv()
			if status.Code(err) != test.want {
				t.Errorf("%v, want %s", err, test.want)
			}
		})
	}
}
