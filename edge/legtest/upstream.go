package legtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/net/http/httpguts"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// Blocking is a backend's leg whose calls wait.
type Blocking interface {
	// RoundTrip sends req to x.Pool and returns the response as soon as its head is
	// there. The body of req may be read until that of the response is closed. The
	// body of a 101 response is an io.ReadWriteCloser, with CloseWrite if it can
	// half-close. 1xx responses go to the Got1xxResponse hook of the httptrace in
	// req's context.
	RoundTrip(req *http.Request, x *exchange.Exchange) (*http.Response, error)
	// Tunnel connects to x.Pool for bytes.
	Tunnel(ctx context.Context, x *exchange.Exchange) (exchange.Tunnel, error)
}

// Upstream makes of a leg that blocks one that a frontend can call. It spends
// goroutines on each exchange. What Leg says on the Exchange is there with the head
// of the answer, and with its end; not when the frontend gives up before.
type Upstream struct{ Leg Blocking }

// Start begins an exchange; see exchange.Flow.
func (u Upstream) Start(l *loop.Loop, x *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow {
	f := newFlow(l, x, front)
	f.head = r.Method == http.MethodHead
	req := f.request(r)
	go f.run(func() (*http.Response, error) { return u.Leg.RoundTrip(req, &f.mine) })
	return f
}

// Tunnel begins an exchange that carries bytes alone.
func (u Upstream) Tunnel(l *loop.Loop, x *exchange.Exchange, front exchange.Front) exchange.Flow {
	f := newFlow(l, x, front)
	go f.run(func() (*http.Response, error) {
		tunnel, err := u.Leg.Tunnel(f.ctx, &f.mine)
		if err != nil {
			return nil, err
		}
		return &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: tunnel, ContentLength: exchange.UnknownLength}, nil
	})
	return f
}

// flow is an exchange with a leg that blocks.
type flow struct {
	loop   *loop.Loop
	ctx    context.Context
	cancel context.CancelCauseFunc
	mine   exchange.Exchange // the leg's copy, since it may outlive Abort
	body   *requestBody
	window *window
	head   bool // the answer is to HEAD

	// Used on the loop alone.
	x        *exchange.Exchange
	front    exchange.Front
	over     bool
	halfOver bool // one of the two messages has ended
}

func newFlow(l *loop.Loop, x *exchange.Exchange, front exchange.Front) *flow {
	f := &flow{loop: l, x: x, mine: *x, front: front, window: newWindow(exchange.AnswerWindow)}
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	f.body = newRequestBody(func(n int) { f.tell(func() { f.front.Sent(n) }) })
	return f
}

// Data implements exchange.Flow.
func (f *flow) Data(p []byte, end bool) {
	f.body.put(p)
	if end {
		f.End(nil)
	}
}

// End implements exchange.Flow.
func (f *flow) End(trailers exchange.Fields) {
	f.body.end(trailers)
	f.ended()
}

// Consumed implements exchange.Flow.
func (f *flow) Consumed(n int) { f.window.add(n) }

// Abort implements exchange.Flow.
func (f *flow) Abort(cause error) {
	f.over = true
	f.stop(cause)
}

// ended notes that one of the messages has.
func (f *flow) ended() {
	f.over = f.over || f.halfOver
	f.halfOver = true
}

// stop ends whatever the leg waits for.
func (f *flow) stop(cause error) {
	if cause == nil {
		cause = context.Canceled
	}
	f.cancel(cause)
	f.body.fail(cause)
	f.window.close()
}

// tell has the loop call what, unless the exchange is over by then.
func (f *flow) tell(what func()) {
	posted := f.loop.Post(func() {
		if !f.over {
			what()
		}
	})
	if !posted {
		f.stop(loop.ErrStopped)
	}
}

// report is tell, with what the leg has noted on its Exchange until now.
func (f *flow) report(what func()) {
	x := f.mine
	f.tell(func() {
		*f.x = x
		what()
	})
}

// run makes the exchange. It is a goroutine.
func (f *flow) run(start func() (*http.Response, error)) {
	defer f.window.close()
	defer f.cancel(nil)
	defer func() {
		if bug := recover(); bug != nil {
			f.failed(panicked{bug})
		}
	}()
	response, err := start()
	if err != nil {
		f.failed(err)
		return
	}
	if response.Body == nil {
		response.Body = http.NoBody
	}
	defer response.Body.Close()
	// Its end closes the body, for which the leg may wait.
	defer context.AfterFunc(f.ctx, func() { response.Body.Close() })()
	if tunnel, ok := response.Body.(io.ReadWriteCloser); ok && response.StatusCode == http.StatusSwitchingProtocols {
		done := make(chan struct{})
		go func() {
			defer close(done)
			f.upload(tunnel)
		}()
		defer func() {
			if bug := recover(); bug != nil {
				f.failed(panicked{bug}) // which ends the upload
			}
			<-done
		}()
	} else {
		defer f.body.close()
	}
	f.answer(response)
}

