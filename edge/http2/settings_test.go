package http2

import (
	"errors"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// TestSettingsInOrder: the last value of a parameter counts (RFC 9113 section
// 6.5.3), and open streams follow.
func TestSettingsInOrder(t *testing.T) {
	f, w := feeder{c: NewServer(Config{})}, fromClient()
	f.feed(w.request(1, end, "GET").Bytes())
	if _, err := f.c.AppendResponse(nil, 1, &exchange.Response{Status: 200, Length: exchange.UnknownLength}, false); err != nil {
		t.Fatal(err)
	}
	if n := f.c.Writable(1); n != firstWindow {
		t.Errorf("at first %d bytes may go", n)
	}
	f.feed(new(wire).frame(frameSettings, 0, 0, appendSetting(appendSetting(nil, settingInitialWindow, 100), settingInitialWindow, 7)...).Bytes())
	if n := f.c.Writable(1); n != 7 {
		t.Errorf("%d bytes may go, not 7", n)
	}
	if _, n, err := f.c.AppendData(nil, 1, make([]byte, 50), true); n != 7 || err != nil {
		t.Error(n, err)
	}
	f.feed(new(wire).setting(settingInitialWindow, 0).Bytes()) // the window is -7
	f.feed(new(wire).frame(frameWindowUpdate, 0, 1, uint32s(7)...).Bytes())
	if n := f.c.Writable(1); n != 0 {
		t.Errorf("%d bytes may go, not 0", n)
	}
	if f.feed(new(wire).frame(frameWindowUpdate, 0, 1, uint32s(1)...).Bytes()); f.c.Writable(1) != 1 || f.events[len(f.events)-1] != "Window 1" {
		t.Error(f.c.Writable(1), f.events)
	}
}

// TestSmallerWindow: a peer may go by our old SETTINGS until it has acknowledged
// the new ones (RFC 9113 section 6.5.3), and no longer.
func TestSmallerWindow(t *testing.T) {
	for acked, want := range map[bool]string{false: `Data 3 "xxxxxxxxxxxxxxxxxxxx"`, true: "Reset 3 FLOW_CONTROL_ERROR ours"} {
		f, w := feeder{c: NewServer(Config{})}, fromClient()
		w.frame(frameSettings, flagAck, 0).request(1, 0, "POST").data(1, 0, big(20))
		f.feed(w.Bytes())
		f.c.SetInitialWindow(5)
		w.Reset()
		if acked {
			w.frame(frameSettings, flagAck, 0)
		}
		f.feed(w.request(3, 0, "POST").data(3, 0, big(20)).Bytes())
		if got := f.events[len(f.events)-1]; got != want {
			t.Errorf("acknowledged: %t: %s, want %s", acked, got, want)
		}
		if wait := f.c.Unacked() > 0; wait == acked {
			t.Errorf("acknowledged: %t, but %d are not", acked, f.c.Unacked())
		}
	}
}

// TestMidHead: what a caller bounds in time.
func TestMidHead(t *testing.T) {
	f, w := feeder{c: NewServer(Config{})}, fromClient()
	block := w.encode(":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", "/")
	expect := func(want bool) {
		t.Helper()
		if got := f.c.MidHead(); got != want {
			t.Errorf("%t, want %t", got, want)
		}
	}
	expect(true)
	f.feed(w.Bytes()[:30])
	expect(true)
	f.feed(w.Bytes()[30:])
	expect(false)
	w.Reset()
	w.frame(frameHeaders, 0, 1, block[:5]...)
	f.feed(w.Bytes()[:4])
	expect(true)
	f.feed(w.Bytes()[4:])
	expect(true)
	if held := f.c.Held() - len(f.c.pending); held != 5 {
		t.Errorf("%d bytes are held, not 5", held)
	}
	w.Reset()
	f.feed(w.frame(frameContinuation, flagEndHeaders, 1, block[5:]...).Bytes())
	expect(false)
	w.Reset()
	if f.feed(w.data(1, 0, "abc").Bytes()[:10]); f.err != nil {
		t.Error(f.err)
	}
	expect(false)
}

// TestErrorStays: after an error nothing is read or sent any more, but for what
// is owed.
func TestErrorStays(t *testing.T) {
	f, w := feeder{c: NewServer(Config{})}, fromClient()
	if f.c.Err() != nil {
		t.Error(f.c.Err())
	}
	f.feed(w.request(1, end, "GET").frame(framePing, 0, 0, 1).Bytes())
	var wrong *Error
	if n, err := f.c.Next(fromClient().Bytes(), &f.ev); n != 0 || !errors.As(err, &wrong) || wrong.Code != FrameSizeError || err != f.c.Err() {
		t.Error(n, err)
	}
	out, err := f.c.AppendResponse(nil, 1, &exchange.Response{Status: 200}, true)
	if sent := frames(t, out); err != f.err || sent[len(sent)-1] != "GOAWAY FRAME_SIZE_ERROR" || f.c.Pending() {
		t.Errorf("%q, %v", sent, err)
	}
	f.c.Shutdown()
	f.c.GoAway(NoError)
	if f.c.Reset(1, Cancel); f.c.Pending() {
		t.Error("more is sent after GOAWAY")
	}
}
