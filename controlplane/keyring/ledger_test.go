package keyring

import (
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// The newest stream of an edge counts, a live one before one that has left; what a
// replica no longer tells counts no more.
func TestLedger(t *testing.T) {
	l := newLedger("own")
	tells := func(replica string, revision int64, texts ...string) string {
		t.Helper()
		n := news{replica: replica, part: partOf("e")}
		for _, text := range texts {
			text, left := strings.CutSuffix(text, " left")
			s, err := parseStream(text)
			if err != nil {
				t.Fatal(err)
			}
			n.told = append(n.told, told{s, &cover{Terms: replica}, left})
		}
		var lost []string
		for _, s := range l.take(n, revision) {
			lost = append(lost, s.String())
		}
		return strings.Join(lost, " ")
	}
	counts := func(want string) {
		t.Helper()
		got := ""
		if c := l.covers["e"]; c != nil {
			got = c.Terms
		}
		if got != want {
			t.Errorf("that of %q counts, want %q", got, want)
		}
	}
	tells("own", 1, "e/1")
	counts("own")
	if lost := tells("other", 2, "e/1"); lost != "e/1" {
		t.Errorf("superseded: %q", lost)
	}
	counts("other")
	// Told once more it is no newer.
	tells("own", 3, "e/1", "f/2")
	counts("other")
	if lost := tells("own", 4, "e/3"); lost != "" {
		t.Errorf("superseded: %q", lost)
	}
	counts("own")
	// What is loaded says nothing of when streams began; what was known does.
	event := &clientv3.Event{Kv: &mvccpb.KeyValue{ModRevision: 9}}
	n := func(replica, text string) parsed {
		s, _ := parseStream(text)
		return parsed{news: &news{replica: replica, part: partOf("e"), told: []told{{s, &cover{Terms: replica}, false}}}}
	}
	l.replace([]parsed{n("own", "e/3"), n("other", "e/1"), {}}, []*clientv3.Event{event, event, event})
	counts("own")
	tells("own", 10, "e/3 left")
	counts("other")
	tells("other", 11, "e/1 left")
	l.drop("own/" + strings.TrimPrefix((keys{}).part("own", partOf("e")), (keys{}).digest("own")+"/"))
	counts("other")
	l.drop("other")
	counts("other")
	tells("other", 12)
	counts("")
}

// Activation waits for replicas that serve and have not seen a revision.
func TestLedgerHeads(t *testing.T) {
	l := newLedger("own")
	take := func(replica string, h head) { l.take(news{replica: replica, part: -1, head: h}, 1) }
	if !l.seen(5) || l.complete(7) {
		t.Error("nobody is behind, nobody knows all")
	}
	take("own", head{Seen: 5, Cluster: 7})
	take("other", head{Seen: 4, Cluster: 8, Complete: true})
	if l.seen(5) || !l.seen(4) || l.complete(7) {
		t.Errorf("seen %t and %t, complete %t", l.seen(5), l.seen(4), l.complete(7))
	}
	take("other", head{Seen: 4, Cluster: 7, Complete: true, Ended: true})
	if !l.seen(5) || !l.complete(7) || l.ended() {
		t.Errorf("with one that has ended: seen %t, complete %t", l.seen(5), l.complete(7))
	}
	l.drop("other")
	if l.complete(7) {
		t.Error("what is gone counts")
	}
}
