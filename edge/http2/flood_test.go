package http2

import (
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// TestFloods: a client that sends more of what costs us than of requests is told
// to calm down, before it has sent much more than its credit allows.
func TestFloods(t *testing.T) {
	first := func(flags uint8, method string) func(w *wire) {
		return func(w *wire) { w.request(1, flags, method) }
	}
	floods := []struct {
		name  string
		begin func(w *wire)
		next  func(w *wire, i uint32)
	}{
		// CVE-2023-44487: the client resets what it asked for.
		{"rapid reset", nil, func(w *wire, i uint32) {
			w.request(2*i+1, end, "GET").frame(frameReset, 0, 2*i+1, uint32s(8)...)
		}},
		// CVE-2025-8671: it has the server do so, in each way that is a stream error.
		{"made you reset by length", nil, func(w *wire, i uint32) {
			w.request(2*i+1, 0, "POST", "content-length", "5").data(2*i+1, end, "longer than that")
		}},
		{"made you reset by window", nil, func(w *wire, i uint32) {
			w.request(2*i+1, 0, "POST").frame(frameWindowUpdate, 0, 2*i+1, uint32s(maxWindow)...)
		}},
		{"made you reset by no window", nil, func(w *wire, i uint32) {
			w.request(2*i+1, 0, "POST").frame(frameWindowUpdate, 0, 2*i+1, uint32s(0)...)
		}},
		{"made you reset by header", nil, func(w *wire, i uint32) { w.request(2*i+1, end, "GET", "connection", "close") }},
		{"made you reset by PRIORITY", nil, func(w *wire, i uint32) {
			w.request(2*i+1, end, "GET").frame(framePriority, 0, 2*i+1, 0)
		}},
		{"made you reset by DATA", nil, func(w *wire, i uint32) { w.request(2*i+1, end, "GET").data(2*i+1, 0, "x") }},
		{"too many streams", nil, func(w *wire, i uint32) { w.request(2*i+1, 0, "POST") }},
		{"frames on closed streams", func(w *wire) { w.request(1, end, "GET").frame(frameReset, 0, 1, uint32s(8)...) }, func(w *wire, i uint32) {
			w.frame(frameReset, 0, 1, uint32s(8)...)
		}},
		{"HEADERS on refused streams", func(w *wire) { w.request(1, 0, "GET", "connection", "close") }, func(w *wire, i uint32) {
			w.request(1, 0, "GET")
		}},
		{"PING", nil, func(w *wire, i uint32) { w.frame(framePing, 0, 0, make([]byte, 8)...) }},
		{"PING ack", nil, func(w *wire, i uint32) { w.frame(framePing, flagAck, 0, make([]byte, 8)...) }},
		{"SETTINGS", nil, func(w *wire, i uint32) { w.frame(frameSettings, 0, 0) }},
		{"GOAWAY", nil, func(w *wire, i uint32) { w.frame(frameGoAway, 0, 0, uint32s(0, 0)...) }},
		{"PRIORITY", nil, func(w *wire, i uint32) { w.frame(framePriority, 0, 2*i+1, 0, 0, 0, 0, 1) }},
		{"PRIORITY_UPDATE", nil, func(w *wire, i uint32) { w.frame(framePriorityUpdate, 0, 0, uint32s(1)...) }},
		{"WINDOW_UPDATE", nil, func(w *wire, i uint32) { w.frame(frameWindowUpdate, 0, 0, uint32s(1)...) }},
		{"large WINDOW_UPDATE", nil, func(w *wire, i uint32) { w.frame(frameWindowUpdate, 0, 0, uint32s(4096)...) }},
		{"unknown", nil, func(w *wire, i uint32) { w.frame(0xbe, 0, 0) }},
		{"empty DATA", first(0, "POST"), func(w *wire, i uint32) { w.data(1, 0, "") }},
		{"padding alone", first(0, "POST"), func(w *wire, i uint32) { w.data(1, padded, "\x05\x00\x00\x00\x00\x00") }},
		// CVE-2024-27316 and its kind.
		{"empty CONTINUATION", func(w *wire) { w.frame(frameHeaders, 0, 1, 0x82) }, func(w *wire, i uint32) { w.frame(frameContinuation, 0, 1) }},
	}
	for _, flood := range floods {
		t.Run(flood.name, func(t *testing.T) {
			f := feeder{c: NewServer(Config{FloodCredit: 50})}
			w := fromClient()
			if flood.begin != nil {
				flood.begin(w)
			}
			for i := uint32(0); i < 1000 && f.err == nil; i++ {
				flood.next(w, i)
				f.feed(w.Bytes())
				w.Reset()
				f.c.AppendPending(nil)
				if i > 160 { // 100 streams may be open
					t.Fatal("it goes on and on")
				}
			}
			if last := f.events[len(f.events)-1]; last != "GOAWAY ENHANCE_YOUR_CALM" || !f.c.Flooded() {
				t.Errorf("%s, %v", last, f.err)
			}
		})
	}
}

// TestDribble: a client that takes content byte by byte (CVE-2019-9511) is told
// to calm down, too.
func TestDribble(t *testing.T) {
	f, w := feeder{c: NewServer(Config{FloodCredit: 50})}, fromClient()
	f.feed(w.setting(settingInitialWindow, 0).request(1, end, "GET").Bytes())
	out, err := f.c.AppendResponse(nil, 1, &exchange.Response{Status: 200, Length: 1000}, false)
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, 1000)
	f.on = func(*Event) {
		var n int
		out, n, _ = f.c.AppendData(out[:0], 1, content, true)
		content = content[n:]
	}
	w.Reset()
	f.feed(repeat(w, 60, func(w *wire) { w.frame(frameWindowUpdate, 0, 1, uint32s(1)...) }).Bytes())
	if !f.c.Flooded() || len(content) < 900 {
		t.Error(f.err, len(content))
	}
}

