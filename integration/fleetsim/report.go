package fleetsim

import (
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// counted are the counters of an edge that has served for a while, in this many
// pools and listeners.
func (s Size) counted() (pools, listeners []*resealv1.Stats) {
	for i := range s.Pools {
		pools = append(pools, stats(poolName(i), uint64(i), map[string]uint64{"no_session": 1, "expired": 12, "declined": 2}))
	}
	for i := range s.Listeners {
		listener := stats(listenerName(i), uint64(i), map[string]uint64{"not_offered": 9000, "expired": 20})
		for epoch := range uint64(4) {
			listener.Epochs = append(listener.Epochs, &resealv1.EpochStats{
				Keyring: resealv1.DefaultKeyring, Epoch: epoch + 1, Resumed: 1000 * epoch, Misses: map[string]uint64{"expired": 5},
			})
		}
		listeners = append(listeners, listener)
	}
	return pools, listeners
}

// servedRequests are those of the first pool.
const servedRequests = 1_000_000

func stats(name string, more uint64, misses map[string]uint64) *resealv1.Stats {
	return &resealv1.Stats{
		Name:       name,
		Requests:   servedRequests + more,
		Errors:     map[string]uint64{"connect": 3, "timeout": 7},
		Handshakes: &resealv1.Handshakes{Full: 15, ResumedSessionId: 300, ResumedTicket: 4000, ResumedPsk: 20_000, Failed: 3},
		Misses:     misses,
		Connections: &resealv1.ConnectionStats{
			Opened: 24_315, Reused: 975_000, Active: 4, Idle: 12,
		},
		Closes:   map[string]uint64{"close_notify_both": 24_000, "reset_by_peer": 11},
		ClosesBy: map[string]uint64{"us": 20_000, "peer": 4011},
	}
}
