package crossing

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

const patience = 10 * time.Second

func loops(t *testing.T) (near, far *loop.Loop) {
	t.Helper()
	group := loop.New(loop.Config{Loops: 2, Panicked: func(bug any, stack []byte) { t.Errorf("panic: %v\n%s", bug, stack) }})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := group.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return group.Loops()[0], group.Loops()[1]
}

// on runs f on l and waits for it.
func on(t *testing.T, l *loop.Loop, f func()) {
	t.Helper()
	done := make(chan struct{})
	l.Post(func() { defer close(done); f() })
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the loop hangs")
	}
}

func eventually(t *testing.T, l *loop.Loop, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		ok := false
		on(t, l, func() { ok = is() })
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// backend is the far end: a place, and the Flow that it becomes. It belongs to the
// far loop.
type backend struct {
	t        *testing.T
	client   uint64
	request  exchange.Request
	front    exchange.Front
	got      []byte
	ended    bool
	trailers exchange.Fields
	consumed int
	aborted  error
	dropped  bool
	begun    func(b *backend)
	over     bool
}

func (b *backend) Begin(client uint64, r *exchange.Request, front exchange.Front) exchange.Flow {
	b.client, b.request, b.front = client, *r, front
	if b.begun != nil {
		b.begun(b)
	}
	return b
}

func (b *backend) Drop() { b.dropped = true }

func (b *backend) Data(p []byte, end bool) {
	b.live()
	b.got = append(b.got, p...)
	b.ended = end
}

func (b *backend) End(trailers exchange.Fields) {
	b.live()
	b.trailers, b.ended = trailers, true
}

func (b *backend) Consumed(n int) {
	b.live()
	b.consumed += n
}

func (b *backend) Abort(cause error) {
	b.live()
	b.aborted, b.over = cause, true
}

func (b *backend) live() {
	if b.over {
		b.t.Error("called after the end")
	}
}

// client is the near end, of the near loop.
type client struct {
	t        *testing.T
	interims []int
	head     *exchange.Response
	got      []byte
	ended    bool
	trailers exchange.Fields
	failed   error
	sent     int
	over     bool
	taken    func(n int)
}

func (c *client) live() {
	if c.over {
		c.t.Error("called after the end")
	}
}

func (c *client) Informational(r *exchange.Response) {
	c.live()
	c.interims = append(c.interims, r.Status)
}

func (c *client) Response(r *exchange.Response, end bool) {
	c.live()
	head := *r
	c.head, c.ended = &head, end
}

func (c *client) Data(p []byte, end bool) {
	c.live()
	c.got = append(c.got, p...)
	c.ended = end
	if c.taken != nil {
		c.taken(len(p))
	}
}

func (c *client) End(trailers exchange.Fields) {
	c.live()
	c.trailers, c.ended = trailers, true
}

func (c *client) Failed(err error) {
	c.live()
	c.failed, c.over = err, true
}

func (c *client) Sent(n int) {
	c.live()
	c.sent += n
}

// TestWhole: everything that both ends say arrives, in order, with trailers.
func TestWhole(t *testing.T) {
	near, far := loops(t)
	b, c := &backend{t: t}, &client{t: t}
	var flow exchange.Flow
	fields := exchange.Fields{{Name: "a", Value: "b"}}
	on(t, near, func() {
		flow = New([]*loop.Loop{near, far}).Begin(near, far, b, 7, &exchange.Request{Method: "POST", Length: exchange.UnknownLength, Fields: fields}, c)
		fields[0].Value = "another request's"
		flow.Data([]byte("one "), false)
		flow.Data([]byte("two"), false)
		flow.End(exchange.Fields{{Name: "t", Value: "1"}})
	})
	eventually(t, far, "the request is there", func() bool { return b.ended })
	on(t, far, func() {
		if b.client != 7 || b.request.Method != "POST" || b.request.Fields.Get("a") != "b" || string(b.got) != "one two" || b.trailers.Get("t") != "1" {
			t.Errorf("%+v", b)
		}
		b.front.Sent(4)
		b.front.Sent(3)
		b.front.Informational(&exchange.Response{Status: 103})
		b.front.Response(&exchange.Response{Status: 200, Length: exchange.UnknownLength}, false)
		b.front.Data([]byte("an "), false)
		b.front.Data([]byte("answer"), false)
		b.front.End(exchange.Fields{{Name: "u", Value: "2"}})
	})
	eventually(t, near, "the answer is there", func() bool { return c.ended })
	on(t, near, func() {
		c.over = true
		if !slices.Equal(c.interims, []int{103}) || c.head.Status != 200 || string(c.got) != "an answer" || c.trailers.Get("u") != "2" || c.sent != 7 {
			t.Errorf("%+v", c)
		}
		flow.Abort(errors.New("too late"))
	})
	on(t, far, func() {
		if b.aborted != nil {
			t.Error("aborted after its end")
		}
	})
}

// TestAborted: an exchange that is given up before it has begun costs the place
// nothing, and one that is given up later is aborted there. Nobody hears of it
// afterwards.
func TestAborted(t *testing.T) {
	near, far := loops(t)
	gone := errors.New("gone")
	b, c := &backend{t: t}, &client{t: t}
	on(t, far, func() { // which is kept from beginning it meanwhile
		on(t, near, func() {
			flow := New([]*loop.Loop{near, far}).Begin(near, far, b, 0, &exchange.Request{Length: 3}, c)
			flow.Data([]byte("ab"), false)
			flow.Abort(gone)
			flow.Abort(gone)
			c.over = true
		})
	})
	eventually(t, far, "the place is dropped", func() bool { return b.dropped && b.front == nil })

	b, c = &backend{t: t}, &client{t: t}
	var flow exchange.Flow
	on(t, near, func() { flow = New([]*loop.Loop{near, far}).Begin(near, far, b, 0, &exchange.Request{Length: 3}, c) })
	eventually(t, far, "it has begun", func() bool { return b.front != nil })
	on(t, near, func() {
		c.over = true
		flow.Abort(gone)
		flow.Data([]byte("abc"), true)
		flow.Consumed(1)
	})
	eventually(t, far, "it is aborted", func() bool { return b.aborted == gone })
	on(t, far, func() {
		b.front.Response(&exchange.Response{Status: 200}, false)
		b.front.Failed(errors.New("late"))
	})
	on(t, near, func() {})
}

// TestFailed: a failure ends the exchange in the near loop, behind what came before.
func TestFailed(t *testing.T) {
	near, far := loops(t)
	broken := errors.New("broken")
	b := &backend{t: t, begun: func(b *backend) {
		b.over = true
		front := b.front
		far.Post(func() {
			front.Response(&exchange.Response{Status: 200}, false)
			front.Data([]byte("half"), false)
			front.Failed(broken)
			front.Sent(1)
		})
	}}
	c := &client{t: t}
	var flow exchange.Flow
	on(t, near, func() { flow = New([]*loop.Loop{near, far}).Begin(near, far, b, 0, &exchange.Request{Length: 10}, c) })
	eventually(t, near, "it has failed", func() bool { return c.failed != nil })
	on(t, near, func() {
		if c.failed != broken || string(c.got) != "half" || c.sent != 0 {
			t.Errorf("%+v", c)
		}
		flow.Data([]byte("x"), false)
		flow.Abort(errors.New("too late"))
	})
	on(t, far, func() {})
}

// TestLoopsThatEnded: an exchange with a loop that has ended fails, or is aborted.
func TestLoopsThatEnded(t *testing.T) {
	near, _ := loops(t)
	_, far := loops(t)
	group := loop.New(loop.Config{Loops: 1})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := group.Run(ctx); err != nil {
		t.Fatal(err)
	}
	stopped := group.Loops()[0]

	c := &client{t: t}
	on(t, near, func() {
		New([]*loop.Loop{near, stopped}).Begin(near, stopped, &backend{t: t}, 0, &exchange.Request{}, c)
	})
	eventually(t, near, "it has failed", func() bool { return c.failed == loop.ErrStopped })

	b := &backend{t: t}
	New([]*loop.Loop{stopped, far}).Begin(stopped, far, b, 0, &exchange.Request{}, &client{t: t})
	eventually(t, far, "it has begun", func() bool { return b.front != nil })
	on(t, far, func() { b.front.Response(&exchange.Response{Status: 200}, false) })
	eventually(t, far, "it is aborted", func() bool { return b.aborted == loop.ErrStopped })
}

// TestStreams: many exchanges at once, each with more than a window both ways, in
// parts of all sizes, keep their windows and lose nothing.
func TestStreams(t *testing.T) {
	const exchanges, size = 8, 1 << 20
	near, far := loops(t)
	content := make([]byte, size)
	for i := range content {
		content[i] = byte(rand.Uint32())
	}
	lanes := New([]*loop.Loop{near, far})
	var all sync.WaitGroup
	for range exchanges {
		all.Add(1)
		echo := &echo{t: t, l: far, room: exchange.AnswerWindow}
		c := &client{t: t}
		on(t, near, func() {
			flow := lanes.Begin(near, far, echo, 0, &exchange.Request{Length: size}, c)
			c.taken = flow.Consumed
			offset := 0
			var step func()
			step = func() {
				for offset < size && offset-c.sent < exchange.UploadWindow {
					n := min(1+rand.IntN(40_000), size-offset, exchange.UploadWindow-offset+c.sent)
					flow.Data(content[offset:offset+n], offset+n == size)
					offset += n
				}
				if c.ended {
					if !bytes.Equal(c.got, content) {
						t.Error("something was lost")
					}
					all.Done()
					return
				}
				time.AfterFunc(time.Millisecond, func() { near.Post(step) })
			}
			step()
		})
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("they hang")
	}
}

// TestPanic: a panic in one exchange costs no other what it was to hear.
func TestPanic(t *testing.T) {
	panics := make(chan any, 10)
	group := loop.New(loop.Config{Loops: 2, Panicked: func(bug any, _ []byte) { panics <- bug }})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = group.Run(ctx) })
	defer running.Wait()
	defer cancel()
	near, far := group.Loops()[0], group.Loops()[1]
	lanes := New(group.Loops())
	good, bad := &backend{t: t}, &backend{t: t, begun: func(*backend) { panic("a bug") }}
	on(t, near, func() {
		lanes.Begin(near, far, bad, 0, &exchange.Request{}, &client{t: t})
		flow := lanes.Begin(near, far, good, 0, &exchange.Request{Length: 3}, &client{t: t})
		flow.Data([]byte("abc"), true)
	})
	eventually(t, far, "the other has come", func() bool { return good.ended && string(good.got) == "abc" })
	if bug := <-panics; bug != "a bug" {
		t.Error(bug)
	}
}

