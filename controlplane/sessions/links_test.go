package sessions

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// enter makes a member of a zone that wants pools, without a stream.
func (w *world) enter(id, zone string, certificate []byte, pools ...string) *member {
	m := newMember(id, fleet.Detached())
	w.say(m, zone, certificate, true, pools...)
	return m
}

func (w *world) say(m *member, zone string, certificate []byte, first bool, pools ...string) {
	join := &resealv1.ExchangeJoin{BootId: "b", Certificate: certificate, Pools: pools}
	w.relay.join(m, map[string]string{"zone": zone}, join, first)
}

// read takes what is queued for all members.
func (w *world) read() {
	for _, m := range w.relay.members {
		m.queue = nil
	}
}

// work is how many pairs of members the relay compares in do, and how often it asks
// for the pools of labels.
func (w *world) work(do func()) (pairs, asked int) {
	pairs, asked = w.relay.compared, w.asked
	do()
	return w.relay.compared - pairs, w.asked - asked
}

// TestWorkFollowsWhatChanges: a round costs what has changed since the last, not
// the pairs of members.
func TestWorkFollowsWhatChanges(t *testing.T) {
	const members = 2000
	w := newWorld(t, nil)
	w.allow("west", "p", "r")
	var all []*member
	for i := range members {
		zone := []string{"", "west"}[i%2]
		all = append(all, w.enter(fmt.Sprintf("m%d", i), zone, []byte("c"), "p", "q", "r"))
		if i%100 == 0 {
			w.read()
		}
	}
	w.relay.entitleAll()
	for _, test := range []struct {
		name         string
		do           func()
		pairs, asked int // at most
	}{
		{"nothing", w.relay.entitleAll, 0, 0},
		{"a join that says the same again", func() { w.say(all[0], "", []byte("c"), false, "q", "r", "p"); w.relay.entitleAll() }, 0, 1},
		{"a revision that changes no pool", func() { w.allow("elsewhere", "p"); w.relay.entitleAll() }, 0, 2},
		{"another certificate", func() { w.say(all[0], "", []byte("d"), false, "p", "q", "r"); w.relay.entitleAll() }, members, 1},
		{"a pool of one member", func() { w.say(all[0], "", []byte("d"), false, "p", "r"); w.relay.entitleAll() }, members, 1},
		// Those who had no room for more have room for one, and look for it once.
		{"a member that leaves", func() { w.relay.leave(all[1]); w.relay.entitleAll() }, maxLinks * members / 4, 0},
	} {
		if pairs, asked := w.work(test.do); pairs > test.pairs || asked > test.asked {
			t.Errorf("%s: %d pairs were compared and the pools asked for %d times", test.name, pairs, asked)
		}
		w.read()
		if pairs, asked := w.work(w.relay.entitleAll); pairs > 0 || asked > 0 {
			t.Errorf("%s: the round after compares %d pairs and asks for pools %d times", test.name, pairs, asked)
		}
	}
	// What changes for all is done once for each two.
	w.allow("", "p", "q", "r")
	w.allow("west", "p", "q", "r")
	if pairs, asked := w.work(w.relay.entitleAll); pairs > members*(members-1)/2 || asked > 2 {
		t.Errorf("a new pool for all: %d pairs were compared and the pools asked for %d times", pairs, asked)
	}
}

// TestLinksAreRight: whatever happens in whatever order, members with pools in
// common know of each other, and of these pools, but where one knows of maxLinks.
func TestLinksAreRight(t *testing.T) {
	for _, size := range []int{12, maxLinks + 40} {
		w := newWorld(t, nil)
		pools := []string{"p", "q", "r"}
		some := func() []string {
			return slices.DeleteFunc(slices.Clone(pools), func(string) bool { return rand.N(3) == 0 })
		}
		zones := []string{"", "east", "west"}
		members := map[string]*member{}
		for round := range 12 {
			for range size/4 + 1 {
				id := fmt.Sprintf("m%d", rand.N(size))
				zone, certificate := zones[rand.N(len(zones))], []byte{byte(rand.N(2))}
				switch m := members[id]; {
				case m == nil || rand.N(4) == 0: // also by a second stream
					members[id] = w.enter(id, zone, certificate, some()...)
				case rand.N(3) == 0:
					w.relay.leave(m)
					delete(members, id)
				default:
					w.say(m, zone, certificate, false, some()...)
				}
			}
			if round%3 == 0 {
				w.allow(zones[rand.N(len(zones))], some()...)
			}
			w.relay.entitleAll()
			if t.Failed() {
				return
			}
			w.checkLinks()
			w.read()
		}
	}
}

// checkLinks compares what members were told with what they should know.
func (w *world) checkLinks() {
	w.t.Helper()
	for _, a := range w.relay.members {
		if len(a.told) > maxLinks {
			w.t.Errorf("%s was told of %d", a.id, len(a.told))
		}
		for id := range a.told {
			if w.relay.members[id] == nil {
				w.t.Errorf("%s was told of %s, which is gone", a.id, id)
			}
		}
		for _, b := range w.relay.members {
			var shared []string
			for _, pool := range a.wanted {
				zoneOf := func(m *member) []string { return w.zones[m.labels["zone"]] }
				if slices.Contains(zoneOf(a), pool) && slices.Contains(zoneOf(b), pool) && slices.Contains(b.wanted, pool) {
					shared = append(shared, pool)
				}
			}
			version, linked := a.told[b.id]
			_, back := b.told[a.id]
			switch {
			case a == b || len(shared) == 0:
				if linked {
					w.t.Errorf("%s was told of %s", a.id, b.id)
				}
			case linked != back || !linked && !a.full() && !b.full():
				w.t.Errorf("%s and %s share %v, told: %t and %t", a.id, b.id, shared, linked, back)
			case linked && version != b.versionFor(shared):
				w.t.Errorf("%s was told of an earlier %s", a.id, b.id)
			}
		}
	}
}

func BenchmarkEntitleAll(b *testing.B) {
	for _, changed := range []bool{false, true} {
		b.Run(fmt.Sprintf("changed=%t", changed), func(b *testing.B) {
			w := newWorld(b, nil)
			w.allow("", "p0", "p1", "p2", "p3")
			for i := range 2000 {
				w.enter(fmt.Sprintf("m%d", i), "", []byte("c"), "p0", "p1", "p2", "p3")
				w.read()
			}
			pools := []string{"p0", "p1", "p2", "p3"}
			for i := 0; b.Loop(); i++ {
				if changed {
					w.allow("", pools[:3+i%2]...)
				}
				w.relay.entitleAll()
				w.read()
			}
		})
	}
}
