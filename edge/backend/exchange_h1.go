package backend

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// h1Exchange is one request and its response on an HTTP/1.1 connection. The
// connection goes back to the pool when both have ended well.
type h1Exchange struct {
	c *h1Conn
	a *attempt

	parts  atomic.Int32          // of request and response, still under way
	keep   atomic.Bool           // the connection may serve another request
	cause  atomic.Pointer[error] // why it ended; whoever sets it owns the connection
	stream io.ReadCloser         // the request's body while it is sent
	sent   chan error            // of capacity 1; how sending the stream ended
	done   chan struct{}         // closed when the stream's goroutine is through
	begin  chan struct{}         // closed when the stream may be sent

	untaken  atomic.Int64 // since when the answer waits to be read on, in Unix ns; 0: it does not
	answered atomic.Bool  // the response's header is there
	owed     atomic.Int64 // bytes that its body is to have; -1 is unknown
	sending  atomic.Bool  // the stream is not through yet
	uploaded atomic.Bool  // the stream was sent to its end
	ending   atomic.Bool  // its last Write has begun
	dog      atomic.Pointer[watchdog]
	stop     atomic.Pointer[func() bool] // ends the watch on the request's context
}

// roundTrip sends the attempt's request and returns when the response's header
// is there. Without a streamed body no goroutine is started.
func (c *h1Conn) roundTrip(ctx context.Context, a *attempt) (*http.Response, error) {
	select {
	case <-c.ready: // it died, or spoke unasked, after it was taken
		c.Close()
		return nil, &lostError{err: errOr(c.err, errUnsolicited)}
	default:
	}
	x := &h1Exchange{c: c, a: a}
	x.parts.Store(1)
	x.keep.Store(true)
	stream := a.x.body.next()
	c.exchange.Store(x)
	if err := x.sendHead(); err != nil {
		closeBody(stream)
		return nil, x.fail(err)
	}
	if stream != nil {
		x.upload(stream)
	}
	return x.receive(ctx)
}

func errOr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

// sendHead writes the head, and a small body, in one write.
func (x *h1Exchange) sendHead() error {
	c, body := x.c, x.a.x.body
	buf := headBuffers.Get().(*[]byte)
	defer headBuffers.Put(buf)
	out := append(appendHead((*buf)[:0], x.a.x.req, body, x.a.x.call.RequestNames), body.small...)
	*buf = out[:0]
	before := c.Written()
	if _, err := c.Write(out); err != nil {
		return &lostError{err: err, written: c.Written() > before}
	}
	return nil
}

// upload sends the stream on a goroutine of its own. With Expect:
// 100-continue it waits for the word.
func (x *h1Exchange) upload(stream io.ReadCloser) {
	req := x.a.x.req
	x.stream, x.sent, x.done = stream, make(chan error, 1), make(chan struct{})
	x.parts.Add(1)
	x.sending.Store(true)
	x.watch()
	if expectsContinue(req) {
		x.begin = make(chan struct{})
	}
	b := x.c.e.pool.b
	b.spawn("an upload", func() {
		err := x.sendStream(stream)
		x.uploaded.Store(err == nil)
		x.sending.Store(false)
		_ = b.guarded("the end of an upload", func() { stream.Close() })
		x.sent <- err
		x.partDone()
		close(x.done)
	})
}

func (x *h1Exchange) sendStream(stream io.Reader) (err error) {
	defer func() {
		if err != nil {
			x.keep.Store(false)
		}
	}()
	defer x.c.e.pool.b.caught("an upload", &err)
	if x.begin != nil && !x.mayBegin() {
		x.keep.Store(false)
		return nil
	}
	dog := x.dog.Load()
	dog.wait(1)
	defer dog.wait(-1)
	writer := &streamWriter{
		w: x.c, stream: clientReader{stream, dog}, body: x.a.x.body, touch: dog.touch,
		trailer: func() http.Header { return x.a.x.req.Trailer },
		last:    func() { x.ending.Store(true) },
	}
	err = writer.run()
	var client readError
	if errors.As(err, &client) && x.answered.Load() {
		x.abort(err) // the backend waits for the rest in vain
	}
	return err
}

