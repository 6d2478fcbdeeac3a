package legtest

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// script is a backend that does what a test says.
type script struct {
	start func(e *echo)
}

func (s script) Start(l *loop.Loop, x *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow {
	e := &echo{l: l, r: r, front: front, aborted: make(chan error, 1)}
	x.Endpoint = "the endpoint"
	l.Post(func() { s.start(e) })
	return e
}

func (s script) Tunnel(l *loop.Loop, x *exchange.Exchange, front exchange.Front) exchange.Flow {
	return s.Start(l, x, &exchange.Request{}, front)
}

// echo sends back what it gets, as the windows let it.
type echo struct {
	l       *loop.Loop
	r       *exchange.Request
	front   exchange.Front
	room    int
	held    []byte
	ends    bool
	trailer exchange.Fields
	aborted chan error
}

func (e *echo) Data(p []byte, end bool) {
	e.held, e.ends = append(e.held, p...), end
	e.l.Post(e.pass)
}

func (e *echo) End(trailers exchange.Fields) {
	e.trailer, e.ends = trailers, true
	e.l.Post(e.pass)
}

func (e *echo) Consumed(n int) {
	e.room += n
	e.l.Post(e.pass)
}

func (e *echo) Abort(cause error) { e.aborted <- cause }

func (e *echo) pass() {
	n := min(len(e.held), e.room)
	if n > 0 {
		e.front.Data(e.held[:n], false)
		e.front.Sent(n)
		e.room -= n
		e.held = e.held[n:]
	}
	if e.ends && len(e.held) == 0 {
		e.ends = false
		e.front.End(e.trailer)
	}
}

func (e *echo) answer(r exchange.Response) {
	r.Version, r.Length = exchange.HTTP11, exchange.UnknownLength
	e.front.Response(&r, false)
	e.room = exchange.AnswerWindow
	e.pass()
}

func begin(t *testing.T, start func(e *echo)) *RoundTripper {
	t.Helper()
	group := loop.New(loop.Config{Loops: 2, Panicked: func(bug any, stack []byte) { t.Errorf("panic: %v\n%s", bug, stack) }})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- group.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &RoundTripper{Backend: script{start}, Loops: group}
}

func TestRoundTrip(t *testing.T) {
	content := strings.Repeat("0123456789abcdef", 100_000) // several windows
	var seen *exchange.Request
	rt := begin(t, func(e *echo) {
		seen = e.r
		e.front.Informational(&exchange.Response{Status: 103, Fields: exchange.Fields{{Name: "link", Value: "</a>"}}})
		e.front.Informational(&exchange.Response{Status: 100})
		e.answer(exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "x-Odd", Value: "1"}, {Name: "Trailer", Value: "X-End"}}})
	})
	var interims []int
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
		interims = append(interims, code)
		return nil
	}})
	req := httptest.NewRequestWithContext(ctx, http.MethodPost, "https://a.test/p?q", io.NopCloser(strings.NewReader(content)))
	req.Header = http.Header{"Expect": {"100-continue"}, "Te": {"trailers"}, "Connection": {"close"}, "X-A": {"1", "2"}}
	req.Trailer = http.Header{"X-End": {"yes"}}
	x := exchange.Exchange{}
	resp, err := rt.RoundTrip(req, &x)
	if err != nil {
		t.Fatal(err)
	}
	if x.Endpoint != "the endpoint" {
		t.Errorf("%+v", x)
	}
	got, err := io.ReadAll(resp.Body)
	if err != nil || string(got) != content {
		t.Errorf("%d bytes of %d, %v", len(got), len(content), err)
	}
	if resp.Trailer.Get("X-End") != "yes" || resp.Header.Get("X-Odd") != "1" || len(interims) != 2 {
		t.Errorf("trailer %v, header %v, interims %v", resp.Trailer, resp.Header, interims)
	}
	if err := resp.Body.Close(); err != nil {
		t.Error(err)
	}
	if r := seen; r.Method != "POST" || r.Authority != "a.test" || r.Target != "https://a.test/p?q" || r.Length != -1 || !r.Continue || !r.Trailers ||
		r.Fields.Get("x-a") != "1" || r.Fields.Has("Connection") || r.Fields.Get("Trailer") != "X-End" {
		t.Errorf("%+v", r)
	}
}

func TestUpgrade(t *testing.T) {
	rt := begin(t, func(e *echo) { e.answer(exchange.Response{Status: 101, Protocol: "echo"}) })
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "https://a.test/", nil)
	req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"echo"}}
	resp, err := rt.RoundTrip(req, &exchange.Exchange{})
	if err != nil {
		t.Fatal(err)
	}
	passes(t, resp.Body.(exchange.Tunnel))
	tunnel, err := rt.Tunnel(t.Context(), &exchange.Exchange{})
	if err != nil {
		t.Fatal(err)
	}
	passes(t, tunnel)
}

func passes(t *testing.T, tunnel exchange.Tunnel) {
	t.Helper()
	if _, err := tunnel.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := tunnel.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(tunnel); string(got) != "hello" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := tunnel.Close(); err != nil {
		t.Error(err)
	}
}

func TestFailures(t *testing.T) {
	broken := errors.New("broken")
	for name, fails := range map[string]func(e *echo){
		"before the head": func(e *echo) { e.front.Failed(broken) },
		"in the body": func(e *echo) {
			e.answer(exchange.Response{Status: 200})
			e.front.Failed(broken)
		},
	} {
		rt := begin(t, fails)
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "https://a.test/", nil)
		resp, err := rt.RoundTrip(req, &exchange.Exchange{})
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCallerLeaves: whichever way the caller goes, the backend hears why.
func TestCallerLeaves(t *testing.T) {
	flows := make(chan *echo, 1)
	silent := begin(t, func(e *echo) { flows <- e })
	ctx, cancel := context.WithCancel(t.Context())
	req := httptest.NewRequestWithContext(ctx, http.MethodGet, "https://a.test/", nil)
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := silent.RoundTrip(req, &exchange.Exchange{}); err != context.Canceled {
		t.Error(err)
	}
	if cause := <-(<-flows).aborted; cause != context.Canceled {
		t.Error(cause)
	}

	short := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "https://a.test/", io.NopCloser(strings.NewReader("12")))
	short.ContentLength = 3
	if _, err := silent.RoundTrip(short, &exchange.Exchange{}); err != errShortBody {
		t.Error(err)
	}
	if cause := <-(<-flows).aborted; cause != errShortBody {
		t.Error(cause)
	}

	answers := begin(t, func(e *echo) {
		flows <- e
		e.answer(exchange.Response{Status: 200})
	})
	req = httptest.NewRequestWithContext(t.Context(), http.MethodGet, "https://a.test/", nil)
	resp, err := answers.RoundTrip(req, &exchange.Exchange{})
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if cause := <-(<-flows).aborted; cause != errClosed {
		t.Error(cause)
	}
	if _, err := resp.Body.Read(make([]byte, 1)); err != http.ErrBodyReadAfterClose {
		t.Error(err)
	}
}
