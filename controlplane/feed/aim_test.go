package feed

import (
	"testing"
	"testing/synctest"
)

func aimed(c *Config) { c.Aimed = true }

// An edge whose base is not kept any more keeps what it has; once the change goes to all
// edges, it gets that.
func TestBaseIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, state := base(), newDisk()
		first := startPlane(t, s)
		n := first.node("e1", nil, state)
		settle(0)
		n.stop()
		first.stop()
		s.apply(many(pool("app", "a:2")))
		s.history = s.history[len(s.history)-1:]

		p := startPlane(t, s, aimed)
		settle(0)
		p.server.Aim(t.Context(), 1, 2, func(id string, _ map[string]string) bool { return id == "another" })
		n = p.node("e1", nil, state)
		settle(0)
		if got := p.updates(); got != "0 0 0" {
			t.Errorf("updates full, delta, empty: %s", got)
		}
		p.server.Aim(t.Context(), 2, 2, nil)
		settle(0)
		if got := p.updates(); got != "1 0 0" || n.newest().Revision() != 2 {
			t.Errorf("updates full, delta, empty: %s; serves %d", got, n.newest().Revision())
		}
	})
}