// uploading reports whether the request's body has not been sent to its end. An
// endpoint that resets such a request may not have wanted the body, which is the
// client's.
func (x *h1Exchange) uploading() bool { return x.stream != nil && !x.uploaded.Load() }

// settle gives a request whose last Write has begun the moment that it needs to
// end. Otherwise a response that is quicker than our own goroutine would leave
// the connection in use for the next request, which would dial another.
func (x *h1Exchange) settle() {
	if !x.ending.Load() {
		return
	}
	timer := time.NewTimer(50 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-x.done:
	case <-timer.C:
	}
}

// max1xx bounds the informational responses to a request.
const max1xx = 100

// continueTimeout is how long a body waits for 100 Continue before it is sent
// anyway (RFC 9110 section 10.1.1).
const continueTimeout = time.Second

// mayBegin waits until the body is wanted. It returns false when the final
// response came first.
func (x *h1Exchange) mayBegin() bool {
	timer := time.NewTimer(continueTimeout)
	defer timer.Stop()
	select {
	case <-x.begin:
		return x.keep.Load()
	case <-timer.C:
		return true
	case <-x.c.Ended():
		return false
	}
}

// receive waits for the response's header.
func (x *h1Exchange) receive(ctx context.Context) (*http.Response, error) {
	c := x.c
	if x.sent == nil {
		c.timer.Reset(x.a.x.header)
	}
	var broken error // sending failed; maybe an answer says why
	sent := x.sent
	for informational := 0; ; {
		select {
		case <-c.ready:
			if c.err != nil {
				return nil, x.fail(&lostError{err: errOr(broken, c.err), written: true, upload: x.uploading()})
			}
			resp, err := x.header(ctx)
			if err != nil {
				return nil, x.fail(err)
			}
			if resp != nil {
				return x.respond(ctx, resp)
			}
			if informational++; informational > max1xx {
				return nil, x.fail(fail(ReasonProtocolError, errEndless1xx))
			}
			c.resume <- struct{}{}
		case err := <-sent:
			sent = nil
			c.timer.Reset(x.a.x.header)
			if err == nil {
				continue
			}
			var client readError
			if errors.As(err, &client) {
				return nil, x.fail(err)
			}
			broken = err
			c.timer.Reset(c.CloseTimeout())
		case <-ctx.Done():
			return nil, x.fail(ctx.Err())
		case <-c.timer.C:
			if broken != nil {
				return nil, x.fail(&lostError{err: broken, written: true, upload: x.uploading()})
			}
			return nil, x.fail(fail(ReasonTimeoutHeader, errHeaderLate))
		}
	}
}

// header parses one header. nil, nil is an informational response, which has
// been passed on.
func (x *h1Exchange) header(ctx context.Context) (*http.Response, error) {
	c := x.c
	switch {
	case c.head > 0:
	case errors.Is(c.headErr, errNotHTTP), errors.Is(c.headErr, exchange.ErrBareLF), errors.Is(c.headErr, errHeaderTooBig):
		return nil, fail(ReasonProtocolError, c.headErr)
	default:
		return nil, fail(ReasonReset, c.headErr)
	}
	peeked, _ := c.reader.Peek(c.head)
	head, err := exchange.CheckHead(peeked, false)
	if err != nil {
		return nil, fail(ReasonProtocolError, err)
	}
	resp, err := http.ReadResponse(c.reader, x.a.x.req)
	if err != nil {
		return nil, fail(ReasonProtocolError, err)
	}
	x.a.x.call.ResponseNames = head.Names
	c.limit = noLimit
	if err := checkFields("header", resp.Header); err != nil {
		return nil, fail(ReasonProtocolError, err)
	}
	if challengesConnection(resp.Header) {
		c.becomePrivate()
	}
	if resp.StatusCode/100 != 1 || resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, nil
	}
	return nil, x.informational(ctx, resp)
}

func (x *h1Exchange) informational(ctx context.Context, resp *http.Response) error {
	trace := httptrace.ContextClientTrace(ctx)
	if resp.StatusCode == http.StatusContinue {
		x.letBegin()
		if trace != nil && trace.Got100Continue != nil {
			trace.Got100Continue()
		}
	}
	if trace != nil && trace.Got1xxResponse != nil {
		if err := trace.Got1xxResponse(resp.StatusCode, textproto.MIMEHeader(resp.Header)); err != nil {
			return err
		}
	}
	return nil
}

