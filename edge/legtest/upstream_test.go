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
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// fakeLeg implements Blocking.
type fakeLeg struct {
	roundTrip func(*http.Request, *exchange.Exchange) (*http.Response, error)
	tunnel    func(context.Context, *exchange.Exchange) (exchange.Tunnel, error)
}

func (f fakeLeg) RoundTrip(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
	return f.roundTrip(r, x)
}

func (f fakeLeg) Tunnel(ctx context.Context, x *exchange.Exchange) (exchange.Tunnel, error) {
	return f.tunnel(ctx, x)
}

// notes is a Front that writes down what it is told.
type notes struct {
	told chan string
	flow exchange.Flow
	sent int
	hold bool // nothing is consumed
}

func (n *notes) Informational(r *exchange.Response) { n.told <- fmt.Sprint("informational ", r.Status) }
func (n *notes) Response(r *exchange.Response, end bool) {
	n.told <- fmt.Sprint("response ", r.Status, " ", r.Length, " ", r.Fields, " ", end)
}
func (n *notes) Data(p []byte, end bool) {
	n.told <- fmt.Sprintf("data %d %t", len(p), end)
	if !n.hold {
		n.flow.Consumed(len(p))
	}
}
func (n *notes) End(trailers exchange.Fields) { n.told <- fmt.Sprint("end ", trailers) }
func (n *notes) Failed(err error)             { n.told <- fmt.Sprint("failed ", err) }
func (n *notes) Sent(size int)                { n.sent += size }

// next is what the Front is told next.
func (n *notes) next(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-n.told:
		if got != want {
			t.Fatalf("told %q, want %q", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("was not told %q", want)
	}
}

// running is a loop that runs until the test's end.
func running(t *testing.T) *loop.Loop {
	t.Helper()
	group := loop.New(loop.Config{Loops: 1})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- group.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return group.Loops()[0]
}

// on has the loop call f, and waits.
func on(l *loop.Loop, f func()) {
	done := make(chan struct{})
	l.Post(func() {
		defer close(done)
		f()
	})
	<-done
}

func TestUpstreamExchange(t *testing.T) {
	leg := fakeLeg{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		x.Endpoint = "192.0.2.1:443"
		if r.Method != "POST" || r.Host != "app.test" || r.URL.Path != "/a b" || r.RequestURI != "/a%20b?q" || r.Header.Get("X-One") != "1" ||
			r.Header.Get("Te") != "trailers" {
			t.Errorf("request %+v", r)
		}
		_ = httptrace.ContextClientTrace(r.Context()).Got1xxResponse(103, textproto.MIMEHeader{"Link": {"</x>"}})
		body, err := io.ReadAll(r.Body)
		if err != nil || string(body) != "body" || r.Trailer.Get("X-Sum") != "4" {
			t.Errorf("body %q, %v; trailer %v", body, err, r.Trailer)
		}
		return &http.Response{
			StatusCode: 200, Header: http.Header{"X-Two": {"2"}, "Connection": {"close"}}, ContentLength: -1,
			Body: io.NopCloser(strings.NewReader("answer")), Trailer: http.Header{"X-End": {"6"}, "Content-Length": {"1"}},
		}, nil
	}}
	l, n, x := running(t), &notes{told: make(chan string, 100)}, &exchange.Exchange{}
	on(l, func() {
		n.flow = Upstream{leg}.Start(l, x, &exchange.Request{
			Method: "POST", Authority: "app.test", Target: "/a%20b?q", Fields: exchange.Fields{{Name: "x-ONE", Value: "1"}},
			Length: exchange.UnknownLength, Version: exchange.HTTP11, Continue: true, Trailers: true,
		}, n)
		n.flow.Data([]byte("bo"), false)
		n.flow.Data([]byte("dy"), false)
		n.flow.End(exchange.Fields{{Name: "x-sum", Value: "4"}})
	})
	n.next(t, "informational 103")
	n.next(t, "informational 100")
	n.next(t, "response 200 -1 [{X-Two 2 false} {Trailer X-End false}] false")
	n.next(t, "data 6 false")
	n.next(t, "end [{X-End 6 false}]")
	on(l, func() {
		if n.sent != 4 || x.Endpoint != "192.0.2.1:443" {
			t.Errorf("sent %d, endpoint %q", n.sent, x.Endpoint)
		}
	})
}

// TestUpstreamWindow has a leg send more than the client takes.
func TestUpstreamWindow(t *testing.T) {
	leg := fakeLeg{roundTrip: func(*http.Request, *exchange.Exchange) (*http.Response, error) {
		return &http.Response{StatusCode: 200, ContentLength: -1, Body: io.NopCloser(strings.NewReader(strings.Repeat("x", exchange.AnswerWindow+1)))}, nil
	}}
	l, n := running(t), &notes{told: make(chan string, 100), hold: true}
	on(l, func() {
		n.flow = Upstream{leg}.Start(l, &exchange.Exchange{}, &exchange.Request{Method: "GET", Target: "/", Version: exchange.HTTP11}, n)
	})
	n.next(t, "response 200 -1 [] false")
	for range exchange.AnswerWindow / (32 << 10) {
		n.next(t, "data 32768 false")
	}
	on(l, func() { n.flow.Consumed(1) })
	n.next(t, "data 1 false")
	on(l, func() { n.flow.Consumed(1) }) // and so it comes to the end
	n.next(t, "end []")
}

func TestUpstreamFailures(t *testing.T) {
	cause := errors.New("the client has gone")
	ended := make(chan error, 1)
	for name, test := range map[string]struct {
		leg   func(*http.Request, *exchange.Exchange) (*http.Response, error)
		abort bool
		want  string
	}{
		"error": {func(*http.Request, *exchange.Exchange) (*http.Response, error) { return nil, io.ErrNoProgress }, false, "failed " + io.ErrNoProgress.Error()},
		"panic": {func(*http.Request, *exchange.Exchange) (*http.Response, error) { panic("oops") }, false, "failed panic: oops"},
		"abort": {func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
			<-r.Context().Done()
			ended <- context.Cause(r.Context())
			return nil, r.Context().Err()
		}, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			l, n := running(t), &notes{told: make(chan string, 100)}
			on(l, func() {
				n.flow = Upstream{fakeLeg{roundTrip: test.leg}}.Start(l, &exchange.Exchange{}, &exchange.Request{Method: "GET", Target: "/"}, n)
				if test.abort {
					n.flow.Abort(cause)
				}
			})
			if !test.abort {
				n.next(t, test.want)
			} else if got := <-ended; !errors.Is(got, cause) {
				t.Errorf("ended by %v", got)
			}
		})
	}
}

func TestUpstreamTunnel(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	leg := fakeLeg{tunnel: func(context.Context, *exchange.Exchange) (exchange.Tunnel, error) {
		conn, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	}}
	l, n := running(t), &notes{told: make(chan string, 100)}
	on(l, func() { n.flow = Upstream{leg}.Tunnel(l, &exchange.Exchange{}, n) })
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	n.next(t, "response 101 -1 [] false")
	on(l, func() {
		n.flow.Data([]byte("to the backend"), false)
		n.flow.End(nil)
	})
	if got, err := io.ReadAll(conn); err != nil || string(got) != "to the backend" {
		t.Errorf("the backend read %q, %v", got, err)
	}
	if _, err := io.WriteString(conn, "late"); err != nil {
		t.Error(err)
	}
	conn.Close()
	n.next(t, "data 4 false")
	n.next(t, "end []")
}
