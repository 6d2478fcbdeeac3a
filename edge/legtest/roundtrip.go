package legtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

var (
	errClosed    = errors.New("the caller has closed the body of the response")
	errShortBody = errors.New("the body is shorter than its request says")
	errLongBody  = errors.New("the body is longer than its request says")
	errPanicked  = errors.New("the backend's leg has panicked")
)

// Backend is a leg to backends as the frontend calls it: see exchange.Flow.
type Backend interface {
	// Start begins a request.
	Start(l *loop.Loop, x *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow
	// Tunnel connects to a pool of protocol tcp.
	Tunnel(l *loop.Loop, x *exchange.Exchange, front exchange.Front) exchange.Flow
}

// RoundTripper calls a Backend as net/http calls a RoundTripper: exchanges
// belong to the loops, in turn, and callers wait for them.
type RoundTripper struct {
	Backend Backend
	// Loops have to be running.
	Loops *loop.Group
}

// RoundTrip sends req to x.Pool and returns the response as soon as its header is
// there; the body of req may still be read then, until the body of the response
// is closed. It reports on x even when it fails. It calls the Got1xxResponse and
// Got100Continue hooks of the httptrace in req's context. The body of a 101
// response is an exchange.Tunnel.
func (t *RoundTripper) RoundTrip(req *http.Request, x *exchange.Exchange) (*http.Response, error) {
	c := newCall(req.Context(), t.Loops.Next(), x)
	c.body = req.Body
	r, err := outgoing(req, x)
	if err != nil {
		c.closeBody()
		return nil, err
	}
	if r.Length == 0 {
		c.closeBody()
		c.sentAll = true
	} else {
		c.mayRead, c.reading = make(chan struct{}), true
		if !r.Continue {
			close(c.mayRead)
		}
	}
	method, length := r.Method, r.Length
	begun := c.begin(func(own *exchange.Exchange) exchange.Flow {
		return t.Backend.Start(c.loop, own, r, (*front)(c))
	})
	if begun && length != 0 {
		go c.upload(req, length)
	}
	response, err := c.await()
	if err != nil {
		c.closeBody()
		return nil, err
	}
	if response.Status == http.StatusSwitchingProtocols {
		c.unwatch() // the tunnel is the caller's, who closes it
	}
	return c.response(req, method, response), nil
}

// Tunnel connects to x.Pool for bytes. ctx bounds the connecting alone.
func (t *RoundTripper) Tunnel(ctx context.Context, x *exchange.Exchange) (exchange.Tunnel, error) {
	c := newCall(ctx, t.Loops.Next(), x)
	c.begin(func(own *exchange.Exchange) exchange.Flow {
		return t.Backend.Tunnel(c.loop, own, (*front)(c))
	})
	if _, err := c.await(); err != nil {
		return nil, err
	}
	c.unwatch()
	return (*tunnel)(c), nil
}

// call is an exchange whose caller waits.
type call struct {
	ctx     context.Context
	loop    *loop.Loop
	x       *exchange.Exchange // the caller's
	body    io.ReadCloser      // the request's, or nil
	mayRead chan struct{}      // closed when the body is wanted
	unwatch func() bool        // ends the watch on ctx
	closing sync.Once          // of body

	// Of the loop.
	own     exchange.Exchange // the backend's
	flow    exchange.Flow
	sentAll bool // the request has ended
	gotAll  bool // the answer has
	over    bool // the exchange was aborted or has failed

	mu       sync.Mutex
	changed  sync.Cond
	interims []exchange.Response
	head     *exchange.Response
	headEnds bool
	data     []byte // that came and was not read
	trailers exchange.Fields
	ended    bool  // after data
	err      error // what every call returns from now on
	room     int   // bytes that may be uploaded now
	reading  bool  // the request's body may still be read on
	closed   bool
}

func newCall(ctx context.Context, l *loop.Loop, x *exchange.Exchange) *call {
	c := &call{ctx: ctx, loop: l, x: x, own: *x, room: exchange.UploadWindow}
	c.changed.L = &c.mu
	return c
}

// begin begins the exchange.
func (c *call) begin(start func(own *exchange.Exchange) exchange.Flow) bool {
	defer func() { c.unwatch = context.AfterFunc(c.ctx, func() { c.abort(c.ctx.Err()) }) }()
	return c.post(func() {
		defer func() {
			if c.flow == nil {
				c.fail(errPanicked)
			}
		}()
		c.flow = start(&c.own)
	})
}

// await waits for the head of the answer.
func (c *call) await() (*exchange.Response, error) {
	for {
		c.mu.Lock()
		for len(c.interims) == 0 && c.head == nil && c.err == nil {
			c.changed.Wait()
		}
		head, err, interims := c.head, c.err, c.interims
		c.interims = nil
		c.mu.Unlock()
		if broken := c.informed(interims); broken != nil {
			c.abort(broken)
			head, err = nil, broken
		}
		switch {
		case head != nil: // what broke it afterwards, the body tells
			c.report()
			return head, nil
		case err != nil:
			c.report()
			c.unwatch()
			return nil, err
		}
	}
}

// report tells the caller what the backend has said of the exchange.
func (c *call) report() {
	done := make(chan struct{})
	if c.loop.Post(func() { *c.x = c.own; close(done) }) {
		<-done
	}
}

// informed calls the hooks for informational responses.
func (c *call) informed(interims []exchange.Response) error {
	trace := httptrace.ContextClientTrace(c.ctx)
	for i := range interims {
		if interims[i].Status == http.StatusContinue && trace != nil && trace.Got100Continue != nil {
			trace.Got100Continue()
		}
		if trace != nil && trace.Got1xxResponse != nil {
			if err := trace.Got1xxResponse(interims[i].Status, textproto.MIMEHeader(header(interims[i].Fields))); err != nil {
				return err
			}
		}
	}
	return nil
}

// post has the loop call f.
func (c *call) post(f func()) bool {
	if c.loop.Post(f) {
		return true
	}
	c.fail(loop.ErrStopped)
	return false
}

// fail has every call return err from now on. The first error counts.
func (c *call) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	c.changed.Broadcast()
}