// TestPeerThatDoesNotRead: what is owed to it is bounded.
func TestPeerThatDoesNotRead(t *testing.T) {
	f := feeder{c: NewServer(Config{MaxPending: 1000})}
	w := fromClient()
	for range 2000 {
		f.feed(w.frame(framePing, 0, 0, make([]byte, 8)...).Bytes())
		f.c.Refill(100)
		w.Reset()
	}
	if f.err == nil || f.c.Held() > 1200 {
		t.Errorf("%v with %d bytes pending", f.err, f.c.Held())
	}
}

// TestNoFlood: what clients do all day is no flood, however much of it.
func TestNoFlood(t *testing.T) {
	answer := exchange.Response{Status: 200, Length: exchange.UnknownLength}
	t.Run("acknowledged data", func(t *testing.T) {
		f, w := feeder{c: NewServer(Config{})}, fromClient()
		for i := range uint32(2000) {
			w.request(2*i+1, end, "GET").frame(framePriority, 0, 2*i+3, 0, 0, 0, 0, 1)
			f.feed(w.Bytes())
			out, err := f.c.AppendResponse(nil, 2*i+1, &answer, false)
			if err == nil {
				_, _, err = f.c.AppendData(out, 2*i+1, []byte("ok"), true)
			}
			if err != nil {
				t.Fatal(err)
			}
			w.Reset()
			// As gRPC measures the delay.
			w.frame(frameWindowUpdate, 0, 0, uint32s(2)...).frame(framePing, 0, 0, make([]byte, 8)...)
		}
	})
	t.Run("a download that is read in small parts", func(t *testing.T) {
		f, w := feeder{c: NewServer(Config{})}, fromClient()
		w.setting(settingInitialWindow, 4<<20).frame(frameWindowUpdate, 0, 0, uint32s(4<<20)...)
		f.feed(w.request(1, end, "GET").Bytes())
		out, err := f.c.AppendResponse(nil, 1, &answer, false)
		if err == nil {
			_, _, err = f.c.AppendData(out, 1, make([]byte, 4<<20), true)
		}
		if err != nil {
			t.Fatal(err)
		}
		w.Reset()
		f.feed(repeat(w, 1000, func(w *wire) {
			w.frame(frameWindowUpdate, 0, 0, uint32s(4096)...).frame(frameWindowUpdate, 0, 1, uint32s(4096)...)
		}).Bytes())
		if f.err != nil {
			t.Error(f.err)
		}
	})
	// A client whose deadlines pass because the backend is slow.
	t.Run("late resets", func(t *testing.T) {
		f, w := feeder{c: NewServer(Config{FloodCredit: 50})}, fromClient()
		for round := range uint32(20) {
			for i := range uint32(100) {
				w.request(2*(100*round+i)+1, end, "GET")
			}
			f.feed(w.Bytes())
			f.c.Refill(0)
			w.Reset()
			for i := range uint32(100) {
				w.frame(frameReset, 0, 2*(100*round+i)+1, uint32s(8)...)
			}
			f.feed(w.Bytes())
			w.Reset()
		}
		if f.err != nil || f.c.Open() != 0 {
			t.Error(f.err, f.c.Open())
		}
	})
	t.Run("credit comes back", func(t *testing.T) {
		f, w := feeder{c: NewServer(Config{FloodCredit: 50})}, fromClient()
		for range 100 {
			f.feed(repeat(w, 40, func(w *wire) { w.frame(framePing, 0, 0, make([]byte, 8)...) }).Bytes())
			f.c.AppendPending(nil)
			f.c.Refill(40)
			w.Reset()
		}
		if f.err != nil {
			t.Error(f.err)
		}
	})
}

// TestClosedStreamsAreForgotten: memory of them is bounded, and what comes late
// on one that was forgotten does no harm.
func TestClosedStreamsAreForgotten(t *testing.T) {
	f, w := feeder{c: NewServer(Config{})}, fromClient()
	for i := range uint32(1000) {
		f.feed(w.request(2*i+1, 0, "POST").Bytes())
		w.Reset()
		f.c.Reset(2*i+1, Cancel)
	}
	if n := len(f.c.graves.ring); n != maxGraves {
		t.Errorf("%d are remembered", n)
	}
	f.feed(w.data(1, 0, "late").head(1, end, "t", "1").data(1999, 0, "late").head(1999, end, "t", "1").Bytes())
	if f.err != nil || strings.HasPrefix(f.events[len(f.events)-1], "Reset") {
		t.Error(f.err, f.events[len(f.events)-1])
	}
	if f.c.window+f.c.owed != f.c.cfg.ConnWindow {
		t.Errorf("the window is %d and %d", f.c.window, f.c.owed)
	}
}
