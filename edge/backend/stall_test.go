package backend

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// A stalled peer is cut off after 25 s and more. Nobody else waits for it: each
// other request and each update is through long before, on a busy machine too.
const stallBound = 10 * time.Second

// stallingServer serves all connections but the first, of which it stops reading
// and writing in a state of its own.
type stallingServer struct {
	addr    string
	stalled chan struct{} // closed when the state is reached
}

// stallAt runs handle on the first connection. When it returns the connection
// stays open, unread. Others go to next, if it is not nil.
func stallAt(t testing.TB, alpn string, handle func(*serverConn), next http.Handler) *stallingServer {
	s := &stallingServer{stalled: make(chan struct{})}
	end := make(chan struct{})
	var mu sync.Mutex
	first := true
	raw := serveRaw(t, func(c *serverConn) {
		mu.Lock()
		mine := first
		first = false
		mu.Unlock()
		switch {
		case mine:
			handle(c)
			close(s.stalled)
			<-end
		case alpn == "h2" && c.Handshake() == nil:
			(&http2.Server{}).ServeConn(c.Conn, &http2.ServeConnOpts{Handler: next})
		case alpn != "h2":
			br := bufio.NewReader(c)
			for {
				if _, _, err := request(br); err != nil {
					return
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
		}
	})
	t.Cleanup(func() { close(end) }) // before the server's own
	raw.tls.NextProtos = []string{alpn}
	s.addr = raw.addr
	return s
}

// h2Until speaks HTTP/2 until a frame satisfies stop. All windows are wide open.
func h2Until(stop func(*http2.Framer, http2.Frame) bool) func(*serverConn) {
	return func(c *serverConn) {
		preface := make([]byte, len(http2.ClientPreface))
		if _, err := io.ReadFull(c, preface); err != nil {
			return
		}
		f := http2.NewFramer(c, c)
		f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
		f.WriteWindowUpdate(0, 1<<31-1-65535)
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				return
			}
			if s, ok := frame.(*http2.SettingsFrame); ok && !s.IsAck() {
				f.WriteSettingsAck()
			}
			if stop(f, frame) {
				return
			}
		}
	}
}

func isHeaders(_ *http2.Framer, f http2.Frame) bool { return f.Header().Type == http2.FrameHeaders }

// answers sends the head of an answer, and the body that is wanted, to the
// request's headers.
func answers(body string, endStream bool) func(*http2.Framer, http2.Frame) bool {
	return func(f *http2.Framer, frame http2.Frame) bool {
		if !isHeaders(f, frame) {
			return false
		}
		id := frame.Header().StreamID
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte{0x88}, EndHeaders: true})
		f.WriteData(id, endStream, []byte(body))
		return true
	}
}

func readRequest(c *serverConn) *bufio.Reader {
	br := bufio.NewReader(c)
	_, _, _ = request(br)
	return br
}

// stalls are the states in which a peer stops.
var stalls = map[string]struct {
	alpn   string
	handle func(*serverConn)
	upload bool // the request has a body without an end
}{
	"handshake":        {"h2", func(*serverConn) {}, false},
	"h2 settings":      {"h2", func(c *serverConn) { _ = c.Handshake() }, false},
	"h2 request head":  {"h2", h2Until(isHeaders), false},
	"h2 request body":  {"h2", h2Until(isHeaders), true},
	"h2 response body": {"h2", h2Until(answers("some", false)), false},
	"h2 both bodies":   {"h2", h2Until(answers("some", false)), true},
	"h2 close":         {"h2", h2Until(answers("all", true)), false},
	"h1 request head":  {"http/1.1", func(c *serverConn) { _, _ = c.Read(make([]byte, 1)) }, false},
	"h1 request body":  {"http/1.1", func(c *serverConn) { _, _ = c.Read(make([]byte, 1)) }, true},
	"h1 response head": {"http/1.1", func(c *serverConn) { readRequest(c); io.WriteString(c, "HTTP/1.1 200 OK\r\nA:") }, false},
	"h1 response body": {"http/1.1", func(c *serverConn) {
		readRequest(c)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsome")
	}, false},
	"h1 informational": {"http/1.1", func(c *serverConn) { readRequest(c); io.WriteString(c, "HTTP/1.1 103 Early\r\n\r\n") }, false},
	"h1 close":         {"http/1.1", func(c *serverConn) { readRequest(c); io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") }, false},
	"h1 chunk of response": {"http/1.1", func(c *serverConn) {
		readRequest(c)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nso")
	}, false},
}

// unending is a body that never ends, but for its request's context.
type unending struct{ context.Context }

func (e unending) Read(p []byte) (int, error) { return len(p), e.Err() }

func TestStalledPeerDelaysNobody(t *testing.T) {
	for name, stall := range stalls {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var wg sync.WaitGroup
			t.Cleanup(wg.Wait) // when the stalled connection has been ended
			healthy := serve(t, site())
			s := stallAt(t, stall.alpn, stall.handle, site())
			x := newBench(t, []string{healthy.addr})
			// Sweeps come every 5 ms.
			stalledSpec := proto.CloneOf(x.spec)
			stalledSpec.Endpoints = []*resealv1.Endpoint{{Address: s.addr}}
			stalledSpec.Connections.IdleTimeout = dur(40 * time.Millisecond)
			update := func(pools ...exchange.Pool) { x.b.Update(append(pools, x.pool)) }
			stalled := poolOf("stalled", "other", stalledSpec)
			update(stalled)
			ctx, cancel := context.WithCancel(t.Context())
			wg.Go(func() {
				call := newCall()
				call.Pool = "stalled"
				req := newRequest(t, "POST", "/", nil)
				if stall.upload {
					req.Body, req.ContentLength = io.NopCloser(unending{ctx}), -1
				}
				if resp, err := x.RoundTrip(req.WithContext(ctx), call); err == nil {
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			})
			defer cancel()
			<-s.stalled
			time.Sleep(200 * time.Millisecond) // buffers fill up
			var worst, worstUpdate time.Duration
			timed := func(d *time.Duration, f func()) {
				begin := time.Now()
				f()
				*d = max(*d, time.Since(begin))
			}
			for i := range 40 {
				timed(&worst, func() { x.get("/bytes/10") })
				timed(&worstUpdate, func() {
					spec := proto.CloneOf(stalledSpec)
					spec.Connections.MaxIdlePerEndpoint = uint32(i + 1)
					update(poolOf("stalled", "other", spec), poolOf(fmt.Sprint("new", i), "third", x.spec))
				})
			}
			timed(&worstUpdate, func() { update() })
			t.Logf("worst request %v, worst update %v", worst, worstUpdate)
			if worst > stallBound || worstUpdate > stallBound {
				t.Errorf("a request took %v, an update %v while another pool's endpoint is stalled", worst, worstUpdate)
			}
		})
	}
}

// A connection that its peer does not read gets no further requests.
func TestStuckH2ConnectionIsAvoided(t *testing.T) {
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait) // when the stalled connection has been ended
	s := stallAt(t, "h2", h2Until(isHeaders), site())
	x := newBench(t, []string{s.addr})
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		req := newRequest(t, "POST", "/", io.NopCloser(unending{ctx}))
		if resp, err := x.RoundTrip(req.WithContext(ctx), newCall()); err == nil {
			resp.Body.Close()
		}
	})
	defer cancel()
	<-s.stalled
	eventually(t, "the Write is held up", func() bool {
		for _, c := range x.b.open() {
			if h, ok := c.speaker.(*h2Conn); ok && h.isStuck() {
				return true
			}
		}
		return false
	})
	begin := time.Now()
	x.get("/bytes/10")
	if took := time.Since(begin); took > stallBound {
		t.Errorf("took %v behind a connection that nobody reads", took)
	}
}

