package h2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

const patience = 30 * time.Second // of tests on a busy machine; nothing takes a second on a quiet one

// wire is a connection without TLS: a Transport, and the Handler of its loop.
type wire struct {
	*loop.Conn
	b *bench
}

func (w *wire) Written() int64                     { return w.Stats().Out }
func (w *wire) Close()                             { w.Conn.Close(loop.Farewell{Within: time.Second, FIN: true}) }
func (w *wire) Data(_ *loop.Conn, p []byte)        { w.b.conn.Data(p) }
func (w *wire) Writable(*loop.Conn)                { w.b.conn.Writable() }
func (w *wire) PeerEnded(*loop.Conn, bool)         { w.b.conn.PeerEnded() }
func (w *wire) Closed(_ *loop.Conn, _ loop.Ending) { w.b.conn.Closed(nil) }

func (w *wire) Open(c *loop.Conn) {
	w.Conn = c
	w.b.conn = New(w, Config{
		MaxHeaderBytes: 1 << 20, Owner: w.b, TakeTime: func() time.Duration { return w.b.takeTime },
	})
	close(w.b.opened)
}

// bench is a connection with its owner, which notes what it is told. What it notes
// belongs to the loop.
type bench struct {
	t        *testing.T
	loop     *loop.Loop
	conn     *Conn
	opened   chan struct{}
	takeTime time.Duration

	limits   []int
	over     int
	free     int
	answered int
	unwanted int
	stuck    []bool
	ended    error
}

func (b *bench) Settled(n int)                       { b.limits = append(b.limits, n) }
func (b *bench) Unwanted()                           { b.unwanted++ }
func (b *bench) Stuck(is bool)                       { b.stuck = append(b.stuck, is) }
func (b *bench) Response(uint64, *exchange.Response) {}
func (b *bench) Failed(f Failure) error              { return &failed{f} }
func (b *bench) Ended(err error)                     { b.ended = err }

func (b *bench) Free(over, free int, answered bool) {
	b.over += over
	b.free += free
	if answered {
		b.answered++
	}
}

type failed struct{ Failure }

func (f *failed) Error() string { return fmt.Sprintf("%+v", f.Failure) }
func (f *failed) Unwrap() error { return f.Err }

// dial connects to what serve serves.
func dial(t *testing.T, serve func(net.Conn), options ...func(*bench)) *bench {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	group := loop.New(loop.Config{Loops: 1, Panicked: func(bug any, stack []byte) { t.Errorf("panic: %v\n%s", bug, stack) }})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := group.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	var served net.Conn
	accepted := make(chan struct{})
	running.Go(func() {
		c, err := listener.Accept()
		served = c
		close(accepted)
		if err == nil {
			serve(c)
		}
	})
	socket, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	<-accepted
	t.Cleanup(func() {
		listener.Close()
		cancel()
		served.Close()
		running.Wait()
	})
	b := &bench{t: t, loop: group.Loops()[0], opened: make(chan struct{})}
	for _, option := range options {
		option(b)
	}
	if err := b.loop.Join(loop.NewWire(socket), nil, &wire{b: b}); err != nil {
		t.Fatal(err)
	}
	<-b.opened
	b.eventually("SETTINGS have come", func() bool { return len(b.limits) > 0 || b.ended != nil })
	return b
}

// on runs f on the loop and waits for it.
func (b *bench) on(f func()) {
	b.t.Helper()
	done := make(chan struct{})
	b.loop.Post(func() { defer close(done); f() })
	select {
	case <-done:
	case <-time.After(patience):
		b.t.Fatal("the loop hangs")
	}
}

func (b *bench) eventually(what string, is func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		ok := false
		b.on(func() { ok = is() })
		if ok {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("never: %s", what)
		}
	}
}

// client is a Front that takes what comes, and consumes it if it is hungry.
type client struct {
	b        *bench
	flow     exchange.Flow
	hungry   bool
	interims []int
	head     *exchange.Response
	got      bytes.Buffer
	ended    bool
	trailers exchange.Fields
	failed   *failed
	sent     int
	over     bool // nothing may be called
	calling  bool // a call of the Flow is under way
	then     func()
}

