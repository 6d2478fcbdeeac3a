package frontend

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"maps"
	"testing"
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
