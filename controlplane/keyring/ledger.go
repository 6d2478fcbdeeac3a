package keyring

import (
	"strconv"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// ledger is what all replicas tell of their edges, and what follows from it. It is
// guarded by the state's mu.
type ledger struct {
	self     string // this replica's id
	replicas map[string]*digest
	covers   map[string]*cover // of each live edge, what its newest stream has acked
}

// digest is what one replica tells.
type digest struct {
	head  head
	known bool // the head
	parts [parts]map[string]entered
}

// entered is what is told of an edge, and the revision of etcd at which its stream
// was told of first, as far as this replica knows.
type entered struct {
	told
	since int64
}

func newLedger(self string) *ledger {
	return &ledger{self: self, replicas: map[string]*digest{}, covers: map[string]*cover{}}
}

// news is a key of a digest, read.
type news struct {
	replica string
	part    int // -1: the head
	head    head
	told    []told
}

// readNews reads a key below the digests' prefix. ok is false when it is none.
func readNews(name string, value []byte) (n news, ok bool, err error) {
	replica, number, isPart := strings.Cut(name, "/")
	n = news{replica: replica, part: -1}
	if !isPart {
		n.head, ok = readHead(value)
		return n, ok, nil
	}
	if n.part, err = strconv.Atoi(number); err != nil || n.part < 0 || n.part >= parts {
		return n, false, nil
	}
	n.told, err = readPart(value)
	return n, err == nil, err
}

// take enters news of a revision. It returns the streams of this replica that
// another's have superseded.
func (l *ledger) take(n news, revision int64) (superseded []stream) {
	d := l.digest(n.replica)
	if n.part < 0 {
		d.head, d.known = n.head, true
		return nil
	}
	before := d.parts[n.part]
	now := make(map[string]entered, len(n.told))
	for _, t := range n.told {
		since := revision
		if old, ok := before[t.edge]; ok && old.stream == t.stream {
			since = old.since
		}
		now[t.edge] = entered{t, since}
	}
	d.parts[n.part] = now
	for edge := range now {
		if own, lost := l.settle(edge, n.part); lost {
			superseded = append(superseded, own)
		}
	}
	for edge := range before {
		if _, stays := now[edge]; !stays {
			l.settle(edge, n.part)
		}
	}
	return superseded
}

// drop forgets a key that is gone.
func (l *ledger) drop(name string) {
	replica, number, isPart := strings.Cut(name, "/")
	d := l.replicas[replica]
	if d == nil {
		return
	}
	if !isPart {
		d.known = false
	} else if i, err := strconv.Atoi(number); err == nil && i >= 0 && i < parts {
		before := d.parts[i]
		d.parts[i] = nil
		for edge := range before {
			l.settle(edge, i)
		}
	}
	if !d.known && d.empty() {
		delete(l.replicas, replica)
	}
}

func (d *digest) empty() bool {
	for _, p := range d.parts {
		if len(p) > 0 {
			return false
		}
	}
	return true
}

// settle finds out which stream of an edge counts: the newest of those that live. lost
// says that this replica's own does, but is not it.
func (l *ledger) settle(edge string, number int) (own stream, lost bool) {
	var best entered
	var of string
	for replica, d := range l.replicas {
		e, ok := d.parts[number][edge]
		if ok && (best.cover == nil || best.left && !e.left || best.left == e.left && e.since > best.since) {
			best, of = e, replica
		}
	}
	if best.cover == nil {
		delete(l.covers, edge)
		return own, false
	}
	l.covers[edge] = best.cover
	if of == l.self || l.replicas[l.self] == nil {
		return own, false
	}
	e, ok := l.replicas[l.self].parts[number][edge]
	return e.stream, ok && !e.left
}

// replace replaces all by the news among events. Of what was known only when streams
// began counts on.
func (l *ledger) replace(all []parsed, events []*clientv3.Event) (superseded []stream) {
	before := l.replicas
	l.replicas, l.covers = map[string]*digest{}, map[string]*cover{}
	for i, read := range all {
		n := read.news
		if n == nil {
			continue
		}
		if old := before[n.replica]; old != nil && n.part >= 0 {
			l.digest(n.replica).parts[n.part] = old.parts[n.part]
		}
		superseded = append(superseded, l.take(*n, events[i].Kv.ModRevision)...)
	}
	return superseded
}

func (l *ledger) digest(replica string) *digest {
	d := l.replicas[replica]
	if d == nil {
		d = &digest{}
		l.replicas[replica] = d
	}
	return d
}

// seen says whether all replicas that serve edges know of a revision.
func (l *ledger) seen(revision int64) bool {
	for _, d := range l.replicas {
		if !d.head.Ended && (!d.known || d.head.Seen < revision) {
			return false
		}
	}
	return true
}

// complete says whether a replica of this cluster knew all live edges.
func (l *ledger) complete(cluster uint64) bool {
	for _, d := range l.replicas {
		if d.known && d.head.Complete && d.head.Cluster == cluster {
			return true
		}
	}
	return false
}

// ended says that this replica is said to serve nobody.
func (l *ledger) ended() bool {
	d := l.replicas[l.self]
	return d != nil && d.known && d.head.Ended
}
