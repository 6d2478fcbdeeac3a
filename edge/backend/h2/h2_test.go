package h2

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/reseal/reseal/edge/exchange"
)

// TestExchanges: requests and answers of all forms, to a server that we did not
// write.
func TestExchanges(t *testing.T) {
	b := dial(t, serveHTTP(site(), &http2.Server{MaxConcurrentStreams: 7}))
	if !slices.Equal(b.limits, []int{7}) {
		t.Errorf("limits %v", b.limits)
	}
	if c := b.get("/"); c.got.String() != "GET" || c.head.Status != 200 {
		t.Errorf("%+v", c)
	}
	if c := b.get("/bytes"); c.got.Len() != 3_200_000 {
		t.Errorf("%d bytes", c.got.Len())
	}
	content := bytes.Repeat([]byte("fedcba98"), 150_000)
	for name, trailers := range map[string]exchange.Fields{"": nil, ",of the sender": {{Name: "x-last", Value: ",of the sender"}, {Name: "authorization", Value: "no"}}} {
		var c *client
		b.on(func() {
			c = b.begin(&exchange.Request{Method: "POST", Target: "/echo?early", Length: exchange.UnknownLength, Fields: exchange.Fields{{Name: "Trailer", Value: "X-Last"}}})
		})
		c.upload(content, trailers)
		c.wait()
		if !bytes.Equal(c.got.Bytes(), content) || c.trailers.Get("x-sum") != fmt.Sprint(len(content))+name || c.trailers.Has("set-cookie") || !slices.Equal(c.interims, []int{103}) {
			t.Errorf("%d bytes, trailers %v, %v, %v", c.got.Len(), c.trailers, c.interims, c.failed)
		}
	}
	b.on(func() {
		if b.free != 4 || b.answered != 4 || len(b.conn.streams) != 0 {
			t.Errorf("%d free, %d answered, %d streams", b.free, b.answered, len(b.conn.streams))
		}
		b.conn.Leave(nil)
	})
	b.eventually("the end", func() bool { return b.ended != nil })
}

// TestSlowClientHoldsUpNobody: an answer that nobody takes, as many times as there
// are streams, leaves the others theirs.
func TestSlowClientHoldsUpNobody(t *testing.T) {
	b := dial(t, serveHTTP(site(), &http2.Server{MaxConcurrentStreams: 100}))
	var slow []*client
	b.on(func() {
		for range 20 {
			c := b.begin(&exchange.Request{Target: "/bytes"})
			c.hungry = false
			slow = append(slow, c)
		}
	})
	b.eventually("their windows are full", func() bool {
		return !slices.ContainsFunc(slow, func(c *client) bool { return c.got.Len() < exchange.AnswerWindow })
	})
	if c := b.get("/bytes"); c.got.Len() != 3_200_000 {
		t.Errorf("%d bytes", c.got.Len())
	}
	b.on(func() {
		for _, c := range slow {
			if c.got.Len() != exchange.AnswerWindow {
				t.Errorf("%d bytes of a window", c.got.Len())
			}
			c.hungry = true
			c.flow.Consumed(c.got.Len())
		}
	})
	for _, c := range slow {
		c.wait()
		if c.got.Len() != 3_200_000 {
			t.Errorf("%d bytes", c.got.Len())
		}
	}
}

// TestAbandonedAnswers: what was not consumed of answers that have ended, and of
// those that were given up, does not narrow the connection's window.
func TestAbandonedAnswers(t *testing.T) {
	b := dial(t, serveHTTP(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(make([]byte, 200_000)) }), &http2.Server{}))
	for range 2 * MaxStreams * exchange.AnswerWindow / 200_000 / 1000 { // a thousandth of it is enough to see
		var c *client
		b.on(func() {
			c = b.begin(&exchange.Request{})
			c.hungry = false
		})
		c.wait()
	}
	b.on(func() {
		if held := b.conn.machine.Unconsumed(1); held != 0 || b.conn.machine.Open() != 0 {
			t.Errorf("%d bytes of an exchange that is over are held", held)
		}
	})
}

// TestUnprocessed: what the backend says that it has not processed can be sent again.
func TestUnprocessed(t *testing.T) {
	b := dial(t, frames(func(p *peer) {
		for n := 0; ; {
			switch f := p.next().(type) {
			case nil:
				return
			case *http2.HeadersFrame:
				switch n++; n {
				case 1:
					_ = p.WriteRSTStream(f.StreamID, http2.ErrCodeRefusedStream)
				case 3:
					_ = p.WriteGoAway(f.StreamID-2, http2.ErrCodeNo, nil)
					p.head(f.StreamID-2, "204", true)
				}
			}
		}
	}))
	var all []*client
	b.on(func() {
		for range 3 {
			all = append(all, b.begin(&exchange.Request{Method: "POST", Length: 5}))
		}
	})
	for _, c := range all {
		c.wait()
	}
	for i, c := range all {
		if i == 1 {
			if c.failed != nil || c.head.Status != 204 {
				t.Errorf("%+v", c)
			}
			continue
		}
		if f := c.failed; f == nil || f.Kind != Lost || !f.Unread || f.Written {
			t.Errorf("request %d: %+v", i, f)
		}
	}
	b.on(func() {
		if b.unwanted != 1 {
			t.Error("the owner was not told of GOAWAY")
		}
	})
	if c := b.get("/"); c.failed == nil || !c.failed.Unread {
		t.Errorf("after GOAWAY: %+v", c.failed)
	}
}

