package keyring

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestEdgesCauseFewWrites: an edge that changes its mind all the time, on one
// stream or on many, causes a bounded number of writes, and nothing of what it
// claims is in them.
func TestEdgesCauseFewWrites(t *testing.T) {
	t.Parallel()
	f, r, _ := settled(t, "good")
	start := time.Now()
	writes := f.client.Watch(t.Context(), f.prefix+"keyring-cover/"+r.server.id+"/"+strconv.Itoa(partOf("evil")))

	labels := map[string]string{}
	for i := range maxLabels {
		labels[fmt.Sprintf("claimed-%d", i)] = strings.Repeat("x", maxText)
	}
	open := func() *node {
		evil := r.open("evil", mute)
		if err := evil.stream.Send(&resealv1.HoldRequest{Edge: "evil", Labels: labels}); err != nil {
			t.Fatal(err)
		}
		go evil.run()
		return evil
	}
	for range 40 {
		open().leave()
	}
	evil := open()
	evil.waitFor("default", "1 active")
	for i := range 150 {
		ack := &resealv1.HoldRequest{Serial: 1, Keyrings: []*resealv1.HeldKeyring{{Name: "default", Epochs: []uint64{1}, Active: uint64(i % 2)}}}
		if err := evil.stream.Send(ack); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the last ack counts", func() bool {
		for _, edge := range r.status("default").GetEdges() {
			if edge.GetEdge() == "evil" && edge.GetActive() == 1 {
				return true
			}
		}
		return false
	})
	evil.leave()
	count, done := 0, time.After(2*time.Second)
	for more := true; more; {
		select {
		case answer := <-writes:
			for _, event := range answer.Events {
				if count++; len(event.Kv.Value) > 512 || strings.Contains(string(event.Kv.Value), "claimed") {
					t.Fatalf("%d bytes are written: %.200s", len(event.Kv.Value), event.Kv.Value)
				}
			}
		case <-done:
			more = false
		}
	}
	if most := writesBurst + writesPerSecond*int(time.Since(start)/time.Second+1); count == 0 || count > most {
		t.Errorf("%d writes, want 1 to %d", count, most)
	}
}

// TestSameAckIsWrittenOnce: what has not changed is not written again.
func TestSameAckIsWrittenOnce(t *testing.T) {
	t.Parallel()
	f, r, n := settled(t, "a")
	ack := ackOf(n.response())
	for range 50 {
		if err := n.stream.Send(ack); err != nil {
			t.Fatal(err)
		}
	}
	r.covers("[1] 1")
	ack.Keyrings[0].Active = 0
	if err := n.stream.Send(ack); err != nil {
		t.Fatal(err)
	}
	r.covers("[1] 0")
	found, err := f.client.Get(t.Context(), f.prefix+"keyring-cover/"+r.server.id+"/"+strconv.Itoa(partOf("a")))
	if err != nil || len(found.Kvs) != 1 || found.Kvs[0].Version > 3 {
		t.Errorf("%v %v, want at most 3 writes: the stream, two acks", found.Kvs, err)
	}
}

// TestCrowdsShareWrites: edges that connect, and ack, at the same time are written in
// few transactions, and one that another replica took over stops no other.
func TestCrowdsShareWrites(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r, other := f.start("r1"), f.start("r2")
	r.waitFor("default", "1 active")
	const crowd = 2500
	covered := func(acked int) func() bool {
		return func() bool {
			other.server.state.mu.Lock()
			defer other.server.state.mu.Unlock()
			n := 0
			for _, c := range other.server.state.ledger.covers {
				if c.Acked {
					n++
				}
			}
			return n == acked && len(other.server.state.ledger.covers) == crowd
		}
	}
	revision := func() int64 {
		answer, err := f.client.Get(t.Context(), f.prefix+"none")
		if err != nil {
			t.Fatal(err)
		}
		return answer.Header.Revision
	}
	transactions := func(since int64) (n int) {
		watch := f.client.Watch(t.Context(), f.prefix+"keyring-cover/"+r.server.id, clientv3.WithPrefix(), clientv3.WithRev(since+1))
		seen := map[int64]bool{}
		for {
			select {
			case answer := <-watch:
				for _, event := range answer.Events {
					seen[event.Kv.ModRevision] = true
				}
			case <-time.After(300 * time.Millisecond):
				return len(seen)
			}
		}
	}
	before := revision()
	var entries []*entry
	for i := range crowd {
		entries = append(entries, r.server.roster.join(fmt.Sprintf("edge-%03d", i), nil, fleet.Detached()))
	}
	eventually(t, "the other knows all", covered(0))
	if n := transactions(before); n > 10 {
		t.Errorf("%d edges that connect cost %d transactions", crowd, n)
	}
	other.server.roster.join("edge-007", nil, fleet.Detached())
	eventually(t, "the older stream ends", func() bool { return status.Code(entries[7].line.Err()) == codes.Aborted })
	before = revision()
	for _, e := range entries {
		r.server.roster.acked(e, map[string]coverOf{"default": {Record: "some", Held: spansOf([]uint64{1}), Active: 1}})
	}
	eventually(t, "the other knows all acks", covered(crowd-1))
	if n := transactions(before); n > 10 {
		t.Errorf("%d edges that ack cost %d transactions", crowd, n)
	}
	keys, bytes := 0, 0
	for _, value := range f.values("keyring-cover/" + r.server.id) {
		keys, bytes = keys+1, bytes+len(value)
	}
	if keys > 1+parts || bytes > 40*crowd {
		t.Errorf("they take %d keys of %d bytes", keys, bytes)
	}
}

