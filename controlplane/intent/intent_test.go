package intent

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/reseal/reseal/controlplane/mirror"
)

const prefix = "/reseal/v1/intent/drain/"

func newStore() (store *Store, changes *[]string) {
	changes = new([]string)
	store = New(Config{Changed: func(edge string) { *changes = append(*changes, edge) }, Logger: slog.New(slog.DiscardHandler)})
	return store, changes
}

func key(edge string, revision int64) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{Key: []byte(prefix + edge), Value: []byte(`{"timeout": 5000000000, "by": "operator/o"}`), ModRevision: revision}
}

func loaded(cluster uint64, revision int64, keys ...*mvccpb.KeyValue) mirror.Contents {
	return mirror.Contents{Keys: keys, Revision: revision, Cluster: cluster}
}

func TestDrained(t *testing.T) {
	s, changes := newStore()
	s.load(loaded(1, 7, key("e1", 5)))
	if got := s.Drained("e1"); !got.GetDrain() || got.GetTimeout().AsDuration() != 5*time.Second {
		t.Errorf("e1: %v", got)
	}
	if got := s.Drained("e2"); got != nil {
		t.Errorf("e2: %v", got)
	}
	s.load(loaded(1, 8, key("e1", 5))) // nothing new
	if !slices.Equal(*changes, []string{"e1"}) {
		t.Errorf("changed: %v", *changes)
	}
	s.load(loaded(1, 9))
	if got := s.Drained("e1"); got != nil || len(s.drains) != 0 {
		t.Errorf("after its end: %v, %v", got, s.drains)
	}
}

// TestOldNews: what this replica wrote itself is not undone by what the watch brings
// of the time before.
func TestOldNews(t *testing.T) {
	s, changes := newStore()
	s.set("e1", &Drain{}, 5)
	s.set("e1", nil, 6)
	s.take(key("e1", 5), false)
	if got := s.Drained("e1"); got != nil {
		t.Errorf("old news bring it back: %v", got)
	}
	s.load(loaded(1, 5, key("e1", 5)))
	if got := s.Drained("e1"); got != nil {
		t.Errorf("an old load brings it back: %v", got)
	}
	s.set("e2", &Drain{}, 8)
	s.take(key("e2", 7), true)
	s.load(loaded(1, 7))
	if s.Drained("e2") == nil {
		t.Error("old news remove what is newer")
	}
	if !slices.Equal(*changes, []string{"e1", "e1", "e2"}) {
		t.Errorf("changed: %v", *changes)
	}
	s.load(loaded(1, 9, key("e2", 8)))
	if len(s.drains) != 1 {
		t.Errorf("what is over is kept: %v", s.drains)
	}
}

// TestAnotherCluster: a store that was restored has lower revisions.
func TestAnotherCluster(t *testing.T) {
	s, _ := newStore()
	s.load(loaded(1, 700, key("e1", 500), key("e2", 600)))
	s.load(loaded(2, 9, key("e1", 5)))
	if s.Drained("e1") == nil || s.Drained("e2") != nil {
		t.Errorf("held: %v", s.drains)
	}
	s.take(key("e1", 10), true)
	if s.Drained("e1") != nil {
		t.Error("a removal in the new cluster is not heard")
	}
}

func TestDamaged(t *testing.T) {
	s, _ := newStore()
	s.take(key("e1", 5), false)
	s.take(&mvccpb.KeyValue{Key: []byte(prefix + "e1"), Value: []byte("{"), ModRevision: 6}, false)
	if s.Drained("e1") == nil {
		t.Error("an order that can't be read undoes the one before")
	}
}
