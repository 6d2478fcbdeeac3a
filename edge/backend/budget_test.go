package backend

import (
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func perFleet(n uint32) option {
	return connections(func(c *resealv1.Connections) { c.MaxPerFleet = &n })
}

func (x *bench) told(share int) { x.b.Share(map[string]int{"p": share}) }

func (x *bench) wantShare(want int) {
	x.t.Helper()
	if got := x.tally.get(func(c *tally) int { return c.share }); got != want {
		x.t.Errorf("the share is shown as %d, want %d", got, want)
	}
}

// held makes n idle connections.
func (x *bench) held(s *server, n int) {
	x.t.Helper()
	wantNone(x.t, x.parallel(n, "/"))
	eventually(x.t, "all connections are idle", func() bool { return s.open.Load() == int64(n) && x.usedNow() == 0 })
}

func (x *bench) usedNow() int { return x.tally.get(func(c *tally) int { return c.active }) }

func TestShare(t *testing.T) {
	s := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { time.Sleep(time.Millisecond) }))
	x := newBench(t, []string{s.addr})
	x.told(3)
	x.wantShare(0)
	x.set(perFleet(10))
	x.wantShare(3)
	wantNone(t, x.parallel(40, "/"))
	if n := s.maxOpen.Load(); n > 3 {
		t.Errorf("%d connections at once with a share of 3", n)
	}
	// The smaller bound holds.
	x.set(connections(func(c *resealv1.Connections) { c.MaxPerEndpoint = 2 }))
	eventually(t, "maxPerEndpoint holds", func() bool { return s.open.Load() <= 2 })
	s.maxOpen.Store(0)
	wantNone(t, x.parallel(40, "/"))
	if n := s.maxOpen.Load(); n > 2 {
		t.Errorf("%d connections at once with maxPerEndpoint 2", n)
	}
	x.set(connections(func(c *resealv1.Connections) { c.MaxPerFleet = nil }))
	x.wantShare(0)
}

// A pool that is new has one connection until it is told more; one that served without
// a limit goes on with all of it.
func TestShareUntold(t *testing.T) {
	s := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { time.Sleep(time.Millisecond) }))
	x := newBench(t, []string{s.addr})
	x.set(perFleet(7))
	x.wantShare(7)
	wantNone(t, x.parallel(40, "/"))
	if n := s.maxOpen.Load(); n > 7 {
		t.Errorf("%d connections at once", n)
	}
	x.told(2)
	x.wantShare(2)
	x.b.Share(nil) // says nothing of this pool
	x.set(retries(0))
	x.wantShare(2)
	x.apply("another") // takes the place of the pool
	x.wantShare(1)
	eventually(t, "the old pool's connections end", func() bool { return s.open.Load() == 0 })
	s.maxOpen.Store(0)
	wantNone(t, x.parallel(10, "/"))
	if n := s.maxOpen.Load(); n != 1 {
		t.Errorf("%d connections at once", n)
	}
}

// What is idle beyond a share is closed in order, and no more than that.
func TestShareFalls(t *testing.T) {
	s := serve(t, gate(8))
	x := newBench(t, []string{s.addr}, perFleet(8))
	x.told(8)
	x.held(s, 8)
	x.told(5)
	x.told(4)
	x.told(3)
	eventually(t, "idle connections end", func() bool { return s.open.Load() == 3 })
	time.Sleep(50 * time.Millisecond)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open.Load() != 3 || s.ends["close_notify"] != 5 {
		t.Errorf("%d connections are left; the others ended: %v", s.open.Load(), s.ends)
	}
}

// Connections in use are closed when their requests end, as many as are too many.
func TestShareFallsInUse(t *testing.T) {
	release := make(chan struct{})
	var in atomic.Int64
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		in.Add(1)
		<-release
		io.WriteString(w, "ok")
	}))
	x := newBench(t, []string{s.addr}, perFleet(8))
	x.told(8)
	done := make(chan []error)
	go func() { done <- x.parallel(8, "/") }()
	eventually(t, "all are in use", func() bool { return in.Load() == 8 })
	x.told(5)
	if n := s.open.Load(); n != 8 {
		t.Errorf("%d connections while all are in use", n)
	}
	close(release)
	wantNone(t, <-done)
	eventually(t, "connections end", func() bool { return s.open.Load() <= 5 })
	time.Sleep(50 * time.Millisecond)
	if n := s.open.Load(); n != 5 {
		t.Errorf("%d connections are left, want 5", n)
	}
}

// Whoever waits gets what a share has more at once.
func TestShareRises(t *testing.T) {
	s := serve(t, gate(3))
	x := newBench(t, []string{s.addr}, perFleet(8))
	x.told(1)
	done := make(chan []error)
	go func() { done <- x.parallel(3, "/") }()
	eventually(t, "two wait", func() bool { return x.waiting() == 2 })
	if n := s.opened.Load(); n != 1 {
		t.Errorf("%d connections with a share of 1", n)
	}
	x.told(3)
	wantNone(t, <-done)
	if n := s.maxOpen.Load(); n != 3 {
		t.Errorf("%d connections at once", n)
	}
}

func (x *bench) waiting() int {
	n := 0
	for _, e := range x.current("p").state.Load().endpoints {
		e.mu.Lock()
		n += e.waiting
		e.mu.Unlock()
	}
	return n
}

// HTTP/2 connections that are never idle end as well: their requests do, and others
// come on those that are left.
func TestShareFallsWithHTTP2(t *testing.T) {
	var in atomic.Int64
	s := serveH2(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		in.Add(1)
		time.Sleep(2 * time.Millisecond)
		io.WriteString(w, "ok")
	}), func(h *http.Server) { h.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 2} })
	x := newBench(t, []string{s.addr}, perFleet(4))
	x.told(4)
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range 16 {
		clients.Go(func() {
			call := newCall()
			call.Client = uint64(i)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, _, err := x.try(newRequest(t, "GET", "/", nil), call); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	open := func() int { return x.b.Usage("p").Open[s.addr] }
	eventually(t, "there are four connections", func() bool { return open() == 4 })
	x.told(1)
	eventually(t, "there is one connection", func() bool { return open() == 1 })
	before := in.Load()
	eventually(t, "requests go on", func() bool { return in.Load() > before+100 })
	if n := open(); n != 1 {
		t.Errorf("%d connections", n)
	}
	close(stop)
	clients.Wait()
}

// A place that is given back when its connection has gone leaves no trace.
func TestPlaceOfAConnectionThatIsGone(t *testing.T) {
	s := serveH2(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	x := newBench(t, []string{s.addr})
	e := x.current("p").state.Load().endpoints[s.addr]
	got, l := make(chan grant, 1), x.Loops.Next()
	l.Post(func() {
		if g, now := e.acquire(connKey{serverName: testName}, &waiter{call: newCall(), loop: l, by: claim(got)}); now {
			got <- g
		}
	})
	g := <-got
	if g.err != nil {
		t.Fatal(g.err)
	}
	g.on.Kill()
	eventually(t, "the connection is gone", func() bool { return x.b.Usage("p").Open[s.addr] == 0 })
	dropped := make(chan struct{})
	l.Post(func() { g.drop(); close(dropped) })
	<-dropped
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.parting != 0 {
		t.Errorf("%d connections are on their way out, and none is open", e.parting)
	}
}
