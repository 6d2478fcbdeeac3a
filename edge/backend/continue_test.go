package backend

import (
	"context"
	"net/http"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// noted is a Front that notes what it is told, on its loop.
type noted struct {
	status int
	sent   int
	data   []byte
	begun  chan struct{} // gets a token with the head of the answer
	ended  chan struct{} // closed at the end of the answer; may be nil
	failed error
}

func (n *noted) Informational(*exchange.Response) {}
func (n *noted) Response(r *exchange.Response, _ bool) {
	n.status = r.Status
	n.begun <- struct{}{}
}
func (n *noted) Data(p []byte, end bool) {
	if n.status == 0 {
		panic("data before the head of the answer")
	}
	if n.data = append(n.data, p...); end {
		n.End(nil)
	}
}
func (n *noted) End(exchange.Fields) {
	if n.ended != nil {
		close(n.ended)
	}
}
func (n *noted) Sent(size int) { n.sent += size }
func (n *noted) Failed(err error) {
	n.failed = err
	n.begun <- struct{}{}
}

// A client that sends its body though it was to wait for 100, and the backend did not
// want it, is not held up: what it sent before and after the answer is thrown away.
func TestRefusedBodyIsThrownAway(t *testing.T) {
	answer, end := make(chan struct{}), make(chan struct{})
	defer close(end)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-answer
		w.Header().Set("Content-Length", "100")
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		_ = http.NewResponseController(w).Flush()
		<-end
	}))
	x := newBench(t, []string{s.addr})
	l := x.Loops.Loops()[0]
	on := func(f func()) {
		done := make(chan struct{})
		l.Post(func() { defer close(done); f() })
		<-done
	}
	n := &noted{begun: make(chan struct{}, 1)}
	var flow exchange.Flow
	on(func() {
		flow = x.b.Start(l, newCall(), &exchange.Request{
			Method: "POST", Scheme: "https", Authority: testName, Target: "/", Length: 100_000, Continue: true, Version: exchange.HTTP11,
		}, n)
		flow.Data(pattern(40_000), false)
	})
	close(answer)
	<-n.begun
	on(func() { flow.Data(pattern(40_000), false) })
	on(func() {}) // in which the Front is told
	on(func() {
		if n.status != 413 || n.sent != 80_000 || n.failed != nil {
			t.Errorf("answered %d, %d of 80,000 bytes got rid of, %v", n.status, n.sent, n.failed)
		}
		flow.Abort(context.Canceled)
	})
}