// abort gives the exchange up.
func (c *call) abort(cause error) {
	c.post(func() {
		if !c.isOver() {
			c.over = true
			c.flow.Abort(cause)
		}
		c.fail(cause)
	})
}

// isOver is called on the loop.
func (c *call) isOver() bool { return c.flow == nil || c.over || c.sentAll && c.gotAll }

// front is a call as the backend sees it, on the loop.
type front call

func (f *front) tell(what func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	what()
	f.changed.Broadcast()
}

// Informational implements exchange.Front.
func (f *front) Informational(r *exchange.Response) {
	f.tell(func() {
		f.interims = append(f.interims, *r)
		if r.Status != http.StatusContinue || f.mayRead == nil {
			return
		}
		select {
		case <-f.mayRead:
		default:
			close(f.mayRead)
		}
	})
}

// Response implements exchange.Front.
func (f *front) Response(r *exchange.Response, end bool) {
	f.tell(func() {
		head := *r
		f.head, f.headEnds, f.ended, f.gotAll = &head, end, end, end
		f.sentAll = f.sentAll && r.Status != http.StatusSwitchingProtocols
	})
}

// Data implements exchange.Front.
func (f *front) Data(p []byte, end bool) {
	f.tell(func() {
		f.data = append(f.data, p...)
		f.ended, f.gotAll = end, end
		if len(f.data) > exchange.AnswerWindow {
			panic("more than the window of an answer")
		}
	})
}

// End implements exchange.Front.
func (f *front) End(trailers exchange.Fields) {
	f.tell(func() { f.trailers, f.ended, f.gotAll = trailers, true, true })
}

// Failed implements exchange.Front.
func (f *front) Failed(err error) {
	f.over = true
	(*call)(f).fail(err)
}

// Sent implements exchange.Front.
func (f *front) Sent(n int) { f.tell(func() { f.room += n }) }

// upload sends the request's body.
func (c *call) upload(req *http.Request, length int64) {
	if err := c.sendBody(req, length); err != nil {
		c.abort(err)
	}
	c.closeBody()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reading = false
	c.changed.Broadcast()
}

func (c *call) closeBody() {
	if c.body != nil {
		c.closing.Do(func() { _ = c.body.Close() }) // whoever wrote it knows
	}
}

