package backend

import (
	"context"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// stall has a client take answers, of which it reads nothing.
func (x *bench) stall(client uint64, answers int) []*http.Response {
	x.t.Helper()
	var all []*http.Response
	for range answers {
		call := newCall()
		call.Client = client
		resp, err := x.RoundTrip(newRequest(x.t, "GET", "/bytes/3000000", nil), call)
		if err != nil {
			x.t.Fatal(err)
		}
		all = append(all, resp)
	}
	return all
}

// taken reads what is left of answers and says how many ended early.
func (x *bench) taken(all []*http.Response) (cut int) {
	x.t.Helper()
	for _, resp := range all {
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		switch {
		case err != nil && reasonOf(err) == ReasonClientShare:
			cut++
		case err != nil || n != 3_000_000:
			x.t.Errorf("%d bytes, %v", n, err)
		}
	}
	return cut
}

func (x *bench) askAs(client uint64) error {
	call := newCall()
	call.Client = client
	_, _, err := x.try(newRequest(x.t, "GET", "/bytes/10", nil), call)
	return err
}

func bounds(each, pending uint32) option {
	return connections(func(c *resealv1.Connections) { c.MaxPerEndpoint, c.MaxPending = each, pending })
}

// A client that takes nothing of its answers keeps nobody else from the pool, and
// loses no more than others need.
func TestStalledClientsLeaveRoom(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr}, bounds(4, 100))
	stalled := x.stall(1, 4)
	for client := range uint64(3) {
		if err := x.askAs(client + 2); err != nil {
			t.Errorf("another client: %v", err)
		}
	}
	if cut := x.taken(stalled); cut != 1 {
		t.Errorf("%d answers were ended for one connection", cut)
	}
	if n := s.maxOpen.Load(); n > 4 {
		t.Errorf("%d connections at a time", n)
	}
	e := x.current("p").state.Load().endpoints[s.addr]
	eventually(t, "nobody holds anything", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return len(e.clients) == 0 && e.reclaimed == 0
	})
}

// A client that sends nothing of its bodies doesn't either.
func TestStalledUploadsLeaveRoom(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr}, bounds(2, 100))
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	failed := make(chan error, 2)
	for range 2 {
		all.Go(func() {
			req := newRequest(t, "POST", "/", nil).WithContext(ctx)
			req.Body, req.ContentLength = &quietBody{ctx: ctx}, -1
			_, _, err := x.try(req, nil)
			failed <- err
		})
	}
	eventually(t, "the uploads are under way", func() bool { return x.tally.get(func(c *tally) int { return c.active }) == 2 })
	if err := x.askAs(2); err != nil {
		t.Errorf("another client: %v", err)
	}
	wantReason(t, <-failed, ReasonClientShare, 503)
	cancel()
	all.Wait()
}

// Whoever holds no more than others loses nothing, however slow.
func TestEvenSharesAreKept(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr}, bounds(4, 100), timeouts(func(p *resealv1.BackendTimeouts) {
		p.Connect, p.Handshake = dur(500*time.Millisecond), dur(time.Second)
	}))
	var stalled []*http.Response
	for client := range uint64(4) {
		stalled = append(stalled, x.stall(client+1, 1)...)
	}
	time.Sleep(stalledAfter)
	wantReason(t, x.askAs(5), ReasonOverloaded, 503)
	if cut := x.taken(stalled); cut != 0 {
		t.Errorf("%d answers were ended", cut)
	}
}

// A client that fills the queue makes room in it for others.
func TestFullQueueIsShared(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr}, bounds(2, 4))
	stalled := x.stall(1, 2)
	var all sync.WaitGroup
	failed := make(chan error, 4)
	for range 4 {
		all.Go(func() { failed <- x.askAs(1) })
	}
	e := x.current("p").state.Load().endpoints[s.addr]
	eventually(t, "the queue is full", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.waiting == 4
	})
	wantReason(t, x.askAs(1), ReasonOverloaded, 503) // the client's own one too many
	if err := x.askAs(2); err != nil {
		t.Errorf("another client: %v", err)
	}
	wantReason(t, <-failed, ReasonClientShare, 503)
	if cut := x.taken(stalled); cut != 1 {
		t.Errorf("%d answers were ended for one connection", cut)
	}
	all.Wait()
	close(failed)
	for err := range failed {
		if err != nil {
			t.Errorf("a request in the queue: %v", err)
		}
	}
}
