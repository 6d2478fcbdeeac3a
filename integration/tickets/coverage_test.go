package tickets

import (
	"maps"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
)

// TestLaggard: while one edge does not answer, the others encrypt with the epoch
// that it holds, which clients see in their tickets. That ends only at the
// deadline, with the edge named, and when it is back all is as before.
func TestLaggard(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3)
	// The deadline is half of rotationInterval.
	f.apply(f.manifest("") + keyringManifest("rotationInterval: 1m"))
	var addresses []string
	for _, n := range f.edges {
		addresses = append(addresses, f.at(n))
	}
	for _, test := range []struct {
		name       string
		away, back func(*node)
		serves     bool // clients, while it is away
	}{
		{"partitioned", func(n *node) { n.link.shut() }, func(n *node) { n.link.open() }, true},
		{"stopped", func(n *node) { n.Signal(syscall.SIGSTOP) }, func(n *node) { n.Signal(syscall.SIGCONT) }, false},
	} {
		l := &laggard{fleet: f, late: f.edges[2], serving: f.edges[:2], addresses: addresses}
		if test.serves {
			l.serving = f.edges
		}
		f.renew()
		t.Logf("%s is %s", l.late.ID, test.name)
		l.begin()
		back := sync.OnceFunc(func() { test.back(l.late) })
		defer back()
		test.away(l.late)
		l.rotate()
		if test.serves {
			l.apart()
		}
		back()
		l.together()
	}
}

// laggard is a test of one edge that is late.
type laggard struct {
	*fleet
	late      *node
	serving   []*node   // that clients can reach
	addresses []string  // of the edges
	clients   []*client // two for each edge, of either version
	counts    counts

	epoch    uint64    // that is prepared
	deadline time.Time // for its activation
	early    int       // tickets of epochs before, until the deadline
	unknown  int64     // tickets of the epoch that the late edge was shown
}

// begin gives each edge clients that have a ticket of it.
func (l *laggard) begin() {
	l.t.Helper()
	for i := range l.edges {
		for _, version := range bothVersions {
			c := newClient(l.Site, version, &l.counts)
			l.clients = append(l.clients, c)
			for range 2 {
				l.visit(c, i)
			}
		}
	}
	l.resumedAll(len(l.clients), len(l.clients))
}

// visit takes a client to an edge and reports whether it was resumed.
func (l *laggard) visit(c *client, edge int) bool {
	l.t.Helper()
	state, err := c.visit(l.t.Context(), l.addresses[edge])
	if err != nil {
		l.t.Fatalf("%s: %v", l.edges[edge].ID, err)
	}
	return state.DidResume
}

// round takes all clients to the edge of theirs, where it serves, and hands each
// epoch that it gave to look.
func (l *laggard) round(look func(edge int, epoch uint64)) {
	l.t.Helper()
	for i, c := range l.clients {
		if edge := i / len(bothVersions); slices.Contains(l.serving, l.edges[edge]) {
			l.visit(c, edge)
			look(edge, c.epoch())
		}
	}
}

func (l *laggard) resumedAll(first, resumed int) {
	l.t.Helper()
	if int(l.counts.first.Load()) != first || int(l.counts.resumed.Load()) < resumed || l.counts.missed.Load() != 0 {
		l.t.Errorf("%v; want %d first, at least %d resumed", &l.counts, first, resumed)
	}
}