// TestResets: a stream that the backend resets fails alone, whatever came before, but
// for one whose answer is complete: the rest of the request goes nowhere then.
func TestResets(t *testing.T) {
	content := make([]byte, 3*exchange.UploadWindow)
	b := dial(t, frames(func(p *peer) {
		for n := 0; ; {
			switch f := p.next().(type) {
			case nil:
				return
			case *http2.HeadersFrame:
				switch n++; n {
				case 1:
					_ = p.WriteRSTStream(f.StreamID, http2.ErrCodeInternal)
				case 2:
					p.head(f.StreamID, "200", false)
					_ = p.WriteData(f.StreamID, false, []byte("a part"))
					_ = p.WriteRSTStream(f.StreamID, http2.ErrCodeProtocol)
				default:
					p.head(f.StreamID, "413", true)
					_ = p.WriteRSTStream(f.StreamID, http2.ErrCodeNo)
				}
			}
		}
	}))
	for i, uploading := range []bool{false, true} {
		var c *client
		b.on(func() {
			r := &exchange.Request{}
			if uploading {
				r.Length = 10
			}
			c = b.begin(r)
		})
		c.b.eventually("it has failed", func() bool { return c.failed != nil })
		if f := c.failed; f.Kind != Reset || f.Unread || f.Uploading != uploading || !f.Written {
			t.Errorf("request %d: %+v", i, f)
		}
	}
	var c *client
	b.on(func() { c = b.begin(&exchange.Request{Method: "POST", Length: int64(len(content))}) })
	c.wait()
	c.upload(content, nil)
	if c.head.Status != 413 || c.failed != nil {
		t.Errorf("%+v", c)
	}
	b.on(func() {
		if b.free != 3 || b.unwanted != 1 || b.ended != nil {
			t.Errorf("%d free, unwanted %d, ended %v", b.free, b.unwanted, b.ended)
		}
	})
}

// TestEarlyAnswer: an answer before the request's end is passed on, and the stream
// stays taken until the request has ended.
func TestEarlyAnswer(t *testing.T) {
	b := dial(t, serveHTTP(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		_, _ = r.Body.Read(make([]byte, 10))
	}), &http2.Server{}))
	var c *client
	b.on(func() { c = b.begin(&exchange.Request{Method: "POST", Length: 20}) })
	b.eventually("the head is there", func() bool { return c.head != nil })
	b.on(func() { c.call(func() { c.flow.Data(make([]byte, 10), false) }) })
	c.wait()
	b.on(func() {
		if c.failed != nil {
			t.Error(c.failed)
			return
		}
		c.over = true
		c.flow.Abort(nil)
	})
	b.eventually("the stream is free", func() bool { return b.free == 1 })
}

// TestLost: when the connection ends, what has not gone out can be sent again, and
// nothing is called twice.
func TestLost(t *testing.T) {
	b := dial(t, frames(func(p *peer) {
		p.head(p.next().Header().StreamID, "200", false)
		p.next()
		_ = p.Conn.Close()
	}))
	var first, second, third *client
	b.on(func() { first = b.begin(&exchange.Request{}) })
	b.eventually("the head is there", func() bool { return first.head != nil })
	b.on(func() { second = b.begin(&exchange.Request{}) })
	b.eventually("both have failed", func() bool { return first.failed != nil && second.failed != nil })
	b.on(func() { third = b.begin(&exchange.Request{}) })
	third.wait()
	for i, c := range []*client{first, second, third} {
		if f := c.failed; f.Kind != Lost || f.Unread || f.Written != (i < 2) {
			t.Errorf("request %d: %+v", i, f)
		}
	}
	b.on(func() {
		if b.free != 3 || b.ended == nil {
			t.Errorf("%d free, ended %v", b.free, b.ended)
		}
	})
}

// TestResetStreamsStayTaken: a stream that we reset is free only when the backend has
// answered what was sent behind the reset.
func TestResetStreamsStayTaken(t *testing.T) {
	release := make(chan struct{})
	b := dial(t, frames(func(p *peer) {
		var ping [8]byte
		for {
			switch f := p.next().(type) {
			case nil:
				return
			case *http2.HeadersFrame:
				if f.StreamID == 1 {
					p.head(1, "204", true)
				}
			case *http2.PingFrame:
				ping = f.Data
				<-release
				_ = p.WritePing(true, ping)
			}
		}
	}))
	b.get("/")
	b.on(func() {
		for range 3 {
			c := b.begin(&exchange.Request{})
			c.over = true
			c.flow.Abort(nil)
		}
		if b.free != 1 || b.over != 4 {
			t.Errorf("%d free, %d over", b.free, b.over)
		}
	})
	close(release)
	b.eventually("all are free", func() bool { return b.free == 4 })

	silent := dial(t, frames(func(p *peer) {
		p.head(p.next().Header().StreamID, "204", true)
		for p.next() != nil {
		}
	}))
	silent.get("/")
	silent.on(func() {
		c := silent.begin(&exchange.Request{})
		c.over = true
		c.flow.Abort(nil)
		if silent.free != 1 {
			t.Errorf("%d free", silent.free)
		}
	})
	silent.eventually("it is free though no PING is answered", func() bool { return silent.free == 2 })
}

