package tickets

import (
	"crypto/tls"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
)

// The keyring and policy of TestControlPlaneAway. They are the shortest that are
// allowed, so that the test can wait for all that is to happen.
const (
	shortKeyring = "rotationInterval: 1m, maxActiveAge: 1m, retireAfter: 20s"
	shortPolicy  = "---\napiVersion: reseal/v1\nkind: TLSPolicy\nmetadata: {name: short}\nspec: {resumption: {ticketLifetime: 20s}}\n"
)

// outage is a control plane that is away.
type outage struct {
	*fleet
	addresses []string
	epoch     uint64 // that was active last

	// What clients without a ticket got in their first handshake.
	issued, unissued int64
}

// TestControlPlaneAway: when no new key comes for maxActiveAge, edges stop
// issuing tickets. Those that clients have are good until retireAfter. No
// connection fails, and the counters say why handshakes are full.
func TestControlPlaneAway(t *testing.T) {
	t.Parallel()
	o := &outage{fleet: newFleet(t, 2)}
	o.apply(o.manifest("  tlsPolicy: short\n") + shortPolicy + keyringManifest(shortKeyring))
	for _, n := range o.edges {
		o.addresses = append(o.addresses, o.at(n))
	}
	o.covered(1)
	// On a slow machine much of its time is over, and a rotation may be near.
	if status := o.keyring(); time.Since(status.Epoch(status.Active()).ActivatedAt) > 20*time.Second {
		o.renew()
	}
	o.epoch = o.keyring().Active()
	o.Control.Kill()

	holders := o.untilStale()
	o.whileHeld(holders)
	o.afterErased(holders)

	o.Control.Start()
	o.counted()
	if !harness.Long() {
		// For 30 s a control plane that was away waits for edges that are late.
		t.Log("without RESEAL_LONG the test does not wait until tickets are issued again")
		return
	}
	o.issuedAgain()
}

// counted compares the edges' counters with what clients saw.
func (o *outage) counted() {
	o.t.Helper()
	var failed, notOffered, stale int64
	for _, n := range o.edges {
		s := o.stats(n)
		failed += s.Handshakes.Failed
		notOffered += s.Misses["not_offered"]
		stale += s.Misses["stale_keyring"]
		for reason, count := range s.Misses {
			switch reason {
			case "not_offered", "stale_keyring", "expired", "key_retired":
			default:
				o.t.Errorf("%s counts %d misses for %s", n.ID, count, reason)
			}
		}
		if s.Misses["key_retired"] == 0 {
			o.t.Errorf("%s counts no miss for key_retired: %v", n.ID, s.Misses)
		}
	}
	if failed != 0 || notOffered != o.issued || stale != o.unissued || stale == 0 {
		o.t.Errorf("stats: %d failed, %d not offered, %d because of the stale keyring; clients came %d times and got a ticket, %d times and got none",
			failed, notOffered, stale, o.issued, o.unissued)
	}
	o.t.Logf("first handshakes: %d with a ticket, %d without", o.issued, o.unissued)
}

// issuedAgain waits for the next epoch.
func (o *outage) issuedAgain() {
	o.t.Helper()
	o.covered(o.epoch + 1)
	for i := range o.edges {
		for _, c := range o.fresh(i) {
			if c.tickets == 0 || c.epoch() <= o.epoch {
				o.t.Errorf("%s issues no tickets of a new epoch", o.edges[i].ID)
				continue
			}
			if !o.visit(c, 1-i) {
				o.t.Errorf("%s declines a new ticket of %s", o.edges[1-i].ID, o.edges[i].ID)
			}
		}
	}
}

// visit takes a client to an edge and reports whether it was resumed.
func (o *outage) visit(c *client, edge int) bool {
	o.t.Helper()
	state, err := c.visit(o.t.Context(), o.addresses[edge])
	if err != nil {
		o.t.Fatalf("%s: %v", o.edges[edge].ID, err)
	}
	return state.DidResume
}

// fresh are clients that made their first handshake, with an edge.
func (o *outage) fresh(edge int) []*client {
	o.t.Helper()
	var clients []*client
	for _, version := range bothVersions {
		c := newClient(o.Site, version, &counts{})
		if o.visit(c, edge) {
			o.t.Error("resumed without a ticket")
		}
		if c.tickets > 0 {
			o.issued++
		} else {
			o.unissued++
		}
		clients = append(clients, c)
	}
	return clients
}

// untilStale lets clients come until both edges say that they issue no tickets.
// It returns the last ones that got some.
func (o *outage) untilStale() (holders []*client) {
	o.t.Helper()
	o.await("the edges stop issuing tickets", func() bool {
		// All that is needed is there when the first of them stops.
		for _, n := range o.edges {
			if n.Metrics().Sum("reseal_keyring_stale", "keyring", "default") == 1 {
				return true
			}
		}
		clients := append(o.fresh(0), o.fresh(1)...)
		for i, c := range clients {
			// At the last moment there may be no ticket, or one of no epoch: an edge has
			// to give something when it has said that it would.
			if c.tickets == 0 || c.epoch() != o.epoch {
				return false
			}
			if !o.visit(c, 1-i/2) {
				o.t.Errorf("a ticket of %s is declined by the other edge", o.edges[i/2].ID)
			}
			if c.epoch() != o.epoch {
				return false
			}
		}
		holders = clients
		return false
	})
	if holders == nil {
		o.t.Fatal("no client got a ticket without a control plane")
	}
	o.await("all edges stop issuing tickets", func() bool {
		for _, n := range o.edges {
			if n.Metrics().Sum("reseal_keyring_stale", "keyring", "default") != 1 {
				return false
			}
		}
		return true
	})
	return holders
}

// whileHeld visits while the edges issue no tickets but still hold the key.
func (o *outage) whileHeld(holders []*client) {
	o.t.Helper()
	resumed, declined := 0, 0
	o.await("the edges erase the key", func() bool {
		for _, c := range holders {
			// A copy, so that all visits are made with the same ticket.
			again := newClient(o.Site, c.config.MaxVersion, &counts{})
			again.hold(c)
			for edge := range o.edges {
				if o.visit(again, edge) {
					resumed++
				} else {
					declined++
				}
				// TLS 1.2 has to answer with a ticket: it gives back the client's.
				if again.epoch() != o.epoch || again.tickets > 0 && c.config.MaxVersion == tls.VersionTLS13 {
					o.t.Errorf("%s issued a ticket of epoch %d", o.edges[edge].ID, again.epoch())
				}
			}
		}
		for edge := range o.edges {
			for _, c := range o.fresh(edge) {
				if c.tickets != 0 {
					o.t.Errorf("%s issues tickets", o.edges[edge].ID)
				}
			}
		}
		for _, n := range o.edges {
			if n.Metrics().Sum("reseal_keyring_epochs", "keyring", "default") != 0 {
				return false
			}
		}
		return true
	})
	// Each of them at least once on each edge.
	if resumed < len(holders)*len(o.edges) {
		o.t.Errorf("only %d resumed handshakes while the key was held, %d declined", resumed, declined)
	}
	o.t.Logf("after tickets were no longer issued: %d resumed, then %d full", resumed, declined)
}

// afterErased visits when the key is gone.
func (o *outage) afterErased(holders []*client) {
	o.t.Helper()
	for _, c := range holders {
		for edge := range o.edges {
			if o.visit(c, edge) {
				o.t.Errorf("%s resumed with a key that it says is erased", o.edges[edge].ID)
			}
		}
	}
}
