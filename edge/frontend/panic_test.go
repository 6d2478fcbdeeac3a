package frontend

import (
	"net"
	"sync/atomic"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// asksOnce sends a request, on a connection of its own.
func (e *edge) asksOnce() error {
	client := e.client(false)
	response, err := client.Get("https://app.test/")
	client.CloseIdleConnections()
	if err == nil {
		err = response.Body.Close()
	}
	return err
}

// TestPanicInACommit: nothing has changed then, and what was bound can be given up.
func TestPanicInACommit(t *testing.T) {
	e := newEdge(t, answering("ok"))
	counters := e.frontend.cfg.Counters
	e.frontend.cfg.Counters = func(name string) Counters {
		if name == "bad" {
			panic("a bug")
		}
		return counters(name)
	}
	before := e.frontend.Addr("main").String()
	main := e.listener("main", func(l *exchange.Listener) { l.Spec.Address = "127.0.0.1:" + freePort(t) })
	change, violations := e.frontend.Prepare([]exchange.Listener{main, e.listener("bad")})
	if len(violations) > 0 {
		t.Fatal(violations)
	}
	err := exchange.Guard("committing", func() error { change.Commit(); return nil })
	if err == nil {
		t.Fatal("it is committed")
	}
	change.Abort()
	if now := e.frontend.Addr("main").String(); now != before || e.frontend.Addr("bad") != nil {
		t.Errorf("%s before, %s now", before, now)
	}
	if err := e.asksOnce(); err != nil {
		t.Error(err)
	}
	e.apply(main) // whose address is free again
	if err := e.asksOnce(); err != nil {
		t.Error(err)
	}
}

// faulty are counters that panic once.
type faulty struct {
	Counters
	armed *atomic.Bool
}

func (f faulty) Add(at exchange.Cell, n int64) {
	if at == exchange.Opened.At() && f.armed.Swap(false) {
		panic("a bug")
	}
	f.Counters.Add(at, n)
}

// TestPanicAtAccept costs the connection, not its place, nor those that come after it.
func TestPanicAtAccept(t *testing.T) {
	e := newEdge(t, answering("ok"))
	var armed atomic.Bool
	counters := e.frontend.cfg.Counters
	e.frontend.cfg.Counters = func(name string) Counters { return faulty{counters(name), &armed} }
	e.apply(e.listener("main"), e.listener("one", func(l *exchange.Listener) { l.Spec.Limits = &resealv1.ListenerLimits{MaxConnections: 1} }))
	address := e.frontend.Addr("one").String()
	armed.Store(true)
	for range 3 {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the panic", func() bool { return !armed.Load() })
		_ = conn.Close()
	}
	eventually(t, "places are given back", func() bool { return e.frontend.slots["one"].gate.open.Load() == 0 })
	armed.Store(false)
}