// letBegin lets a body that waits for 100 Continue be sent, or, when keep has
// been cleared, never.
func (x *h1Exchange) letBegin() {
	if x.begin == nil {
		return
	}
	select {
	case <-x.begin:
	default:
		close(x.begin)
	}
}

// respond returns the final response with a body of ours.
func (x *h1Exchange) respond(ctx context.Context, resp *http.Response) (*http.Response, error) {
	x.c.timer.Stop()
	x.owed.Store(resp.ContentLength)
	x.answered.Store(true)
	if resp.StatusCode == http.StatusSwitchingProtocols {
		if wantsUpgrade(x.a.x.req) == "" {
			return nil, x.fail(fail(ReasonProtocolError, errNoUpgrade))
		}
		return x.upgraded(resp), nil
	}
	if resp.Close || x.c.Renegotiated() {
		x.keep.Store(false)
	}
	if x.begin != nil {
		select {
		case <-x.begin:
		default: // the body was not asked for
			x.keep.Store(false)
			x.letBegin()
		}
	}
	if resp.Body == http.NoBody {
		x.settle()
		x.partDone()
		return resp, nil
	}
	x.untaken.Store(time.Now().UnixNano())
	body := &h1Body{x: x, src: resp.Body}
	body.left.Store(resp.ContentLength)
	resp.Body = body
	if resp.ContentLength < 0 || resp.ContentLength > int64(x.c.reader.Buffered()) {
		x.watch()
		stop := context.AfterFunc(ctx, func() { body.abandon(ctx.Err()) })
		x.stop.Store(&stop)
	}
	return resp, nil
}

// watch starts the watchdog on a transfer that may stall.
func (x *h1Exchange) watch() {
	if x.dog.Load() == nil {
		x.dog.Store(newWatchdog(x.a.x.state.settings.bodyTimeout, func() {
			x.abort(x.idle())
		}))
	}
}

// idle finds out who let a transfer stall.
func (x *h1Exchange) idle() *Error {
	if waits := x.dog.Load().forClient(); !x.answered.Load() {
		if waits {
			return stalledUpload()
		}
		return idleError(false)
	} else {
		return idleError(waits || x.owed.Load() < 0)
	}
}

func (x *h1Exchange) touch() { x.dog.Load().touch() }

// fail ends the exchange and the connection, and returns what to tell.
func (x *h1Exchange) fail(err error) error {
	x.abort(err)
	return x.aborted()
}

// endedWell is the cause of an exchange of which all parts came to their end.
var endedWell = new(error)

// abort ends the connection, cleanly and in the background, and with it
// whatever of the exchange is under way. The first cause counts.
func (x *h1Exchange) abort(cause error) bool {
	if !x.cause.CompareAndSwap(nil, &cause) {
		return false
	}
	x.release()
	x.c.Close()
	return true
}

// release ends what the exchange holds besides the connection.
func (x *h1Exchange) release() {
	x.keep.Store(false)
	x.unwatch()
	if x.sending.Load() {
		// The goroutine that reads it may wait for the client for long.
		x.c.e.pool.b.spawn("the end of an upload", func() { x.stream.Close() })
	}
}

// unwatch ends the watches over time and context.
func (x *h1Exchange) unwatch() {
	x.dog.Load().stop()
	if stop := x.stop.Load(); stop != nil {
		(*stop)()
	}
}

// aborted returns why the exchange was ended early, if it was.
func (x *h1Exchange) aborted() error {
	if cause := x.cause.Load(); cause != nil {
		return *cause
	}
	return nil
}

// partDone notes the end of the request or of the response. After both the
// connection is free, unless somebody ended the exchange a moment before: then
// it is theirs.
func (x *h1Exchange) partDone() {
	if x.parts.Add(-1) != 0 {
		return
	}
	if !x.cause.CompareAndSwap(nil, endedWell) {
		x.a.done(x.aborted())
		return
	}
	c := x.c
	x.unwatch()
	c.exchange.Store(nil)
	if x.keep.Load() && c.reader.Buffered() == 0 && !c.unread {
		c.freeReader()
		c.e.put(c)
	} else {
		c.Close()
	}
	x.a.done(nil)
}
