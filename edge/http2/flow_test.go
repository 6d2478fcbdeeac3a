package http2

import (
	"bytes"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/reseal/reseal/edge/exchange"
)

// side is one end of TestFlowControl: a machine, what came for it, and the bodies.
type side struct {
	*Conn
	in       []byte
	ev       Event
	sending  map[uint32]int // how much of the body was sent
	received map[uint32]int
	held     map[uint32]int // not consumed
	ended    map[uint32]bool
}

func newSide(c *Conn) *side {
	return &side{Conn: c, sending: map[uint32]int{}, received: map[uint32]int{}, held: map[uint32]int{}, ended: map[uint32]bool{}}
}

// body is what is sent on a stream: each byte tells its place.
func body(stream uint32, size int) []byte {
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(uint32(i)*7 + stream)
	}
	return p
}

// pull has a side read up to n bytes of what came.
func (s *side) pull(t *rapid.T, n, size int, onRequest func(id uint32)) {
	n = min(n, len(s.in))
	at := 0
	for {
		used, err := s.Next(s.in[at:n], &s.ev)
		at += used
		if err != nil {
			t.Fatal(err)
		}
		switch s.ev.Kind {
		case None:
			if at < n {
				t.Fatalf("%d bytes are not used", n-at)
			}
			s.in = s.in[n:]
			return
		case Request:
			onRequest(s.ev.Stream)
		case Reset:
			t.Fatalf("%v", s.ev.Err)
		case Data:
			from := s.received[s.ev.Stream]
			if want := body(s.ev.Stream, size)[from:]; !bytes.HasPrefix(want, s.ev.Data) {
				t.Fatalf("stream %d, byte %d: other content", s.ev.Stream, from)
			}
			s.received[s.ev.Stream] += len(s.ev.Data)
			s.held[s.ev.Stream] += len(s.ev.Data)
			s.ended[s.ev.Stream] = s.ev.End
			if s.held[s.ev.Stream] != s.Unconsumed(s.ev.Stream) {
				t.Fatalf("stream %d holds %d bytes, not %d", s.ev.Stream, s.Unconsumed(s.ev.Stream), s.held[s.ev.Stream])
			}
		}
	}
}

// push sends up to n bytes of a body to the other side.
func (s *side) push(t *rapid.T, to *side, id uint32, n, size int) {
	from := s.sending[id]
	if from > size {
		return // the end was sent
	}
	p := body(id, size)[from:min(from+n, size)]
	before, end := s.Writable(id), from+len(p) == size
	out, sent, err := s.AppendData(nil, id, p, end)
	if err != nil {
		t.Fatal(err)
	}
	if sent != min(len(p), before) {
		t.Fatalf("%d of %d bytes were sent into a window of %d", sent, len(p), before)
	}
	to.in = append(to.in, out...)
	s.sending[id] += sent
	if end && sent == len(p) {
		s.sending[id] = size + 1
	}
}