// What a digest tells of edges is as small as their names: they share what they hold.
func TestEdgesThatHoldTheSameShareIt(t *testing.T) {
	r := newRoster(&Server{})
	one := r.join("a", nil, nil)
	other := r.join("b", nil, nil)
	for range 3 {
		for _, e := range []*entry{one, other} {
			r.acked(e, map[string]coverOf{"default": {Record: "r", Held: spansOf([]uint64{1, 2}), Active: 2}})
		}
	}
	if one.cover != other.cover {
		t.Error("each has its own")
	}
	seen := map[string]int{}
	for i, c := range []*cover{
		{}, {Acked: true}, {Terms: "t"}, {Labels: map[string]string{"a": "b"}}, {Labels: map[string]string{"a": "", "b": ""}},
		{Keyrings: map[string]coverOf{"a": {Record: "r"}}}, {Keyrings: map[string]coverOf{"a": {Record: "r", Active: 1}}},
		{Keyrings: map[string]coverOf{"a": {Record: "r", Held: spans{{1, 1}}}}}, {Keyrings: map[string]coverOf{"a": {Record: "r", Held: spans{{1, 2}}}}},
		{Keyrings: map[string]coverOf{"a": {Record: "r"}, "b": {Record: "r"}}},
	} {
		if before, known := seen[c.key()]; known {
			t.Errorf("covers %d and %d have one key", before, i)
		}
		seen[c.key()] = i
	}
}

// TestLaterSelectors: the covers follow the selectors of the configuration, on
// every replica, with no more labels than they ask for.
func TestLaterSelectors(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r, other := f.start("r1"), f.start("r2")
	eu, us := r.open("eu", mute), r.open("us", mute)
	for zone, n := range map[string]*node{"eu": eu, "us": us} {
		request := &resealv1.HoldRequest{Edge: zone, Labels: map[string]string{"zone": zone, "claimed": "nobody asks"}}
		if err := n.stream.Send(request); err != nil {
			t.Fatal(err)
		}
		n.mute = false
		go n.run()
		n.waitFor("default", "1 active")
	}
	f.source.apply(many(keyringOf("europe", time.Hour, 12*time.Hour, "zone", "eu")))
	eu.waitFor("europe", "1 active")
	for _, replica := range []*replica{r, other} {
		eventually(t, "the coverage of the new keyring", func() bool {
			edges := replica.status("europe").GetEdges()
			return len(edges) == 1 && edges[0].GetEdge() == "eu" && edges[0].GetActive() == 1
		})
	}
	for key, value := range f.values("keyring-cover/") {
		if strings.Contains(value, "nobody asks") || strings.Contains(value, `"us"`) {
			t.Errorf("%s: %s", key, value)
		}
	}
}

func TestLabelsWithControlCharacters(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	err := r.say("e", &resealv1.HoldRequest{Edge: "e", Labels: map[string]string{"a": "\x1b[2J"}})
	if status.Code(err) != codes.InvalidArgument || strings.ContainsRune(status.Convert(err).Message(), '\x1b') {
		t.Errorf("ended with %q", err)
	}
}
