package keyring

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	backoffconfig "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/reseal/reseal/controlplane/etcd/etcdtest"
	"github.com/reseal/reseal/controlplane/office"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// forms are the texts that a secret could be found by.
func forms(secret []byte) []string {
	return []string{
		string(secret), hex.EncodeToString(secret), strings.ToUpper(hex.EncodeToString(secret)),
		base64.StdEncoding.EncodeToString(secret), base64.RawURLEncoding.EncodeToString(secret), fmt.Sprint(secret), fmt.Sprintf("%q", secret),
	}
}

// leads waits for a leader and returns it and the others.
func leads(t *testing.T, replicas ...*replica) (leader *replica, others []*replica) {
	t.Helper()
	eventually(t, "a leader", func() bool {
		leader, others = nil, nil
		name := replicas[0].server.state.leader()
		for _, r := range replicas {
			if r.name == name {
				leader = r
			} else {
				others = append(others, r)
			}
		}
		return leader != nil
	})
	return leader, others
}

// history collects all versions of a record.
type history struct {
	mu      sync.Mutex
	records []*record
}

func (f *testFleet) follow(name string) *history {
	f.t.Helper()
	h := &history{}
	ctx, cancel := context.WithCancel(context.Background())
	answers := f.dialEtcd().Watch(ctx, f.prefix+"keyring/"+name, clientv3.WithRev(1))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for answer := range answers {
			for _, event := range answer.Events {
				r, err := decodeRecord(event.Kv.Value)
				if err != nil {
					f.t.Error(err)
					continue
				}
				h.mu.Lock()
				h.records = append(h.records, r)
				h.mu.Unlock()
			}
		}
	}()
	f.t.Cleanup(func() { cancel(); <-ended })
	return h
}

// check: each version follows from the one before, and one epoch is active.
func (h *history) check(t *testing.T) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := 1; i < len(h.records); i++ {
		before, after := h.records[i-1].ring(), h.records[i].ring()
		_, was := before.Active()
		if _, is := after.Active(); was && !is || after.Last < before.Last || after.Last > before.Last+1 {
			t.Errorf("%+v\nwas followed by\n%+v", before, after)
		}
		for _, e := range after.Epochs {
			if old, ok := before.Find(e.Number); ok && e.State < old.State {
				t.Errorf("epoch %d went from %s back to %s", e.Number, old.State, e.State)
			}
		}
	}
}

func TestLeaderDiesWhileRotating(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	first, second := f.start("r1"), f.start("r2")
	first.waitFor("default", "1 active")
	versions := f.follow("default")
	leader, others := leads(t, first, second)
	other := others[0]
	onOther, onLeader := other.connect("a"), leader.connect("b")
	onOther.waitFor("default", "1 active")
	onLeader.waitFor("default", "1 active")
	onOther.hush()
	// Either replica takes a command, and knows all edges.
	if got := other.rotate("default"); got != 2 {
		t.Fatalf("epoch %d was prepared", got)
	}
	leader.waitFor("default", "1 active, 2 prepared")
	eventually(t, "both see the laggard alone", func() bool {
		return cmp.Equal(leader.status("default").GetLaggards(), []string{"a"}) && cmp.Equal(other.status("default").GetLaggards(), []string{"a"})
	})
	leader.stop()
	if code := status.Code(onLeader.reason()); code != codes.Unavailable {
		t.Errorf("the stream to the leader ended with %s", code)
	}
	back := other.connect("b")
	onOther.waitFor("default", "1 active, 2 prepared")
	back.waitFor("default", "1 active, 2 prepared")
	eventually(t, "the other leads", func() bool { return other.server.state.leader() == other.name })
	if got := epochs(other.status("default")); got != "1 active, 2 prepared" {
		t.Errorf("before the last ack: %s", got)
	}
	onOther.speak()
	onOther.waitFor("default", "1 retired, 2 active")
	back.waitFor("default", "1 retired, 2 active")
	if diff := cmp.Diff(onOther.secrets("default"), back.secrets("default")); diff != "" {
		t.Error("the edges hold different secrets")
	}
	versions.check(t)
}

// gate is a network that can be stopped.
type gate struct {
	mu     sync.Mutex
	closed chan struct{} // closed: open
}