// begin begins a request. It is called on the loop.
func (b *bench) begin(r *exchange.Request) *client {
	c := &client{b: b, hungry: true}
	if r.Method == "" {
		r.Method = "GET"
	}
	r.Scheme, r.Authority = "https", "a.test"
	if r.Target == "" {
		r.Target = "/"
	}
	c.calling = true
	c.flow = b.conn.Begin(1, r, c)
	c.calling = false
	return c
}

// get makes a request and waits for its end.
func (b *bench) get(target string) *client {
	b.t.Helper()
	var c *client
	b.on(func() { c = b.begin(&exchange.Request{Target: target}) })
	c.wait()
	return c
}

func (c *client) wait() {
	c.b.t.Helper()
	c.b.eventually("the exchange has ended", func() bool { return c.ended || c.failed != nil })
}

func (c *client) call(f func()) {
	c.calling = true
	f()
	c.calling = false
}

func (c *client) live() {
	if c.over || c.calling {
		c.b.t.Errorf("called after the end (%t) or from within a call (%t)", c.over, c.calling)
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
	c.got.Write(p)
	c.ended = end
	if c.hungry && !end {
		c.flow.Consumed(len(p))
	}
	if c.then != nil {
		c.then()
	}
}

func (c *client) End(trailers exchange.Fields) {
	c.live()
	c.trailers, c.ended = trailers, true
}

func (c *client) Failed(err error) {
	c.live()
	c.over = true
	if !errors.As(err, &c.failed) {
		c.b.t.Errorf("%v", err)
	}
}

func (c *client) Sent(n int) {
	c.live()
	c.sent += n
}

// upload sends content as the window lets it.
func (c *client) upload(content []byte, trailers exchange.Fields) {
	offset := 0
	for offset < len(content) {
		c.b.eventually("there is room", func() bool {
			if c.failed != nil {
				return true
			}
			n := min(10_000, len(content)-offset, exchange.UploadWindow-(offset-c.sent))
			if n > 0 {
				c.call(func() { c.flow.Data(content[offset:offset+n], offset+n == len(content) && trailers == nil) })
				offset += n
			}
			return n > 0
		})
		if c.failed != nil {
			return
		}
	}
	if trailers != nil || len(content) == 0 {
		c.b.on(func() { c.call(func() { c.flow.End(trailers) }) })
	}
}

// site serves what the tests ask for.
func site() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(bytes.Repeat([]byte("0123456789abcdef"), 200_000))
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		if r.URL.RawQuery == "early" {
			w.WriteHeader(http.StatusEarlyHints)
		}
		n, _ := io.Copy(w, r.Body)
		w.Header().Set("X-Sum", fmt.Sprint(n, r.Trailer.Get("X-Last")))
		w.Header().Set(http.TrailerPrefix+"Set-Cookie", "no")
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Method) })
	return mux
}

func serveHTTP(handler http.Handler, server *http2.Server) func(net.Conn) {
	return func(c net.Conn) { server.ServeConn(c, &http2.ServeConnOpts{Handler: handler}) }
}

// peer is a backend frame by frame.
type peer struct {
	*http2.Framer
	net.Conn
	block   bytes.Buffer
	encoder *hpack.Encoder
}

// frames serves by frames, once the preface has come. settings are its first.
func frames(serve func(*peer), settings ...http2.Setting) func(net.Conn) {
	return func(c net.Conn) {
		preface := make([]byte, len(http2.ClientPreface))
		if _, err := io.ReadFull(c, preface); err != nil {
			return
		}
		p := &peer{Framer: http2.NewFramer(c, c), Conn: c}
		p.encoder = hpack.NewEncoder(&p.block)
		_ = p.WriteSettings(settings...)
		serve(p)
	}
}

// next returns the next frame that is no SETTINGS and no WINDOW_UPDATE, nil at the
// end.
func (p *peer) next() http2.Frame {
	for {
		frame, err := p.ReadFrame()
		if err != nil {
			return nil
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = p.WriteSettingsAck()
			}
		case *http2.WindowUpdateFrame:
		default:
			return frame
		}
	}
}

// head answers with a status.
func (p *peer) head(stream uint32, status string, end bool) {
	p.block.Reset()
	_ = p.encoder.WriteField(hpack.HeaderField{Name: ":status", Value: status})
	_ = p.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: p.block.Bytes(), EndHeaders: true, EndStream: end})
}
