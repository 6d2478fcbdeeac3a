package backend

import (
	"context"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// reuser is clients whose answers end when the test wants, and which are told
// the connection that they came by.
type reuser struct {
	*bench
	goOn   map[string]chan struct{} // by path of the answers that wait
	served map[uint64]bool          // clients that have sent a request
}

func reusers(t *testing.T, mode resealv1.Connections_Reuse, start func(testing.TB, http.Handler) *server) *reuser {
	x := &reuser{goOn: map[string]chan struct{}{"/1": make(chan struct{}), "/2": make(chan struct{})}, served: map[uint64]bool{}}
	s := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.RemoteAddr)
		if wait := x.goOn[r.URL.Path]; wait != nil {
			_ = http.NewResponseController(w).Flush()
			<-wait
		}
	}))
	x.bench = newBench(t, []string{s.addr}, connections(func(c *resealv1.Connections) { c.Reuse = mode }))
	return x
}

// begin sends a request of a client. end waits for the end of its answer.
func (x *reuser) begin(client uint64, path string) (end func() (connection string)) {
	x.t.Helper()
	call := newCall()
	call.Client, call.First = client, !x.served[client]
	x.served[client] = true
	resp, err := x.RoundTrip(newRequest(x.t, "GET", path, nil), call)
	if err != nil {
		x.t.Fatal(err)
	}
	return func() string {
		x.t.Helper()
		if wait := x.goOn[path]; wait != nil {
			close(wait)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			x.t.Error(err)
		}
		resp.Body.Close()
		return string(body)
	}
}

func (x *reuser) get(client uint64) string {
	x.t.Helper()
	return x.begin(client, "/")()
}

// With mode never, no other client may have a connection whose client is gone.
func TestNeverClosesConnectionsOfClientsThatLeft(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		x.set(connections(func(c *resealv1.Connections) { c.Reuse = resealv1.Connections_REUSE_NEVER }))
		leaves, stays := newCall(), newCall()
		gone := make(chan struct{})
		leaves.Client, leaves.First, leaves.Gone = 1, true, gone
		stays.Client, stays.First, stays.Gone = 2, true, make(chan struct{})
		for _, call := range []*exchange.Exchange{leaves, stays} {
			x.do(newRequest(t, "GET", "/bytes/10", nil), call)
		}
		open := func() int { return x.tally.get(func(c *tally) int { return c.opened - c.closed }) }
		if n := open(); n != 2 {
			t.Fatalf("%d connections for 2 clients", n)
		}
		close(gone)
		eventually(t, "the connection of the client that left is closed", func() bool { return open() == 1 })
		stays.First = false
		if x.do(newRequest(t, "GET", "/bytes/10", nil), stays); !stays.Reused {
			t.Error("the connection of the other client is closed, too")
		}
	})
}

// Only connections that were reused serve first requests, so a later request
// takes another one while there is one.
func TestAggressiveLeavesReusedConnectionsToFirstRequests(t *testing.T) {
	x := reusers(t, resealv1.Connections_REUSE_AGGRESSIVE, func(t testing.TB, h http.Handler) *server { return serve(t, h) })
	first := x.get(1)
	second := x.get(2)
	if first == second {
		t.Fatal("a first request went over a connection that had not been reused")
	}
	third := x.get(1) // either has served one
	other := first
	if third == first {
		other = second
	}
	if again := x.get(2); again != other {
		t.Errorf("went over %s, which was reused, and not over %s, which was not", again, other)
	}
}

// An HTTP/2 connection that has answered a request is proven; one that has yet
// to answer its first is not.
func TestAggressiveTrustsH2ConnectionsThatAnswered(t *testing.T) {
	x := reusers(t, resealv1.Connections_REUSE_AGGRESSIVE, func(t testing.TB, h http.Handler) *server { return serveH2(t, h) })
	held := x.begin(1, "/1")
	two := x.get(2)
	three := x.get(3)
	if one := held(); two == one || three != two {
		t.Errorf("clients went over %s, %s and %s, want two connections, the second of them twice", one, two, three)
	}
}

// A request without an answer proves nothing.
func TestAggressiveDistrustsH2ConnectionsThatFailed(t *testing.T) {
	hang := make(chan struct{})
	s := serveH2(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hang" {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		}
	}))
	defer close(hang)
	x := newBench(t, []string{s.addr}, connections(func(c *resealv1.Connections) { c.Reuse = resealv1.Connections_REUSE_AGGRESSIVE }))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	first := newCall()
	first.Client, first.First = 1, true
	if _, err := x.RoundTrip(newRequest(t, "GET", "/hang", nil).WithContext(ctx), first); err == nil {
		t.Fatal("an answer")
	}
	for i, want := range []bool{false, true} {
		call := newCall()
		call.Client, call.First = uint64(2+i), true
		x.do(newRequest(t, "GET", "/", nil), call)
		if call.Reused != want {
			t.Errorf("first request of client %d: over a used connection is %v", call.Client, call.Reused)
		}
	}
}

// A full endpoint gives up connections that none of those whom it keeps waiting
// may use.
func TestPrivateConnectionsMakeRoom(t *testing.T) {
	for _, mode := range []resealv1.Connections_Reuse{resealv1.Connections_REUSE_SAFE, resealv1.Connections_REUSE_NEVER} {
		t.Run(mode.String(), func(t *testing.T) {
			bothProtocols(t, func(t *testing.T, x *bench, s *server) {
				x.set(connections(func(c *resealv1.Connections) { c.Reuse, c.MaxPerEndpoint = mode, 2 }))
				for client := uint64(1); client <= 5; client++ {
					ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
					call := newCall()
					call.Client, call.First = client, true
					x.do(newRequest(t, "GET", "/bytes/10", nil).WithContext(ctx), call)
					cancel()
				}
				if n := s.maxOpen.Load(); n > 2 {
					t.Errorf("%d connections at once", n)
				}
			})
		})
	}
}

// In safe mode clients don't share an HTTP/2 connection at the same time.
func TestSafeReservesBusyH2Connections(t *testing.T) {
	x := reusers(t, resealv1.Connections_REUSE_SAFE, func(t testing.TB, h http.Handler) *server { return serveH2(t, h) })
	one := x.get(1)
	two := x.get(2)
	if one == two {
		t.Fatal("the first requests of two clients share a connection")
	}
	held := x.begin(1, "/1")
	again := x.begin(1, "/2")
	three := x.get(2)
	busy := held()
	if other := again(); other != busy {
		t.Error("two requests of a client at the same time went over two connections")
	}
	if three == busy {
		t.Error("a client used a connection with another client's request on it")
	}
	// Unused it is anybody's: only two connections ever.
	for client := uint64(1); client <= 2; client++ {
		if got := x.get(client); got != one && got != two {
			t.Error("a third connection was opened")
		}
	}
}

// A connection that is free on one loop serves the clients of all.
func TestFreeConnectionsMove(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		ended := make(chan error)
		for i := range 20 {
			l := x.Loops.Loops()[i%2]
			l.Post(func() { (&asker{x: x, l: l, left: 3, ended: ended}).ask() })
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
		}
		if n := s.opened.Load(); n != 1 {
			t.Errorf("%d connections, want 1", n)
		}
		if n := x.tally.get(func(c *tally) int { return c.reused }); n != 59 {
			t.Errorf("%d of 60 requests were counted as reusing", n)
		}
	})
}