// rotate prepares an epoch and looks at tickets until it is active.
func (l *laggard) rotate() {
	l.t.Helper()
	l.epoch = l.fleet.rotate()
	status := l.awaitKeyring("the late edge is named", func(k harness.KeyringStatus) bool {
		return k.Epoch(l.epoch).State != "prepared" || slices.Equal(k.Laggards, []string{l.late.ID})
	})
	if status.Epoch(l.epoch).State != "prepared" || status.ActivationDeadline.IsZero() {
		l.t.Fatalf("the epoch does not wait for %s: %+v", l.late.ID, status)
	}
	l.deadline = status.ActivationDeadline
	l.awaitKeyring("the epoch is active", func(k harness.KeyringStatus) bool {
		l.round(func(edge int, epoch uint64) {
			switch now := time.Now(); {
			case epoch < l.epoch && now.Before(l.deadline):
				l.early++
			case epoch >= l.epoch && now.Before(l.deadline):
				l.t.Errorf("%s gave a ticket of epoch %d %v before the deadline", l.edges[edge].ID, epoch, l.deadline.Sub(now))
			}
		})
		status = k
		return k.Epoch(l.epoch).State == "active"
	})
	if at := status.Epoch(l.epoch).ActivatedAt; at.Before(l.deadline) {
		l.t.Errorf("the epoch has been active since %v, before its deadline %v", at, l.deadline)
	}
	if !slices.Equal(status.Laggards, []string{l.late.ID}) {
		l.t.Errorf("the status names %v", status.Laggards)
	}
	if l.early < 4*len(l.serving) {
		l.t.Errorf("only %d tickets were seen before the deadline", l.early)
	}
	l.await("the others encrypt with the epoch", func() bool {
		done := true
		l.round(func(edge int, epoch uint64) {
			late := l.edges[edge] == l.late
			if late && epoch >= l.epoch {
				l.t.Errorf("%s gave a ticket of epoch %d, which it can't know", l.late.ID, epoch)
			}
			done = done && (late || epoch >= l.epoch)
		})
		return done
	})
	// All the time each client came back to its own edge.
	l.resumedAll(len(l.clients), l.early)
	l.t.Logf("%d tickets before the deadline", l.early)
}

// apart is what an edge that was left behind does: it still takes what it gave
// out. A ticket that it can't open costs a full handshake and nothing else.
func (l *laggard) apart() {
	l.t.Helper()
	for i, version := range bothVersions {
		c := newClient(l.Site, version, &counts{})
		c.hold(l.clients[i]) // of the first edge
		if l.visit(c, 2) {
			l.t.Errorf("%s resumed a ticket of an epoch that it can't know", l.late.ID)
		}
		l.unknown++
		other := newClient(l.Site, version, &counts{})
		other.hold(l.clients[2*len(bothVersions)+i])
		if !l.visit(other, 0) {
			l.t.Errorf("%s declined a ticket of %s", l.edges[0].ID, l.late.ID)
		}
	}
}

// together is when the edge is back: tickets of all edges are good on all edges.
func (l *laggard) together() {
	l.t.Helper()
	l.covered(l.epoch)
	l.counted()
	if status := l.keyring(); len(status.Laggards) > 0 && status.Newest() == l.epoch {
		l.t.Errorf("still late: %v", status.Laggards)
	}
	// Before its first new ticket: the late edge's clients bring old ones.
	for i, c := range l.clients {
		from := i / len(bothVersions)
		for edge := range l.edges {
			if !l.visit(c, edge) {
				l.t.Errorf("a client of %s is not resumed on %s", l.edges[from].ID, l.edges[edge].ID)
			}
		}
	}
}

// counted waits until the control plane knows what the late edge counted while it
// was away: resealctl says which edge lacked the keys of which epoch.
func (l *laggard) counted() {
	l.t.Helper()
	if l.unknown == 0 {
		return
	}
	var stats harness.Stats
	l.await("resealctl names the edge that did not know an epoch", func() bool {
		stats = l.ListenerStats("web")
		return stats.KeyUnknownByEdge[l.late.ID] >= l.unknown
	})
	if want := map[string]int64{l.late.ID: l.unknown}; !maps.Equal(stats.KeyUnknownByEdge, want) {
		l.t.Errorf("edges that did not know an epoch: %v, want %v", stats.KeyUnknownByEdge, want)
	}
	of := stats.Of("default", l.epoch)
	if of.Misses["key_unknown"] != l.unknown || len(of.Misses) != 1 || of.Resumed == 0 {
		l.t.Errorf("of epoch %d: %+v, want %d misses for key_unknown, and resumptions by the others", l.epoch, of, l.unknown)
	}
	// The epochs account for all tickets that were offered.
	var resumed, missed int64
	for _, e := range stats.Epochs {
		resumed += e.Resumed
		for _, n := range e.Misses {
			missed += n
		}
	}
	if resumed != stats.Resumed() || missed != stats.Missed()-stats.Misses["not_offered"] {
		l.t.Errorf("%+v don't add up to %d resumed and %v", stats.Epochs, stats.Resumed(), stats.Misses)
	}
}