// TestStuck: a backend that stops reading gets no more requests, and one that goes on
// like that loses its connection; it delays nobody meanwhile, since nothing blocks.
func TestStuck(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	b := dial(t, frames(func(p *peer) { <-hold },
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30}), func(b *bench) { b.takeTime = 500 * time.Millisecond })
	var c *client
	b.on(func() {
		c = b.begin(&exchange.Request{Method: "POST", Length: exchange.UnknownLength})
	})
	// The window of the connection is 65,535 bytes, so heads have to fill the socket.
	large := strings.Repeat("x", 60_000)
	b.eventually("it is stuck", func() bool {
		if b.ended == nil && !b.conn.full {
			for range 10 {
				b.begin(&exchange.Request{Fields: exchange.Fields{{Name: "x", Value: large, Secret: true}}})
			}
		}
		return slices.Contains(b.stuck, true)
	})
	b.eventually("it has ended", func() bool { return b.ended == ErrStuck })
	c.wait()
	if c.failed.Kind != Lost || !c.failed.Written {
		t.Errorf("%+v", c.failed)
	}
	b.on(func() {
		if len(b.conn.streams)+len(b.conn.starting) > 0 {
			t.Error("something is left")
		}
	})
}

// TestEndlessInformational: a backend that answers with 1xx for ever loses the stream.
func TestEndlessInformational(t *testing.T) {
	b := dial(t, frames(func(p *peer) {
		stream := p.next().Header().StreamID
		for range 200 {
			p.head(stream, "103", false)
		}
		for p.next() != nil {
		}
	}))
	c := b.get("/")
	if c.failed == nil || c.failed.Kind != Broken || len(c.interims) != 100 {
		t.Errorf("%+v after %d", c.failed, len(c.interims))
	}
	b.on(func() {
		if b.ended != nil {
			t.Error(b.ended)
		}
	})
}

// TestFloods: a backend that costs us work for nothing is told to calm down.
func TestFloods(t *testing.T) {
	last := make(chan http2.ErrCode, 1)
	b := dial(t, frames(func(p *peer) {
		for range 2000 {
			if p.WritePing(false, [8]byte{}) != nil {
				break
			}
		}
		for {
			switch f := p.next().(type) {
			case nil:
				return
			case *http2.GoAwayFrame:
				last <- f.ErrCode
				return
			}
		}
	}))
	b.eventually("the end", func() bool { return b.ended != nil })
	if code := <-last; code != http2.ErrCodeEnhanceYourCalm {
		t.Error(code)
	}
}

// TestRefusedHere: what can't be sent fails, and leaves the connection as it was.
func TestRefusedHere(t *testing.T) {
	b := dial(t, frames(func(p *peer) {
		for {
			f := p.next()
			if f == nil {
				return
			}
			p.head(f.Header().StreamID, "204", true)
		}
	}, http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: 1000}))
	for kind, r := range map[FailureKind]*exchange.Request{
		TooLarge: {Fields: exchange.Fields{{Name: "x", Value: strings.Repeat("x", 2000)}}},
		Invalid:  {Fields: exchange.Fields{{Name: "x", Value: "a\r\nb"}}},
	} {
		var c *client
		b.on(func() { c = b.begin(r) })
		c.wait()
		if c.failed == nil || c.failed.Kind != kind || c.failed.Written {
			t.Errorf("%+v", c.failed)
		}
	}
	var long *client
	b.on(func() {
		long = b.begin(&exchange.Request{Method: "POST", Target: "/", Length: 3})
		long.call(func() { long.flow.Data([]byte("four"), false) })
	})
	if long.wait(); long.failed == nil || long.failed.Kind != Invalid || !long.failed.Uploading {
		t.Errorf("%+v", long.failed)
	}
	if c := b.get("/"); c.failed != nil {
		t.Error(c.failed)
	}
	b.on(func() {
		if b.free != 4 {
			t.Errorf("%d free", b.free)
		}
	})
}

// TestSilence: a backend that answers no PING has gone.
func TestSilence(t *testing.T) {
	b := dial(t, frames(func(p *peer) {
		for p.next() != nil {
		}
	}))
	var c *client
	b.on(func() {
		c = b.begin(&exchange.Request{})
		b.conn.heard -= pingAfter + pingWait
		b.conn.look()
		if !b.conn.pinging {
			t.Error("no PING")
		}
		b.conn.heard, b.conn.asked = b.conn.heard-pingWait, b.conn.asked-pingWait
		b.conn.look()
	})
	c.wait()
	if b.ended != errNoPong || c.failed.Kind != Lost {
		t.Errorf("%v, %+v", b.ended, c.failed)
	}
}

var _ net.Conn = (*peer)(nil)
