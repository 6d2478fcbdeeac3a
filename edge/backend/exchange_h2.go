package backend

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// h2Exchange is one request and its response on an HTTP/2 connection.
type h2Exchange struct {
	h      *h2Conn
	a      *attempt
	cancel context.CancelCauseFunc
	ctx    context.Context
	dog    *watchdog
	upload *h2Upload
	owed   atomic.Int64 // bytes that the answer's body is to have; -1 is unknown
	late   *time.Timer  // for the response header, from the end of the request

	wrote    atomic.Bool // the header went out
	uploaded atomic.Bool // the request went out as a whole
	answered atomic.Bool // a response came
	over     sync.Once
}

// roundTrip sends the attempt's request on the stream reserved for it.
func (h *h2Conn) roundTrip(ctx context.Context, a *attempt) (*http.Response, error) {
	x := &h2Exchange{h: h, a: a}
	x.ctx, x.cancel = context.WithCancelCause(ctx)
	stream := a.x.body.next()
	upload := &h2Upload{src: stream, left: a.x.body.length, b: h.e.pool.b}
	x.upload = upload
	x.late = time.AfterFunc(time.Hour, func() {
		if !x.answered.Load() {
			x.cancel(fail(ReasonTimeoutHeader, errHeaderLate))
		}
	})
	x.late.Stop()
	x.dog = newWatchdog(a.x.state.settings.bodyTimeout, func() { x.cancel(x.idle()) })
	upload.dog = x.dog
	x.dog.wait(1)
	resp, err := h.cc.RoundTrip(x.request(upload))
	x.late.Stop()
	if err != nil {
		err = x.classify(err)
		x.end()
		return nil, err
	}
	x.owed.Store(resp.ContentLength)
	x.answered.Store(true)
	if challengesConnection(resp.Header) {
		h.becomePrivate(a.x.call)
	}
	return x.respond(resp, stream != nil), nil
}

// request is the request as x/net/http2 wants it.
func (x *h2Exchange) request(upload *h2Upload) *http.Request {
	var informational atomic.Int32
	caller := httptrace.ContextClientTrace(x.ctx)
	trace := &httptrace.ClientTrace{
		Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			if informational.Add(1) > max1xx {
				x.cancel(fail(ReasonProtocolError, errEndless1xx))
				return errEndless1xx
			}
			if caller != nil && caller.Got1xxResponse != nil {
				return caller.Got1xxResponse(code, header)
			}
			return nil
		},
		WroteHeaders: func() { x.wrote.Store(true) },
		WroteRequest: func(info httptrace.WroteRequestInfo) {
			x.uploaded.Store(info.Err == nil)
			x.dog.wait(-1)
			x.late.Reset(x.a.x.header)
		},
	}
	out := x.a.x.req.WithContext(httptrace.WithClientTrace(untraced{x.ctx}, trace))
	switch {
	case strings.HasPrefix(out.RequestURI, "/"):
		// x/net/http2 takes off what stands in front of the path, which it would
		// otherwise encode anew.
		out.URL = &url.URL{Scheme: "https", Host: out.Host, Opaque: "//" + out.Host + out.RequestURI}
	case out.URL.Scheme != "https":
		secure := *out.URL
		secure.Scheme = "https"
		out.URL = &secure
	}
	out.RequestURI = ""
	out.Header = http2Header(out.Header)
	body := x.a.x.body
	switch {
	case body.small != nil:
		out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(body.small)), int64(len(body.small))
	case upload.src != nil:
		out.Body, out.ContentLength = upload, body.length
	default:
		out.Body, out.ContentLength = nil, 0
	}
	out.GetBody, out.Close = nil, false
	return out
}

// untraced hides the caller's trace, which httptrace would otherwise call beside
// ours whatever ours returns.
type untraced struct{ context.Context }

// Value implements context.Context.
func (c untraced) Value(key any) any {
	value := c.Context.Value(key)
	if _, trace := value.(*httptrace.ClientTrace); trace {
		return nil
	}
	return value
}

// http2Header leaves out what HTTP/2 forbids (RFC 9113 section 8.2.2), and
// keeps x/net/http2 from adding a User-Agent.
func http2Header(header http.Header) http.Header {
	_, agent := header["User-Agent"]
	clean := agent
	for name := range header {
		if ownHeader(name) || name == "Upgrade" {
			clean = false
		}
	}
	if clean {
		return header
	}
	out := maps.Clone(header)
	if out == nil {
		out = http.Header{}
	}
	maps.DeleteFunc(out, func(name string, _ []string) bool { return ownHeader(name) || name == "Upgrade" })
	if !agent {
		out["User-Agent"] = []string{""}
	}
	return out
}

// idle finds out who let a transfer stall.
func (x *h2Exchange) idle() *Error {
	waits := x.dog.forClient()
	switch {
	case x.answered.Load():
		return idleError(waits || x.owed.Load() < 0)
	case waits:
		return stalledUpload()
	}
	return idleError(false)
}

// uploading is as h1Exchange.uploading.
func (x *h2Exchange) uploading() bool { return x.upload.src != nil && !x.uploaded.Load() }