func newGate() *gate {
	g := &gate{closed: make(chan struct{})}
	close(g.closed)
	return g
}

func (g *gate) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.closed)
}

func (g *gate) pass() {
	g.mu.Lock()
	closed := g.closed
	g.mu.Unlock()
	<-closed
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c gatedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.gate.pass()
	return n, err
}

func (c gatedConn) Write(p []byte) (int, error) {
	c.gate.pass()
	return c.Conn.Write(p)
}

func (f *testFleet) dialGated(g *gate) *clientv3.Client {
	f.t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + shared}, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", shared)
			return gatedConn{conn, g}, err
		})}})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = client.Close() })
	return client
}

// TestPausedLeader: a leader that can't reach etcd for longer than its lease
// lives, and then can, writes nothing any more.
func TestPausedLeader(t *testing.T) {
	t.Parallel()
	f := newFleet(t, keyringOf("default", 300*time.Millisecond, time.Second))
	g := newGate()
	paused := f.start("paused", func(c *Config) { c.Client, c.LeaderTTL = f.dialGated(g), 2*time.Second })
	t.Cleanup(paused.stop) // before its client is closed
	paused.waitFor("default", "1 active")
	versions := f.follow("default")
	eventually(t, "it rotates", func() bool { return paused.status("default").GetEpochs()[0].GetNumber() > 1 })
	other := f.start("other")
	eventually(t, "the other knows the leader", func() bool { return other.server.state.leader() == "paused" })
	g.stop()
	eventually(t, "the other leads", func() bool { return other.server.state.leader() == "other" })
	last := func() uint64 {
		numbers := other.status("default").GetEpochs()
		return numbers[len(numbers)-1].GetNumber()
	}
	before := last()
	eventually(t, "the other rotates", func() bool { return last() > before+2 })
	g.open()
	eventually(t, "the paused one follows", func() bool { return paused.server.state.leader() == "other" })
	before = last()
	eventually(t, "the rotation goes on", func() bool { return last() > before+2 })
	versions.check(t)
}