// answer passes the response on.
func (f *flow) answer(response *http.Response) {
	switched := response.StatusCode == http.StatusSwitchingProtocols
	head := &exchange.Response{
		Status: response.StatusCode, Length: response.ContentLength, Version: exchange.HTTP11,
		Fields: fieldsOf(response.Header),
	}
	if switched {
		head.Protocol = response.Header.Get("Upgrade")
	}
	announced := slices.DeleteFunc(slices.Sorted(maps.Keys(response.Trailer)), func(name string) bool { return !exchange.TrailerAllowed(name) })
	if len(announced) > 0 {
		head.Fields.Add("Trailer", strings.Join(announced, ", "))
	}
	bare := !switched && (f.head || response.Body == http.NoBody || response.ContentLength == 0 && len(response.Trailer) == 0 ||
		response.StatusCode == http.StatusNoContent || response.StatusCode == http.StatusNotModified)
	f.report(func() {
		switch {
		case bare:
			f.ended()
		case switched:
			f.halfOver = false // the request had ended, the tunnel begins
		}
		f.front.Response(head, bare)
	})
	if !bare {
		f.download(response)
	}
}

// download passes on what the leg sends.
func (f *flow) download(response *http.Response) {
	left := response.ContentLength
	buffer := make([]byte, 32<<10)
	for {
		most := f.window.take(len(buffer))
		if most == 0 {
			return // it is over
		}
		n, err := response.Body.Read(buffer[:most])
		f.window.add(most - n)
		if n > 0 {
			data := slices.Clone(buffer[:n])
			f.tell(func() { f.front.Data(data, false) })
			left -= int64(n)
		}
		switch {
		case errors.Is(err, io.EOF) && response.ContentLength > 0 && left > 0:
			f.failed(io.ErrUnexpectedEOF)
			return
		case errors.Is(err, io.EOF):
			trailers := fieldsOf(response.Trailer)
			trailers = slices.DeleteFunc(trailers, func(field exchange.Field) bool { return !exchange.TrailerAllowed(field.Name) })
			f.report(func() {
				f.ended()
				f.front.End(trailers)
			})
			return
		case err != nil:
			f.failed(err)
			return
		}
	}
}

// upload passes on what the client sends through a tunnel.
func (f *flow) upload(tunnel io.ReadWriteCloser) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := f.body.next(buffer)
		if n > 0 {
			if _, err := tunnel.Write(buffer[:n]); err != nil {
				f.failed(err)
				return
			}
			f.tell(func() { f.front.Sent(n) })
		}
		if errors.Is(err, io.EOF) {
			if half, ok := tunnel.(interface{ CloseWrite() error }); ok {
				err = half.CloseWrite()
			} else {
				err = tunnel.Close()
			}
		}
		if err != nil {
			f.failed(err)
		}
		if n == 0 {
			return
		}
	}
}

// failed tells of the leg's failure.
func (f *flow) failed(err error) {
	f.report(func() {
		f.over = true
		f.stop(err)
		f.front.Failed(err)
	})
}

// panicked is the error of a leg that has panicked.
type panicked struct{ bug any }

// Error implements error.
func (p panicked) Error() string { return fmt.Sprintf("panic: %v", p.bug) }

// HTTPStatus says what the client is told.
func (panicked) HTTPStatus() (code int, reason string) {
	return http.StatusInternalServerError, "internal"
}

// request is r as net/http has it.
func (f *flow) request(r *exchange.Request) *http.Request {
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
		// 100 follows from the body's being read.
		if code > http.StatusSwitchingProtocols {
			head := &exchange.Response{Status: code, Fields: fieldsOf(http.Header(header)), Version: exchange.HTTP11}
			f.tell(func() { f.front.Informational(head) })
		}
		return nil
	}}
	req := (&http.Request{
		Method: r.Method, Host: r.Authority, RequestURI: r.Target, ContentLength: r.Length, RemoteAddr: f.x.Source.String(),
	}).WithContext(httptrace.WithClientTrace(f.ctx, trace))
	target, err := url.ParseRequestURI(r.Target)
	if err != nil {
		target = &url.URL{Opaque: r.Target}
	}
	target.Scheme, target.Host = "https", r.Authority
	req.URL = target
	req.Proto = r.Version.String()
	req.ProtoMajor, req.ProtoMinor, _ = http.ParseHTTPVersion(req.Proto)
	req.Header = headerOf(r.Fields)
	if r.Protocol != "" {
		req.Header["Connection"], req.Header["Upgrade"] = []string{"Upgrade"}, []string{r.Protocol}
	}
	if r.Trailers {
		req.Header["Te"] = []string{"trailers"}
	}
	if r.Length > 0 {
		req.Header["Content-Length"] = []string{strconv.FormatInt(r.Length, 10)}
	}
	if r.Continue {
		req.Header["Expect"] = []string{"100-continue"}
		f.body.wanted = func() {
			f.tell(func() {
				f.front.Informational(&exchange.Response{Status: http.StatusContinue, Version: exchange.HTTP11})
			})
		}
	}
	if r.Length == 0 {
		f.halfOver = true
		return req
	}
	req.Trailer = http.Header{}
	for announced := range r.Fields.Values("Trailer") {
		for name := range strings.SplitSeq(announced, ",") {
			req.Trailer[http.CanonicalHeaderKey(strings.TrimSpace(name))] = nil
		}
	}
	delete(req.Header, "Trailer")
	f.body.trailer = req.Trailer
	req.Body = f.body
	return req
}

