package frontend

import (
	"bytes"
	"io"
	"testing"
	"testing/iotest"

	"golang.org/x/net/http2"
)

// settingsFrame is a SETTINGS frame as it goes over the wire.
func settingsFrame(settings ...http2.Setting) []byte {
	var b bytes.Buffer
	_ = http2.NewFramer(&b, nil).WriteSettings(settings...)
	return b.Bytes()
}

func TestMergedSettings(t *testing.T) {
	const window, table, frameSize = http2.SettingInitialWindowSize, http2.SettingHeaderTableSize, http2.SettingMaxFrameSize
	for name, test := range map[string]struct{ sent, want []http2.Setting }{
		"none":              {nil, nil},
		"each once":         {[]http2.Setting{{ID: window, Val: 1}, {ID: table, Val: 2}}, []http2.Setting{{ID: window, Val: 1}, {ID: table, Val: 2}}},
		"the last counts":   {[]http2.Setting{{ID: window, Val: 1}, {ID: 0xbe, Val: 7}, {ID: window, Val: 3}, {ID: window, Val: 2}}, []http2.Setting{{ID: window, Val: 2}, {ID: 0xbe, Val: 7}}},
		"smallest table":    {[]http2.Setting{{ID: table, Val: 4096}, {ID: table, Val: 0}, {ID: table, Val: 8192}}, []http2.Setting{{ID: table, Val: 0}}},
		"invalid and valid": {[]http2.Setting{{ID: frameSize, Val: 1}, {ID: frameSize, Val: 16384}}, []http2.Setting{{ID: frameSize, Val: 1}}},
	} {
		sent, want := settingsFrame(test.sent...), settingsFrame(test.want...)
		var around bytes.Buffer
		framer := http2.NewFramer(&around, nil)
		_ = framer.WriteSettingsAck()
		_ = framer.WriteData(1, true, []byte("some body"))
		_ = framer.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, maxHeldSettings+settingSize)) // too long to hold
		_ = framer.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, settingSize+1))               // malformed
		stream := bytes.Join([][]byte{[]byte("pre"), sent, around.Bytes(), sent}, nil)
		whole := bytes.Join([][]byte{[]byte("pre"), want, around.Bytes(), want}, nil)
		for how, by := range map[string]func(io.Reader) io.Reader{
			"at once": func(r io.Reader) io.Reader { return r }, "by bytes": iotest.OneByteReader,
			"with errors": func(r io.Reader) io.Reader { return &hiccups{r: iotest.HalfReader(r)} },
		} {
			r := &settingsReader{src: by(bytes.NewReader(stream)), skip: len("pre")}
			var got []byte
			for chunk := make([]byte, 13); ; {
				n, err := r.Read(chunk)
				got = append(got, chunk[:n]...)
				if err == io.EOF {
					break
				}
			}
			if !bytes.Equal(got, whole) {
				t.Errorf("%s, %s: %x, want %x", name, how, got, whole)
			}
		}
	}
}

// hiccups fails every other time, as a Read does whose deadline passes.
type hiccups struct {
	r    io.Reader
	next bool
}

func (h *hiccups) Read(p []byte) (int, error) {
	if h.next = !h.next; h.next {
		return 0, errReadAborted
	}
	return h.r.Read(p)
}

// TestRepeatedSettings: a client may name a parameter twice, and the last value is
// in force.
func TestRepeatedSettings(t *testing.T) {
	const window, table = http2.SettingInitialWindowSize, http2.SettingHeaderTableSize
	e := newEdge(t, answering("hello"))
	h := e.h2DialWith([]http2.Setting{{ID: window, Val: 65535}, {ID: table, Val: 0}, {ID: window, Val: 3}, {ID: table, Val: 4096}})
	body := func(stream uint32, until int) (got string, acks int) {
		t.Helper()
		for len(got) < until {
			f, err := h.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			switch f := f.(type) {
			case *http2.DataFrame:
				if f.StreamID == stream {
					got += string(f.Data())
				}
			case *http2.SettingsFrame:
				if f.IsAck() {
					acks++
				}
			case *http2.GoAwayFrame:
				t.Fatalf("GOAWAY %v", f.ErrCode)
			}
		}
		return got, acks
	}
	if err := h.request(1, "GET", true); err != nil {
		t.Fatal(err)
	}
	if got, acks := body(1, 3); got != "hel" || acks != 1 {
		t.Errorf("%q within the window, %d acknowledgements", got, acks)
	}
	if err := h.WriteSettings(http2.Setting{ID: window, Val: 0}, http2.Setting{ID: window, Val: 5}); err != nil {
		t.Fatal(err)
	}
	if got, acks := body(1, 2); got != "lo" || acks != 1 {
		t.Errorf("%q after the window was widened, %d acknowledgements", got, acks)
	}
	// One that is invalid still ends the connection.
	if err := h.WriteSettings(http2.Setting{ID: window, Val: 1 << 31}, http2.Setting{ID: window, Val: 5}); err != nil {
		t.Fatal(err)
	}
	if end := h.read(func(end *h2End) bool { return end.goAway }); end.code != http2.ErrCodeFlowControl {
		t.Errorf("GOAWAY %v, %v", end.goAway, end.code)
	}
}