// TestFence: what a deposed leader writes fails although nobody has changed the
// record since it looked.
func TestFence(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	leads(t, r)
	answer, err := f.client.Get(t.Context(), f.prefix+"keyring-leader/", clientv3.WithFirstCreate()...)
	if err != nil || len(answer.Kvs) != 1 {
		t.Fatalf("%v %v", answer, err)
	}
	old := office.Fence{Key: string(answer.Kvs[0].Key), Created: answer.Kvs[0].CreateRevision}
	r.server.state.mu.Lock()
	found := r.server.state.records["default"]
	r.server.state.mu.Unlock()
	w := write{name: "default", before: found.revision, after: found.record, fence: old}
	if _, err := r.server.commit(t.Context(), write{name: "default", before: found.revision - 1, after: found.record, fence: old}); !errors.Is(err, errStale) {
		t.Errorf("a write of what is not the newest: %v", err)
	}
	if _, err := f.client.Revoke(t.Context(), clientv3.LeaseID(answer.Kvs[0].Lease)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.server.commit(t.Context(), w); !errors.Is(err, office.ErrDeposed) {
		t.Errorf("a write of a deposed leader: %v", err)
	}
	eventually(t, "it leads again", func() bool {
		answer, err := f.client.Get(t.Context(), f.prefix+"keyring-leader/", clientv3.WithFirstCreate()...)
		return err == nil && len(answer.Kvs) == 1 && answer.Kvs[0].CreateRevision > old.Created
	})
	if _, err := r.server.commit(t.Context(), w); !errors.Is(err, office.ErrDeposed) {
		t.Errorf("a write under an earlier term: %v", err)
	}
	w.fence = office.Fence{Key: f.prefix + "keyring-leader"}
	if _, err := r.server.commit(t.Context(), w); !errors.Is(err, errStale) {
		t.Errorf("a write without a leader while there is one: %v", err)
	}
}

// TestActivationSeesEdgesThatJustCame: an edge that appears after the leader has
// looked voids the activation.
func TestActivationSeesEdgesThatJustCame(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	leads(t, r)
	answer, err := f.client.Get(t.Context(), f.prefix+"keyring-leader/", clientv3.WithFirstCreate()...)
	if err != nil {
		t.Fatal(err)
	}
	r.server.state.mu.Lock()
	found, looked := r.server.state.records["default"], answer.Header.Revision
	r.server.state.mu.Unlock()
	n := r.connect("new", mute)
	n.waitFor("default", "1 active")
	r.covers("[] 0")
	w := write{name: "default", before: found.revision, after: found.record, covered: looked,
		fence: office.Fence{Key: string(answer.Kvs[0].Key), Created: answer.Kvs[0].CreateRevision}}
	if _, err := r.server.commit(t.Context(), w); !errors.Is(err, errStale) {
		t.Errorf("committed past a new edge: %v", err)
	}
	w.covered = 0
	if _, err := r.server.commit(t.Context(), w); err != nil {
		t.Errorf("without looking at edges: %v", err)
	}
}

// TestActivationWaitsForReplicas: while a replica does not know of the next epoch, edges
// may come to it that are not told of it. They would decline tickets of that epoch.
func TestActivationWaitsForReplicas(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	leads(t, r)
	g := newGate()
	slow := f.start("slow", func(c *Config) { c.Client, c.LiveFor = f.dialGated(g), 20*time.Second })
	t.Cleanup(slow.stop) // before its client is closed
	slow.waitFor("default", "1 active")
	here := r.connect("here")
	here.waitFor("default", "1 active")
	eventually(t, "both tell of themselves", func() bool {
		r.server.state.mu.Lock()
		defer r.server.state.mu.Unlock()
		heads := 0
		for _, d := range r.server.state.ledger.replicas {
			if d.known && d.head.Complete {
				heads++
			}
		}
		return heads == 2
	})
	g.stop()
	r.rotate("default")
	here.waitFor("default", "1 active, 2 prepared")
	r.covers("[1 2] 1")
	late := slow.connect("late")
	late.waitFor("default", "1 active")
	time.Sleep(time.Second)
	if got := epochs(r.status("default")); got != "1 active, 2 prepared" {
		t.Errorf("past a replica that does not know: %s", got)
	}
	g.open()
	late.waitFor("default", "1 retired, 2 active")
	here.waitFor("default", "1 retired, 2 active")
}

// TestRotationAfterARestart does not wait for what is known: the digest of the process
// before says which edges live.
func TestRotationAfterARestart(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	lives := func(c *Config) { c.LiveFor = 20 * time.Second }
	first := f.start("r1", lives)
	first.waitFor("default", "1 active")
	first.connect("a").waitFor("default", "1 active")
	first.connect("b").waitFor("default", "1 active")
	eventually(t, "both are told of", func() bool { return len(f.values("keyring-cover/")) == 3 })
	first.stop()
	again := f.start("r1", lives)
	again.waitFor("default", "1 active")
	began := time.Now()
	again.connect("a").waitFor("default", "1 active")
	again.rotate("default")
	again.waitFor("default", "1 active, 2 prepared")
	eventually(t, "the edge that has not come back lags", func() bool {
		return cmp.Equal(again.status("default").GetLaggards(), []string{"b"})
	})
	again.connect("b").waitFor("default", "1 retired, 2 active")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
}

// TestEdgesComeBackWithoutEtcd: a replica that knows the keys gives them to edges while
// etcd is away.
func TestEdgesComeBackWithoutEtcd(t *testing.T) {
	t.Parallel()
	f, _, stop, start := ownEtcd(t)
	r := f.start("r1")
	r.waitFor("default", "1 active")
	n := r.connect("a")
	n.waitFor("default", "1 active")
	n.leave()
	stop()
	for _, id := range []string{"a", "b"} {
		r.connect(id).waitFor("default", "1 active")
	}
	start()
	eventually(t, "etcd knows of them", func() bool {
		edges := r.status("default").GetEdges()
		return len(edges) == 2 && edges[0].GetActive() == 1 && edges[1].GetActive() == 1 && len(f.values("keyring-cover/")) == 3
	})
}

// TestEdgeThatKnowsMore: a replica that is behind what an edge holds asks etcd first.
func TestEdgeThatKnowsMore(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	n := r.open("a")
	if err := n.stream.Send(&resealv1.HoldRequest{Edge: "a", Keyrings: []*resealv1.HeldKeyring{{Name: "default", Epochs: []uint64{1, 2}}}}); err != nil {
		t.Fatal(err)
	}
	go n.run()
	n.waitFor("default", "1 active") // it was mistaken, or etcd has been replaced
	r.server.state.mu.Lock()
	confirmed, began := r.server.state.confirmed, time.Now().Add(time.Hour)
	knows := []bool{
		r.server.state.knows(map[string]uint64{"default": 1, "other": 9}, began),
		r.server.state.knows(map[string]uint64{"default": 2}, began),
	}
	r.server.state.mu.Unlock()
	if confirmed.IsZero() || !knows[0] || knows[1] {
		t.Errorf("etcd was asked at %v; what is known: %v", confirmed, knows)
	}
}

func TestNewerStreamTakesOver(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	first, second := f.start("r1"), f.start("r2")
	first.waitFor("default", "1 active")
	second.waitFor("default", "1 active")
	old := first.connect("a")
	old.waitFor("default", "1 active")
	same := first.connect("a")
	same.waitFor("default", "1 active")
	if code := status.Code(old.reason()); code != codes.Aborted {
		t.Errorf("the older stream ended with %s", code)
	}
	eventually(t, "the other replica is told of it", func() bool {
		second.server.state.mu.Lock()
		defer second.server.state.mu.Unlock()
		d := second.server.state.ledger.replicas[first.server.id]
		return d != nil && d.parts[partOf("a")]["a"].number == 2
	})
	far := second.connect("a")
	far.waitFor("default", "1 active")
	second.rotate("default")
	if code := status.Code(same.reason()); code != codes.Aborted {
		t.Errorf("the older stream on another replica ended with %s", code)
	}
	far.waitFor("default", "1 retired, 2 active")
	if edges := second.status("default").GetEdges(); len(edges) != 1 {
		t.Errorf("edges are %v", edges)
	}
}

// ownEtcd is a fleet with an etcd that a test may stop and start again.
func ownEtcd(t *testing.T) (f *testFleet, dir string, stop func(), start func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	server, err := startEtcd(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	f = newFleet(t, steady())
	f.client, err = clientv3.New(clientv3.Config{Endpoints: []string{etcdtest.Endpoint(dir)}, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoffconfig.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
			MinConnectTimeout: time.Second,
		})}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.client.Close() })
	return f, dir, func() { server.Close() }, func() {
		if server, err = startEtcd(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEtcdGoesAway: edges keep what they have, and the rotation goes on when etcd
// is back.
func TestEtcdGoesAway(t *testing.T) {
	t.Parallel()
	f, _, stop, start := ownEtcd(t)
	r := f.start("r1")
	r.waitFor("default", "1 active")
	n := r.connect("a")
	n.waitFor("default", "1 active")
	stop()
	if _, err := r.client.Rotate(t.Context(), &resealv1.RotateRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("rotate without etcd: %v", err)
	}
	start()
	eventually(t, "a rotation", func() bool {
		_, err := r.client.Rotate(t.Context(), &resealv1.RotateRequest{})
		return err == nil
	})
	n.waitFor("default", "1 retired, 2 active")
	if got := n.response().GetSerial(); got < 3 {
		t.Errorf("the stream did not live on: serial %d", got)
	}
}

// TestEtcdIsReplaced: the numbers begin anew with other secrets, and what edges
// acked of the old ones does not count.
func TestEtcdIsReplaced(t *testing.T) {
	t.Parallel()
	f, dir, stop, start := ownEtcd(t)
	r := f.start("r1")
	r.waitFor("default", "1 active")
	n := r.connect("a")
	n.waitFor("default", "1 active")
	before := n.secrets("default")[1]
	r.rotate("default")
	n.waitFor("default", "1 retired, 2 active")
	stop()
	if err := os.RemoveAll(filepath.Join(dir, "data")); err != nil {
		t.Fatal(err)
	}
	start()
	if code := status.Code(n.reason()); code != codes.Unavailable {
		t.Errorf("the stream ended with %s", code)
	}
	n = r.connect("a")
	n.waitFor("default", "1 active")
	if bytes.Equal(before, n.secrets("default")[1]) {
		t.Error("the secret is the old one")
	}
}
