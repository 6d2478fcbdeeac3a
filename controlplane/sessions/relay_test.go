package sessions

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// named is the ReplicaService of a world for the one replica that calls it.
type named struct {
	resealv1.UnimplementedReplicaServiceServer
	server *Server
	caller string
}

func (n *named) Relay(stream grpc.ClientStreamingServer[resealv1.RelayRequest, resealv1.RelayResponse]) error {
	return n.server.Relay(n.caller, stream)
}

// tell has a world tell another one of its edges until the test or cut ends it.
func tell(t *testing.T, from, to *world, caller, callee string) (cut func()) {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	resealv1.RegisterReplicaServiceServer(server, &named{server: to.relay, caller: caller})
	conn, err := grpc.NewClient("passthrough:replica", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(listener) })
	running.Go(func() { _ = from.relay.RelayTo(ctx, callee, resealv1.NewReplicaServiceClient(conn)) })
	cut = sync.OnceFunc(func() {
		cancel()
		conn.Close()
		server.Stop()
		running.Wait()
	})
	t.Cleanup(cut)
	return cut
}

// TestAcrossReplicas: edges of two replicas meet, offer each other sessions and are
// seeded by each other, as those of one are.
func TestAcrossReplicas(t *testing.T) {
	here, there := newWorld(t, nil), newWorld(t, nil)
	a := here.connect("a").join(joinOf(t, "a", "p", "q")) // before the replicas know each other
	a.want("seeded")
	tell(t, here, there, "here", "there")
	cut := tell(t, there, here, "there", "here")
	b := there.connect("b")
	waitFor(t, "what the other replica says", func() bool { return there.relay.count() == 1 })
	b.join(joinOf(t, "b", "q"))
	b.want("member a q", "seeded")
	a.want("member b q")
	a.offer("b", "boot-b", "q")
	b.want("offer a q")
	b.offer("a", "boot-a", "q")
	a.want("offer b q")
	a.offer("b", "boot-b", "p") // not of both
	a.offer("b", "before", "q")

	// One that starts is seeded by an edge of the other replica.
	a.hold(true, "q")
	waitFor(t, "what a holds", func() bool { return there.relay.holds("a", "q") })
	c := there.connect("c").join(joinOf(t, "c", "q"))
	c.wantAll("member a q", "member b q")
	b.want("member c q")
	a.want("member c q")
	request := a.seedRequest()
	a.offer("c", "boot-c", "q")
	a.done(request)
	c.want("offer a q", "seeded")
	// An answer that does not come is not waited for.
	d := there.connect("d").join(joinOf(t, "d", "q"))
	d.wantAll("member a q", "member b q", "member c q", "seeded")
	a.want("member d q")
	a.seed()

	// A configuration that is no longer shared.
	b.want("member d q")
	b.join(joinOf(t, "b"))
	b.wantAll("gone a false", "gone c false", "gone d false", "seeded")
	a.want("gone b false")

	// The end of an edge, and of the connection.
	d.cancel()
	a.want("gone d false")
	c.want("member d q", "gone b false", "gone d false")
	cut()
	a.want("gone c false")
	tell(t, there, here, "there", "here")
	a.want("member c q")
}

// TestEdgeThatMoves: one that connects to another replica is a member once, wherever
// it is.
func TestEdgeThatMoves(t *testing.T) {
	here, there := newWorld(t, nil), newWorld(t, nil)
	tell(t, here, there, "here", "there")
	tell(t, there, here, "there", "here")
	a := here.connect("a").join(joinOf(t, "a", "p"))
	a.want("seeded")
	before := here.connect("m").join(joinOf(t, "m", "p"))
	before.want("member a p", "seeded")
	a.want("member m p")
	// It has connected there before its stream here ends.
	waitFor(t, "both", func() bool { return there.relay.count() == 2 })
	after := there.connect("m")
	again := joinOf(t, "m", "p")
	again.BootId = "boot-again"
	after.join(again)
	after.want("member a p", "seeded")
	waitFor(t, "its shadow", func() bool { return here.relay.shadows() == 1 })
	before.cancel()
	a.want("gone m false", "member m p")
	a.offer("m", "boot-again", "p")
	after.want("offer a p")
	// And back.
	back := here.connect("m").join(joinOf(t, "m", "p"))
	a.want("gone m false", "member m p")
	back.want("member a p", "seeded")
	after.cancel()
	waitFor(t, "the end of its shadow", func() bool { return here.relay.shadows() == 0 && there.relay.count() == 2 })
	a.offer("m", "boot-m", "p")
	back.want("offer a p")
}

// TestReplicaThatDoesNotRead: what is under way to a replica is bounded.
func TestReplicaThatDoesNotRead(t *testing.T) {
	w := newWorld(t, nil)
	o := w.relay.openOutlet("other")
	r := &relay{server: w.relay, replica: "other", members: map[string]*member{}}
	if err := r.take(&resealv1.RelayRequest{Message: &resealv1.RelayRequest_Member{Member: &resealv1.RelayedMember{Join: joinOf(t, "b", "p")}}}); err != nil {
		t.Fatal(err)
	}
	a := w.connect("a").join(joinOf(t, "a", "p"))
	a.want("member b p", "seeded")
	from := w.relay.members["a"]
	for range 1000 {
		w.relay.pass(from, &resealv1.SessionOffer{Origin: "a", Recipient: "b", RecipientBootId: "boot-b", Pool: "p", Ciphertext: make([]byte, maxCiphertext)})
	}
	if o.underWay > maxRelayed || o.underWay < maxRelayed/2 || w.relay.queued != o.underWay {
		t.Errorf("%d bytes are under way, %d of them counted", o.underWay, w.relay.queued)
	}
	w.relay.closeOutlet("other")
	if w.relay.queued != 0 {
		t.Errorf("%d bytes are counted when nothing is under way", w.relay.queued)
	}
	r.close()
	a.want("gone b false")
}

func (s *Server) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.members)
}

func (s *Server) shadows() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.shadowed)
}

func (s *Server) holds(id, pool string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.members[id]
	return m != nil && m.holding[pool]
}

func waitFor(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s", what)
		}
	}
}