// echo sends back what comes, and sees that windows are kept.
type echo struct {
	t     *testing.T
	l     *loop.Loop
	front exchange.Front
	held  []byte
	ends  bool
	room  int
	begun bool
}

func (e *echo) Begin(_ uint64, _ *exchange.Request, front exchange.Front) exchange.Flow {
	e.front = front
	return e
}

func (e *echo) Drop() { e.t.Error("dropped") }

func (e *echo) Data(p []byte, end bool) {
	e.held, e.ends = append(e.held, p...), end
	if len(e.held) > exchange.UploadWindow {
		e.t.Error("more than the window of an upload")
	}
	e.l.Post(e.pass)
}

func (e *echo) End(exchange.Fields) { e.t.Error("no trailers were sent") }

func (e *echo) Consumed(n int) {
	if e.room += n; e.room > exchange.AnswerWindow {
		e.t.Error("more was consumed than was sent")
	}
	e.l.Post(e.pass)
}

func (e *echo) Abort(cause error) { e.t.Error(cause) }

func (e *echo) pass() {
	if !e.begun {
		e.begun = true
		e.front.Response(&exchange.Response{Status: 200, Length: exchange.UnknownLength}, false)
	}
	n := min(len(e.held), e.room)
	last := e.ends && n == len(e.held)
	if n == 0 && !last {
		return
	}
	e.ends = e.ends && !last
	e.front.Data(e.held[:n], last)
	if !last {
		e.front.Sent(n)
	}
	e.room -= n
	e.held = e.held[n:]
}