func (h *h2Conn) isStuck() bool {
	h.e.mu.Lock()
	defer h.e.mu.Unlock()
	return h.stuck
}

// An update that takes long to make a pool holds up no request.
func TestRequestsDontWaitForUpdates(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	reached, release := make(chan struct{}), make(chan struct{})
	counters := x.b.cfg.Counters
	x.b.cfg.Counters = func(pool string) exchange.Counters {
		if pool == "slow" {
			close(reached)
			<-release
		}
		return counters(pool)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		x.b.Update([]exchange.Pool{x.pool, poolOf("slow", "identity", x.spec)})
	}()
	<-reached
	x.get("/bytes/10")
	close(release)
	<-done
}

// An update costs what it changes, however many pools there are.
func TestUnchangedPoolsCostNothing(t *testing.T) {
	spec := &resealv1.BackendPool{
		Tls:           &resealv1.BackendTLS{ServerName: testName},
		LoadBalancing: &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_RING_HASH},
	}
	for i := range 8 {
		spec.Endpoints = append(spec.Endpoints, &resealv1.Endpoint{Address: fmt.Sprintf("127.0.0.1:%d", i+1)})
	}
	pools := func(changed string) []exchange.Pool {
		var all []exchange.Pool
		for i := range 200 {
			one, name := proto.CloneOf(spec), fmt.Sprint("pool", i)
			if name == changed {
				one.Endpoints[0].Weight = proto.Uint32(7)
			}
			all = append(all, poolOf(name, "identity", one))
		}
		return all
	}
	x := newBench(t, nil)
	x.b.Update(pools(""))
	before := map[string]*poolState{}
	for name, p := range *x.b.pools.Load() {
		before[name] = p.state.Load()
	}
	x.b.Update(pools("pool7"))
	for name, p := range *x.b.pools.Load() {
		if made := p.state.Load() != before[name]; made != (name == "pool7") {
			t.Errorf("%s was made anew: %v", name, made)
		}
	}
}

// BenchmarkUpdateOneOfThousand is an update of 1,000 ring_hash pools that
// changes one.
func BenchmarkUpdateOneOfThousand(b *testing.B) {
	spec := &resealv1.BackendPool{LoadBalancing: &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_RING_HASH}}
	for i := range 8 {
		spec.Endpoints = append(spec.Endpoints, &resealv1.Endpoint{Address: fmt.Sprintf("127.0.0.1:%d", i+1)})
	}
	var pools []exchange.Pool
	for i := range 1000 {
		pools = append(pools, poolOf(fmt.Sprint("pool", i), "identity", spec))
	}
	x := New(Config{Handshaker: newFakeSessions(), Counters: func(string) exchange.Counters { return newTally() }})
	x.Update(pools)
	for i := 0; b.Loop(); i++ {
		changed := proto.CloneOf(spec).WithDefaults()
		changed.Endpoints[0].Weight = proto.Uint32(uint32(i%2 + 2))
		for j := range pools { // as a new plan does
			pools[j].Spec = proto.CloneOf(pools[j].Spec)
		}
		pools[7].Spec = changed
		x.Update(pools)
	}
}
