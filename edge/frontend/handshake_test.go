package frontend

import (
	"crypto/tls"
	"sync"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestHandshakesWait: with one handshake at a time the others wait, are counted,
// and are made in the end; clients that are connected don't notice.
func TestHandshakesWait(t *testing.T) {
	held, release := make(chan struct{}, 100), make(chan struct{})
	var hold sync.Once
	e := newEdge(t, answering("ok"), func(l *exchange.Listener) {
		l.Spec.Limits = &resealv1.ListenerLimits{MaxHandshakes: 1}
		l.TLS.VerifyConnection = func(state tls.ConnectionState) error {
			if state.ServerName == "slow.wild.test" {
				hold.Do(func() {
					held <- struct{}{}
					<-release // it computes
				})
			}
			return nil
		}
	})
	c := e.count("main")
	connected := e.dial()
	ask(t, connected) // or the server's half might wait, too
	const others = 20
	var dialing sync.WaitGroup
	dial := func(name string) {
		dialing.Go(func() {
			conn, err := tls.Dial("tcp", e.address("main"), &tls.Config{RootCAs: e.roots, ServerName: name, NextProtos: []string{"http/1.1"}})
			if err != nil {
				t.Error(err)
				return
			}
			conn.Close()
		})
	}
	dial("slow.wild.test")
	<-held
	for range others {
		dial("app.test")
	}
	waiting := func(n int64) func() bool {
		return func() bool { return read(c, func(c *counts) bool { return c.cells[exchange.HandshakesWaiting] == n }) }
	}
	eventually(t, "the others wait", waiting(others))
	if got := ask(t, connected); got != 200 {
		t.Errorf("one that is connected is answered %d", got)
	}
	close(release)
	dialing.Wait()
	eventually(t, "nobody waits", waiting(0))
	if waited := read(c, func(c *counts) int64 { return c.cells[exchange.HandshakesWaited] }); waited != others {
		t.Errorf("%d have waited, want %d", waited, others)
	}
}

// TestHandshakesLimitChanges applies another limit while handshakes are made.
func TestHandshakesLimitChanges(t *testing.T) {
	e := newEdge(t, answering("ok"))
	var dialing sync.WaitGroup
	for range 4 {
		dialing.Go(func() {
			for range 20 {
				e.visit()
			}
		})
	}
	for i := range uint32(50) {
		e.apply(e.listener("main", func(l *exchange.Listener) { l.Spec.Limits = &resealv1.ListenerLimits{MaxHandshakes: 1 + i%3} }))
	}
	dialing.Wait()
	if waiting := read(e.count("main"), func(c *counts) int64 { return c.cells[exchange.HandshakesWaiting] }); waiting != 0 {
		t.Errorf("%d still wait", waiting)
	}
}