// headerOf returns fields as net/http has them.
func headerOf(fields exchange.Fields) http.Header {
	header := http.Header{}
	for _, field := range fields {
		header.Add(field.Name, field.Value)
	}
	if _, ok := header["User-Agent"]; !ok {
		header["User-Agent"] = nil // keeps transports from adding their own
	}
	return header
}

// fieldsOf returns a header without what concerns one connection alone.
func fieldsOf(header http.Header) exchange.Fields {
	var fields exchange.Fields
	for _, canonical := range slices.Sorted(maps.Keys(header)) {
		what := exchange.NameOf(canonical)
		if what.HopByHop() || what == exchange.ContentLength ||
			exchange.Removable(canonical) && httpguts.HeaderValuesContainsToken(header["Connection"], canonical) {
			continue
		}
		for _, value := range header[canonical] {
			fields.Add(canonical, strings.TrimSpace(value))
		}
	}
	return fields
}

// requestBody is what a client sends, for a leg that blocks.
type requestBody struct {
	sent    func(int)   // told what Read has taken
	wanted  func()      // told of the first Read; may be nil
	trailer http.Header // gets the trailers before io.EOF is returned; may be nil

	mu       sync.Mutex
	changed  sync.Cond
	data     []byte
	trailers exchange.Fields
	ended    bool
	closed   bool
	err      error
}

func newRequestBody(sent func(int)) *requestBody {
	b := &requestBody{sent: sent}
	b.changed.L = &b.mu
	return b
}

// Read implements io.Reader.
func (b *requestBody) Read(p []byte) (int, error) {
	if b.wanted != nil {
		b.wanted()
		b.wanted = nil
	}
	n, err := b.next(p)
	if n > 0 {
		b.sent(n)
	}
	return n, err
}

// next is Read whose caller sees to what is sent.
func (b *requestBody) next(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.data) == 0 && !b.ended && !b.closed && b.err == nil {
		b.changed.Wait()
	}
	switch {
	case b.closed:
		return 0, http.ErrBodyReadAfterClose
	case b.err != nil:
		return 0, b.err
	case len(b.data) > 0:
		n := copy(p, b.data)
		b.data = b.data[n:]
		return n, nil
	}
	for _, field := range b.trailers {
		if b.trailer != nil {
			b.trailer.Add(field.Name, field.Value)
		}
	}
	b.trailers = nil
	return 0, io.EOF
}

// Close implements io.Closer.
func (b *requestBody) Close() error {
	b.close()
	return nil
}

// close has the rest thrown away.
func (b *requestBody) close() {
	b.mu.Lock()
	left := len(b.data)
	b.data, b.closed = nil, true
	b.changed.Broadcast()
	b.mu.Unlock()
	if left > 0 {
		b.sent(left)
	}
}

func (b *requestBody) put(p []byte) {
	b.mu.Lock()
	closed := b.closed
	if !closed {
		b.data = append(b.data, p...)
	}
	b.changed.Broadcast()
	b.mu.Unlock()
	if closed {
		b.sent(len(p))
	}
}

func (b *requestBody) end(trailers exchange.Fields) {
	b.mu.Lock()
	b.ended, b.trailers = true, slices.Clone(trailers)
	b.changed.Broadcast()
	b.mu.Unlock()
}

func (b *requestBody) fail(err error) {
	b.mu.Lock()
	if b.err == nil {
		b.err = err
	}
	b.changed.Broadcast()
	b.mu.Unlock()
}

// window is how many bytes may still be handed to the frontend.
type window struct {
	mu      sync.Mutex
	changed sync.Cond
	left    int
	closed  bool
}

func newWindow(size int) *window {
	w := &window{left: size}
	w.changed.L = &w.mu
	return w
}

// take waits for some of the window, and returns how much it got, at most most. 0:
// it is closed.
func (w *window) take(most int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.left <= 0 && !w.closed {
		w.changed.Wait()
	}
	if w.closed {
		return 0
	}
	n := min(most, w.left)
	w.left -= n
	return n
}

func (w *window) add(n int) {
	w.mu.Lock()
	w.left += n
	w.changed.Broadcast()
	w.mu.Unlock()
}

func (w *window) close() {
	w.mu.Lock()
	w.closed = true
	w.changed.Broadcast()
	w.mu.Unlock()
}