// classify says what an error of x/net/http2 means for the request.
func (x *h2Exchange) classify(err error) error {
	if cause := context.Cause(x.ctx); cause != nil {
		return cause
	}
	if broken := x.upload.failed(); broken != nil {
		return broken
	}
	if strings.Contains(err.Error(), "request header list larger than peer's") {
		return refused(http.StatusRequestHeaderFieldsTooLarge, err)
	}
	var stream http2.StreamError
	if errors.As(err, &stream) {
		if stream.Code == http2.ErrCodeRefusedStream {
			return &lostError{err: err, lives: true, unread: true} // RFC 9113 section 8.7: not processed
		}
		return resetError(err, x.uploading())
	}
	// A GOAWAY that does not cover the stream has no error type of its own.
	if strings.Contains(err.Error(), "graceful shutdown GOAWAY") {
		return &lostError{err: err, lives: true, unread: true}
	}
	if !x.wrote.Load() {
		return &lostError{err: err, lives: true}
	}
	return &lostError{err: err, written: true, lives: true, upload: x.uploading()}
}

// respond returns the response with a body of ours.
func (x *h2Exchange) respond(resp *http.Response, upload bool) *http.Response {
	req := x.a.x.req
	resp.Request = req
	if (resp.ContentLength == 0 || req.Method == http.MethodHead) && len(resp.Trailer) == 0 && !upload {
		x.end()
		x.a.done(nil)
		return resp
	}
	resp.Body = &h2Body{x: x, src: resp.Body, upload: upload}
	return resp
}

// end gives the stream back.
func (x *h2Exchange) end() {
	x.over.Do(func() {
		x.dog.stop()
		x.late.Stop()
		x.cancel(nil)
		x.h.release(x.answered.Load())
	})
}

// h2Body is the body of a response.
type h2Body struct {
	x      *h2Exchange
	src    io.ReadCloser
	upload bool // the request had a stream, which may still be under way
	ended  atomic.Bool
}

// Read implements io.Reader.
func (b *h2Body) Read(p []byte) (int, error) {
	x := b.x
	x.dog.wait(1)
	n, err := b.src.Read(p)
	x.dog.wait(-1)
	if n > 0 {
		x.dog.touch()
	}
	if err == nil {
		return n, nil
	}
	if err != io.EOF {
		if cause := context.Cause(x.ctx); cause != nil {
			err = cause
		} else if broken := x.upload.failed(); broken != nil {
			err = broken
		} else if reasonOf(err) == "" {
			err = resetError(err, x.uploading())
		}
	}
	b.end(err)
	return n, err
}

func (b *h2Body) end(err error) {
	if !b.ended.CompareAndSwap(false, true) {
		return
	}
	if err == io.EOF {
		err = nil
	}
	x := b.x
	if err == nil && b.upload {
		// The stream is open until the request has ended as well; Close or
		// the end of the request's body ends it.
		x.a.done(nil)
		return
	}
	if err == nil {
		b.src.Close() // waits until x/net/http2 has freed the stream
		x.end()
	} else {
		x.h.e.pool.b.spawn("the end of an answer", func() {
			defer x.end()
			b.src.Close() // RST_STREAM; it may wait for a Write
		})
	}
	x.a.done(err)
}

// Close implements io.Closer.
func (b *h2Body) Close() error {
	x := b.x
	if b.ended.Load() {
		if b.upload {
			x.h.e.pool.b.spawn("the end of an answer", func() {
				defer x.end()
				b.src.Close()
			})
		}
		return nil
	}
	cause := errBodyClosed
	if already := context.Cause(x.ctx); already != nil {
		cause = already
	}
	b.end(cause)
	return nil
}

// h2Upload is a request body that tells the watchdog what moves, and notes
// whether reading it failed.
type h2Upload struct {
	src  io.ReadCloser
	dog  *watchdog
	b    *Backend
	left int64 // -1 is unknown; owned by Read

	mu  sync.Mutex
	err error // of the client
}

// Read implements io.Reader.
func (u *h2Upload) Read(p []byte) (int, error) {
	n, err := u.readCaught(p)
	u.dog.touch()
	if u.left >= 0 {
		if u.left -= int64(n); u.left < 0 {
			err = errLongBody
		} else if err == io.EOF && u.left > 0 {
			err = errShortBody
		}
	}
	if err != nil && err != io.EOF && !errors.Is(err, http.ErrBodyReadAfterClose) { // that is our own doing
		u.mu.Lock()
		u.err = readError{err}
		u.mu.Unlock()
	}
	return n, err
}

// readCaught runs on a goroutine of x/net/http2.
func (u *h2Upload) readCaught(p []byte) (n int, err error) {
	defer u.b.caught("an upload", &err)
	return clientReader{u.src, u.dog}.Read(p)
}

func (u *h2Upload) closeSrc() (err error) {
	defer u.b.caught("the end of an upload", &err)
	return u.src.Close()
}

// failed returns what went wrong with reading the client's body, if anything.
func (u *h2Upload) failed() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.err
}

// Close implements io.Closer.
func (u *h2Upload) Close() error { return u.closeSrc() }
