package feed

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// An edge that knows more than this replica waits a moment for it to learn.
func TestReplicaBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ahead, behind, state := base(), base(), newDisk()
		ahead.apply(many(pool("app", "a:2")))
		n := startPlane(t, ahead).node("e1", nil, state)
		settle(0)
		n.stop()
		p := startPlane(t, behind)
		n = p.node("e1", nil, state)
		settle(time.Second)
		if got := p.updates(); got != "0 0 0" {
			t.Errorf("updates full, delta, empty: %s", got)
		}
		behind.apply(many(pool("app", "a:2")))
		settle(0)
		if got := p.updates(); got != "0 0 1" || n.newest().Revision() != 2 {
			t.Errorf("updates full, delta, empty: %s; serves %d", got, n.newest().Revision())
		}
	})
}

// After the store was restored the same revision is another configuration.
func TestRevisionsStartAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		n := p.node("e1", nil, newDisk())
		address := func() string {
			return n.newest().Get("BackendPool", "app").GetBackendPool().GetEndpoints()[0].GetAddress()
		}
		settle(0)
		for _, lost := range []string{"a:2", "a:3"} {
			s.apply(many(pool("app", lost)))
			settle(0)
		}
		s.restore(1)
		settle(0)
		if got := address(); got != "a:1" || p.edge("e1").GetAckedRevision() != 1 || p.edge("e1").GetState() != resealv1.Edge_STATE_SYNCED {
			t.Errorf("after the restore the edge serves %s, listed as %v", got, p.edge("e1"))
		}
		for _, address := range []string{"b:2", "b:3"} {
			s.apply(many(pool("app", address)))
			settle(0)
		}
		if got := address(); got != "b:3" || n.feed.Revision() != 3 {
			t.Errorf("the edge serves %s at revision %d", got, n.feed.Revision())
		}
		if got := p.updates(); got != "1 5 0" {
			t.Errorf("updates full, delta, empty: %s", got)
		}
	})
}

// Before there is a configuration an edge is welcome and hears nothing.
func TestBeforeTheFirstRevision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource()
		p := startPlane(t, s)
		n := p.node("e1", nil, newDisk())
		settle(5 * time.Second)
		if got := p.updates(); got != "0 0 0" || !n.feed.Connected() || p.edge("e1").GetId() != "e1" {
			t.Errorf("updates %s, connected %t", got, n.feed.Connected())
		}
		s.apply(many(listener("web", "", nil)))
		settle(0)
		if n.newest().Revision() != 1 {
			t.Error("the first revision did not arrive")
		}
	})
}

// A resource that can't be unsealed holds up the edges that need it, and no
// others.
func TestUnsealFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := base()
		p := startPlane(t, s)
		a := p.node("a", map[string]string{"site": "a"}, newDisk())
		b := p.node("b", nil, newDisk())
		settle(0)
		s.apply(many(listener("extra", "app", map[string]string{"site": "a"}, "broken"), certificate("broken", "damaged")))
		settle(time.Minute)
		if a.newest().Revision() != 1 || b.newest().Revision() != 2 {
			t.Errorf("a serves %d, b serves %d", a.newest().Revision(), b.newest().Revision())
		}
		s.apply(many(certificate("broken", "k2")))
		settle(time.Minute)
		if a.newest().Revision() != 3 || b.newest().Revision() != 3 {
			t.Errorf("after the repair a serves %d, b serves %d", a.newest().Revision(), b.newest().Revision())
		}
	})
}

// endingSource ends with ctx, as the store does when the control plane stops.
type endingSource struct{ ctx context.Context }

func (s endingSource) Next(context.Context, int64) (*resealv1.Snapshot, error) {
	<-s.ctx.Done()
	return nil, errors.New("it has stopped")
}

func (s endingSource) Snapshot() *resealv1.Snapshot { return newSource().Snapshot() }

func (s endingSource) At(context.Context, int64) (*resealv1.Snapshot, error) {
	return nil, errors.New("it has stopped")
}

// A source that ends because everything does is not a failure, whoever hears of
// the end first.
func TestEndsWithSource(t *testing.T) {
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		server := New(Config{Source: endingSource{ctx}, Logger: slog.New(slog.DiscardHandler)})
		ended := make(chan error, 1)
		go func() { ended <- server.Run(ctx) }()
		runtime.Gosched()
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
}
