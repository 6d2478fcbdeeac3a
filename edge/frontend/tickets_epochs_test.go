package frontend

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// TestTicketsByEpoch: each offered ticket is counted by the epoch that sealed it.
func TestTicketsByEpoch(t *testing.T) {
	for _, version := range bothVersions {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			keys := newKeys(t, ring("default", epoch(1, epochActive)))
			e := newSharedEdge(t, keys)
			cache := &oneCache{}
			visit := func() {
				t.Helper()
				e.visit(withCache(cache), withVersion(version))
			}
			// renumber makes the client's ticket one of another epoch.
			renumber := func(number uint64) {
				t.Helper()
				ticket, state, err := cache.session.ResumptionState()
				if err != nil {
					t.Fatal(err)
				}
				binary.BigEndian.PutUint64(ticket, number)
				cache.session = must[*tls.ClientSessionState](t)(tls.NewResumptionState(ticket, state))
			}
			rotate := func(active uint64) {
				t.Helper()
				keys.say(ring("default", epoch(active-1, epochRetired), epoch(active, epochActive)))
				eventually(t, "the new epoch encrypts", func() bool {
					ticket, ok := keys.Keys("", "main", "p").Wrap([]byte("state"), "")
					return ok && binary.BigEndian.Uint64(ticket) == active
				})
			}
			visit() // without a ticket
			visit()
			rotate(2)
			visit() // with a ticket of 1
			visit()
			renumber(5)
			visit() // of an epoch that this edge has not heard of
			renumber(1 << 40)
			visit() // of no keyring of ours
			rotate(9)
			visit() // of 2, which is erased
			want := map[string]int{
				"default/1 ": 2, "default/2 ": 1, "default/2 key_retired": 1,
				"default/5 key_unknown": 1, "default/0 key_unknown": 1,
			}
			var got map[string]int
			eventually(t, fmt.Sprint("tickets are counted as ", want), func() bool {
				got = read(e.count("main"), func(c *counts) map[string]int { return maps.Clone(c.tickets) })
				return maps.Equal(got, want)
			})
			if t.Failed() {
				t.Log(got)
			}
		})
	}
}

// Of several tickets that open, the last is resumed: crypto/tls asks for another
// only when it passed over those before.
func TestEpochOfTheTicketThatIsResumed(t *testing.T) {
	cert, _ := selfSigned(t, "app.test")
	keys := newKeys(t, ring("default", epoch(1, epochActive)))
	a := newAcceptor(keys.source, exchange.Listener{
		Name: "main", PolicyKey: "p", TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, TicketLifetime: time.Hour,
	})
	issue := func() []byte {
		cache := &oneCache{}
		a.connect(clientConfig("app.test", tls.VersionTLS13, cache))
		ticket, _, err := cache.session.ResumptionState()
		if err != nil {
			t.Fatal(err)
		}
		return ticket
	}
	old := issue()
	keys.say(ring("default", epoch(1, epochRetired), epoch(2, epochActive)))
	eventually(t, "the new epoch encrypts", func() bool { return binary.BigEndian.Uint64(issue()) == 2 })
	h := a.policy.handshake()
	h.cfg = &tls.Config{}
	for _, ticket := range [][]byte{old, issue(), []byte("damaged")} {
		if _, err := h.unwrap(ticket, tls.ConnectionState{ServerName: "app.test"}); err != nil {
			t.Fatal(err)
		}
	}
	if h.epoch != 2 {
		t.Errorf("counted for epoch %d, want 2", h.epoch)
	}
}
