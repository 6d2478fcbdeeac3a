package feed

import (
	"maps"
	"sync"
	"testing"
	"testing/synctest"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// shares is what Config.Shares was called with.
type shares struct {
	mu   sync.Mutex
	told []map[string]int
}

func (s *shares) take(told map[string]int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = append(s.told, told)
}

func (s *shares) want(t *testing.T, calls int, newest map[string]int) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.told) != calls || calls > 0 && !maps.Equal(s.told[calls-1], newest) {
		t.Errorf("told %v, want %v last of %d", s.told, newest, calls)
	}
}

func sharesMessage(pool string, n uint32) *resealv1.SyncResponse {
	return &resealv1.SyncResponse{Message: &resealv1.SyncResponse_ConnectionShares{ConnectionShares: &resealv1.ConnectionShares{
		Pools: []*resealv1.ConnectionShare{{Pool: pool, Connections: n}},
	}}}
}

// Shares outlast the process: one that starts without a control plane goes by them.
func TestSharesAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := &memory{}
		var first shares
		h := run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
			for _, n := range []uint32{7, 5, 5} {
				if err := stream.Send(sharesMessage("app", n)); err != nil {
					return err
				}
			}
			_, _ = send(stream, full(1, encoded(t, "app", "a:1")))
			return hold(stream)
		}, func(c *Config) { c.Shares = first.take })
		settle(0)
		first.want(t, 2, map[string]int{"app": 5})
		if h.Revision() != 1 {
			t.Errorf("the update after them was not taken: revision %d", h.Revision())
		}
		h.stop()

		var second shares
		again := New(Config{State: state.crashed(), Shares: second.take})
		again.RecallShares()
		second.want(t, 1, map[string]int{"app": 5})

		var third shares
		damaged := &memory{}
		damaged.put(sharesName, []byte{0xff})
		broken := New(Config{State: damaged, Shares: third.take, Logger: h.Feed.config.Logger})
		broken.RecallShares()
		third.want(t, 0, nil)
	})
}