func (c *call) sendBody(req *http.Request, length int64) (err error) {
	defer func() {
		if bug := recover(); bug != nil {
			err = fmt.Errorf("panic while the body is read: %v", bug)
		}
	}()
	if !c.wanted() {
		return nil
	}
	buffer := make([]byte, 32<<10)
	for left := length; ; {
		n, err := req.Body.Read(buffer)
		if left >= 0 {
			left -= int64(n)
		}
		switch {
		case length >= 0 && left < 0:
			return errLongBody
		case err == nil && left == 0 && length >= 0 && len(req.Trailer) == 0:
			err = io.EOF // as a transport does, which reads no further
		case errors.Is(err, io.EOF) && left > 0:
			return errShortBody
		}
		last := errors.Is(err, io.EOF)
		if err != nil && !last {
			return err
		}
		trailers := fields(req.Trailer)
		if n > 0 && !c.send(buffer[:n], last && len(trailers) == 0) || last && n > 0 && len(trailers) == 0 {
			return nil
		}
		if last {
			c.sendEnd(trailers)
			return nil
		}
	}
}

// wanted waits until the body is wanted.
func (c *call) wanted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.closed && c.err == nil {
		select {
		case <-c.mayRead:
			return true
		default:
			c.changed.Wait()
		}
	}
	return false
}

// send sends p as the flow takes it, or reports false.
func (c *call) send(p []byte, end bool) bool {
	for first := true; first || len(p) > 0; first = false {
		n := c.takeRoom(len(p))
		if n == 0 && len(p) > 0 {
			return false
		}
		part := append([]byte(nil), p[:n]...)
		p = p[n:]
		last := end && len(p) == 0
		c.post(func() {
			if !c.isOver() && !c.sentAll {
				c.sentAll = last
				c.flow.Data(part, last)
			}
		})
	}
	return true
}

// takeRoom waits for room in the window, and takes up to n bytes of it.
func (c *call) takeRoom(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.room == 0 && c.err == nil && !c.closed {
		c.changed.Wait()
	}
	if c.err != nil || c.closed {
		return 0
	}
	n = min(n, c.room)
	c.room -= n
	return n
}

func (c *call) sendEnd(trailers exchange.Fields) {
	c.post(func() {
		if !c.isOver() && !c.sentAll {
			c.sentAll = true
			c.flow.End(trailers)
		}
	})
}

// Read reads the answer.
func (c *call) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.data) == 0 && !c.ended && c.err == nil && !c.closed {
		c.changed.Wait()
	}
	switch {
	case c.closed:
		return 0, http.ErrBodyReadAfterClose
	case len(c.data) > 0:
		n := copy(p, c.data)
		c.data = append(c.data[:0], c.data[n:]...)
		c.loop.Post(func() {
			if !c.isOver() {
				c.flow.Consumed(n)
			}
		})
		return n, nil
	case c.ended:
		return 0, io.EOF
	}
	return 0, c.err
}

// settleTime is what a request whose answer is complete has for its own end, since
// an answer can be quicker than our goroutine.
const settleTime = 50 * time.Millisecond

// Close ends the exchange, if it has not ended.
func (c *call) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	if c.ended {
		late := false
		timer := time.AfterFunc(settleTime, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			late = true
			c.changed.Broadcast()
		})
		for c.reading && c.err == nil && !late {
			c.changed.Wait()
		}
		timer.Stop()
	}
	c.closed = true
	c.changed.Broadcast()
	c.mu.Unlock()
	c.unwatch()
	c.abort(errClosed)
	c.closeBody()
	return nil
}

// tunnel is a call that carries bytes both ways.
type tunnel call

// Read implements io.Reader.
func (t *tunnel) Read(p []byte) (int, error) { return (*call)(t).Read(p) }

// Write implements io.Writer. It waits for room in the window.
func (t *tunnel) Write(p []byte) (int, error) {
	if len(p) > 0 && !(*call)(t).send(p, false) {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.err != nil {
			return 0, t.err
		}
		return 0, net.ErrClosed
	}
	return len(p), nil
}

// CloseWrite implements exchange.Tunnel.
func (t *tunnel) CloseWrite() error {
	(*call)(t).sendEnd(nil)
	return nil
}

// Close implements io.Closer.
func (t *tunnel) Close() error { return (*call)(t).Close() }