// TestFlowControl: whatever the order of events, nobody sends beyond a window
// (the receiving machine would say so), the windows of the connection come back in
// full, and all bytes arrive.
func TestFlowControl(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(0, 50000).Draw(t, "size")
		streams := rapid.IntRange(1, 4).Draw(t, "streams")
		cfg := Config{StreamWindow: rapid.SampledFrom([]int{1, 10, 1000, 20000, 100000}).Draw(t, "window")}
		client, server := newSide(NewClient(cfg)), newSide(NewServer(cfg))
		var ids []uint32
		exchangePending := func() {
			server.in = client.AppendPending(server.in)
			client.in = server.AppendPending(client.in)
		}
		answer := func(id uint32) {
			out, err := server.AppendResponse(nil, id, &exchange.Response{Status: 200, Length: int64(size)}, false)
			if err != nil {
				t.Fatal(err)
			}
			client.in = append(client.in, out...)
			server.sending[id] = 0
		}
		for range streams {
			r := exchange.Request{Method: "POST", Scheme: "https", Authority: "a.test", Target: "/", Length: exchange.UnknownLength}
			out, id, err := client.AppendRequest(nil, &r, false)
			if err != nil {
				t.Fatal(err)
			}
			server.in, ids = append(server.in, out...), append(ids, id)
		}
		sides := []*side{client, server}
		act := func(kind, who, which, n int) {
			s, other, id := sides[who], sides[1-who], ids[which]
			switch kind {
			case 0:
				s.pull(t, n, size, answer)
			case 1:
				if _, ok := s.sending[id]; ok || s == client {
					s.push(t, other, id, n, size)
				}
			case 2:
				n = min(n, s.held[id])
				s.held[id] -= n
				s.Consumed(id, n)
			case 3:
				s.SetInitialWindow(n)
			}
			exchangePending()
		}
		for range rapid.IntRange(0, 200).Draw(t, "steps") {
			act(rapid.SampledFrom([]int{0, 0, 0, 1, 1, 2, 2, 3}).Draw(t, "kind"), rapid.IntRange(0, 1).Draw(t, "who"),
				rapid.IntRange(0, streams-1).Draw(t, "which"), rapid.SampledFrom([]int{1, 13, 1000, 70000}).Draw(t, "n"))
			client.Refill(100)
			server.Refill(100)
		}
		// Let all come to its end.
		client.SetInitialWindow(60000)
		server.SetInitialWindow(60000)
		for range 60 {
			for which := range ids {
				for kind := range 3 {
					act(kind, 0, which, 70000)
					act(kind, 1, which, 70000)
				}
			}
			client.Refill(100)
			server.Refill(100)
		}
		for _, s := range sides {
			for _, id := range ids {
				if s.received[id] != size || !s.ended[id] {
					t.Fatalf("stream %d: %d of %d bytes, ended: %t", id, s.received[id], size, s.ended[id])
				}
			}
			if s.Open() != 0 || len(s.streams.all) != 0 || s.window+s.owed != s.cfg.ConnWindow {
				t.Fatalf("%d streams, window %d, owed %d", s.Open(), s.window, s.owed)
			}
		}
		if a, b := client.sendWindow+len(client.in), server.window; a < 0 || b < 0 {
			t.Fatal(a, b)
		}
	})
}

// TestSlowStream: a stream whose bytes nobody consumes holds no other back.
func TestSlowStream(t *testing.T) {
	f, w := feeder{c: NewServer(Config{MaxStreams: 3, StreamWindow: 20000})}, fromClient()
	f.on = func(ev *Event) {
		if ev.Kind == Data && ev.Stream == 5 {
			f.c.Consumed(5, len(ev.Data))
		}
	}
	flood(w.request(1, 0, "POST"), 1, 1)
	flood(w.request(3, 0, "POST"), 3, 1)
	w.request(5, 0, "POST")
	repeat(w, 50, func(w *wire) { w.data(5, 0, big(10000)) })
	if f.feed(w.Bytes()); f.err != nil || f.c.Unconsumed(1) != minFrame-1 || f.c.Granted(5) < 10000 || f.c.Granted(1) > 20001-minFrame {
		t.Error(f.err, f.c.Unconsumed(1), f.c.Granted(5), f.c.Granted(1))
	}
}

// TestWindowComesBack: what nobody consumes any more is given back to the
// connection, whatever way its stream ends.
func TestWindowComesBack(t *testing.T) {
	for name, end := range map[string]func(f *feeder, w *wire){
		"reset by the peer": func(f *feeder, w *wire) { w.frame(frameReset, 0, 1, uint32s(8)...) },
		"reset by us":       func(f *feeder, w *wire) { f.c.Reset(1, Cancel) },
		"a fault":           func(f *feeder, w *wire) { w.head(1, 0, "t", "1") },
		"the end": func(f *feeder, w *wire) {
			f.feed(w.data(1, end, "").Bytes())
			w.Reset()
			if _, err := f.c.AppendResponse(nil, 1, &exchange.Response{Status: 204}, true); err != nil {
				t.Error(err)
			}
			f.c.Consumed(1, 10000)
			f.c.Reset(1, Cancel) // the caller doesn't want the rest
		},
	} {
		t.Run(name, func(t *testing.T) {
			f, w := feeder{c: NewServer(Config{})}, fromClient()
			f.feed(w.request(1, 0, "POST").data(1, 0, big(15000)).frame(frameData, padded, 1, append([]byte{200}, make([]byte, 300)...)...).Bytes())
			w.Reset()
			end(&f, w)
			f.feed(w.Bytes())
			if f.err != nil || f.c.window+f.c.owed != f.c.cfg.ConnWindow || len(f.c.streams.all) != 0 || f.c.Open() != 0 {
				t.Error(f.err, f.c.window, f.c.owed, len(f.c.streams.all), f.c.Open())
			}
			if sent := frames(t, f.c.AppendPending(nil)); slices.Contains(sent, "RST_STREAM 1 CANCEL") != (name == "reset by us") {
				t.Errorf("%q", sent)
			}
		})
	}
}
