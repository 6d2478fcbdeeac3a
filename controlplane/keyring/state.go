package keyring

import (
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// state is what this replica knows: of etcd by watch, of the configuration from
// the source. Records, covers and specs in it are immutable.
type state struct {
	mu       sync.Mutex
	loaded   bool
	revision int64     // of etcd, of the newest event
	era      int       // grows when etcd was restored or replaced
	since    time.Time // when the watch began, without a gap since then
	cluster  uint64    // of etcd
	// inherited says that a digest from before the watch began names all live edges.
	inherited bool
	newest    int64 // mod revision of the newest record
	// confirmed is when this replica asked etcd last for the newest record, and had
	// seen atLeast then: what it knew at that time is not out of date.
	confirmed time.Time
	atLeast   int64

	configured int64 // revision of the configuration, 0: not known yet
	specs      []keyringSpec
	terms      terms // of the configuration
	records    map[string]*stored
	ledger     *ledger
	offices    map[string]candidate // candidates of the election, by key

	known chan struct{} // closed when etcd was loaded first
	sets  func()        // called when what edges hold may have changed
	all   chan struct{} // closed at every change
}

// stored is a record as etcd has it.
type stored struct {
	*record        // nil: damaged
	revision int64 // the key's mod revision
	problem  error // why it can't be served
}

// candidate stands for election. The oldest key is the leader's.
type candidate struct {
	name    string
	created int64
}

func newState(replica string, sets func()) *state {
	return &state{
		records: map[string]*stored{}, ledger: newLedger(replica), offices: map[string]candidate{},
		era:   1,
		terms: termsOf(nil),
		known: make(chan struct{}), sets: sets, all: make(chan struct{}),
	}
}

// announce wakes streams that wait to be served.
func (st *state) announce() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.notify(true)
}

// head is what this replica tells of itself.
func (st *state) head(name string, liveFor time.Duration) head {
	st.mu.Lock()
	defer st.mu.Unlock()
	return head{Format: digestFormat, Name: name, Cluster: st.cluster, Seen: st.newest, Complete: st.complete(liveFor)}
}

// complete says whether the ledger names all live edges. The caller holds mu.
func (st *state) complete(liveFor time.Duration) bool {
	return st.inherited || time.Since(st.since) >= liveFor
}

// predecessors are earlier processes of a replica that have not said that they
// ended.
func (st *state) predecessors(name string) map[string]head {
	st.mu.Lock()
	defer st.mu.Unlock()
	found := map[string]head{}
	for id, d := range st.ledger.replicas {
		if id != st.ledger.self && d.known && !d.head.Ended && d.head.Name == name {
			found[id] = d.head
		}
	}
	return found
}

// notify wakes those who wait. The caller holds mu.
func (st *state) notify(sets bool) {
	if sets {
		st.sets()
	}
	close(st.all)
	st.all = make(chan struct{})
}

// changed is closed at the next change.
func (st *state) changed() <-chan struct{} {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.all
}

func (st *state) currentEra() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.era
}

// configure takes the keyrings of a revision, and what selectors ask for.
func (st *state) configure(revision int64, specs []keyringSpec, asked terms) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.specs, st.terms, st.configured = specs, asked, revision
	st.notify(true)
}

// ready says whether there is anything to go by. The caller holds mu.
func (st *state) ready() bool { return st.loaded && st.configured > 0 }

// spec returns the Keyring resource of a name. The caller holds mu.
func (st *state) spec(name string) (keyringSpec, bool) {
	i := slices.IndexFunc(st.specs, func(k keyringSpec) bool { return k.name == name })
	if i < 0 {
		return keyringSpec{}, false
	}
	return st.specs[i], true
}

// current returns the record of a Keyring resource, nil when it has none yet or
// that of an earlier resource. The caller holds mu.
func (st *state) current(k keyringSpec) *stored {
	found := st.records[k.name]
	if found == nil || found.record != nil && found.UID != k.uid {
		return nil
	}
	return found
}

// behind says whether the configuration is older than a record's, so that it
// can't tell whether the keyring exists. The caller holds mu.
func (st *state) behind() bool {
	for _, found := range st.records {
		if found.record != nil && found.Revision > st.configured {
			return true
		}
	}
	return false
}

// fleet returns the live edges that a keyring selects, whose record is of a revision,
// 0 for one that is not written yet. The caller holds mu.
func (st *state) fleet(k keyringSpec, record string, revision int64, now time.Time, liveFor time.Duration) Fleet {
	watched := time.Since(st.since)
	// The current wall clock, counted back by the monotonic one: a clock that is
	// set does not make the fleet look known or unknown.
	fleet := Fleet{Since: now.Round(0).Add(-watched), Complete: st.complete(liveFor), Behind: revision == 0 || !st.ledger.seen(revision)}
	for edge, c := range st.ledger.covers {
		held := c.held(edge, k.name, record)
		switch {
		case c.Terms != "" && c.Terms != st.terms.id:
			// Its replica has yet to tell which of the present selectors select it.
			held.Unknown = true
		case !k.selects(c.Labels):
			continue
		}
		fleet.Edges = append(fleet.Edges, held)
	}
	slices.SortFunc(fleet.Edges, func(a, b Held) int { return strings.Compare(a.Edge, b.Edge) })
	return fleet
}

// leader is the name of the replica that rotates, "" when there is none.
func (st *state) leader() string {
	st.mu.Lock()
	defer st.mu.Unlock()
	var found candidate
	for _, candidate := range st.offices {
		if found.created == 0 || candidate.created < found.created {
			found = candidate
		}
	}
	return found.name
}

// take enters a key of etcd, or removes it. It says whether edges are concerned, and
// which streams of this replica another's have superseded. The caller holds mu; read is
// what parse made of the event.
func (st *state) take(k keys, event *clientv3.Event, read parsed) (sets bool, superseded []stream) {
	removed := event.Type == mvccpb.Event_DELETE
	if name, ok := nameOf(event.Kv.Key, k.records()); ok {
		if removed {
			delete(st.records, name)
		} else {
			st.records[name] = read.stored
		}
		st.newest = max(st.newest, event.Kv.ModRevision)
		return true, nil
	}
	if name, ok := nameOf(event.Kv.Key, k.covers()); ok {
		switch {
		case removed:
			st.ledger.drop(name)
		case read.news != nil:
			superseded = st.ledger.take(*read.news, event.Kv.ModRevision)
		}
	}
	if id, ok := nameOf(event.Kv.Key, k.leaders()); ok {
		if removed {
			delete(st.offices, id)
		} else {
			st.offices[id] = candidate{name: string(event.Kv.Value), created: event.Kv.CreateRevision}
		}
	}
	return false, superseded
}
