package http2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// wire makes what a peer sends.
type wire struct {
	bytes.Buffer
	encoder *hpack.Encoder
	block   bytes.Buffer
}

// fromClient begins with preface and SETTINGS, fromServer with SETTINGS.
func fromClient() *wire {
	w := new(wire)
	w.WriteString(preface)
	return w.frame(frameSettings, 0, 0)
}

func fromServer() *wire { return new(wire).frame(frameSettings, 0, 0) }

func (w *wire) frame(kind frameType, flags uint8, stream uint32, payload ...byte) *wire {
	w.Write(append(appendFrame(nil, kind, flags, stream, len(payload)), payload...))
	return w
}

func (w *wire) data(stream uint32, flags uint8, p string) *wire {
	return w.frame(frameData, flags, stream, []byte(p)...)
}

// encode encodes fields, given as name, value, name, value.
func (w *wire) encode(fields ...string) []byte {
	if w.encoder == nil {
		w.encoder = hpack.NewEncoder(&w.block)
	}
	w.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = w.encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}) // to memory
	}
	return bytes.Clone(w.block.Bytes())
}

func (w *wire) head(stream uint32, flags uint8, fields ...string) *wire {
	return w.frame(frameHeaders, flags|flagEndHeaders, stream, w.encode(fields...)...)
}

// request is a head with the pseudo-header fields that a request has.
func (w *wire) request(stream uint32, flags uint8, method string, fields ...string) *wire {
	return w.head(stream, flags, append([]string{":method", method, ":scheme", "https", ":authority", "a.test", ":path", "/p"}, fields...)...)
}

func (w *wire) setting(id settingID, value uint32) *wire {
	return w.frame(frameSettings, 0, 0, appendSetting(nil, id, value)...)
}

// uint32s is a payload of 32-bit numbers.
func uint32s(numbers ...uint32) (p []byte) {
	for _, n := range numbers {
		p = append(p, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
	}
	return p
}

// describe renders an event for comparison.
func describe(ev *Event) string {
	text := fmt.Sprintf("%v %d", ev.Kind, ev.Stream)
	switch ev.Kind {
	case Request, Refused:
		r := &ev.Request
		text += fmt.Sprintf(" %s %s://%s%s %v length %d", r.Method, r.Scheme, r.Authority, r.Target, r.Fields, r.Length)
		if r.Protocol != "" {
			text += " to " + r.Protocol
		}
		if r.Continue {
			text += " continue"
		}
		if r.Trailers {
			text += " trailers"
		}
		if ev.Kind == Refused {
			text += fmt.Sprintf(" %d %s", ev.Status, ev.Reason)
		}
		if ev.Priority != (Priority{Urgency: defaultUrgency}) {
			text += fmt.Sprint(" ", ev.Priority)
		}
	case Response, Informational:
		r := &ev.Response
		text += fmt.Sprintf(" %d %v length %d", r.Status, r.Fields, r.Length)
		if r.Protocol != "" {
			text += " to " + r.Protocol
		}
	case Trailers:
		text += fmt.Sprint(" ", ev.Trailers)
	case Data:
		text += fmt.Sprintf(" %q", ev.Data)
	case Reset:
		text += " " + ev.Code.String()
		if ev.Unprocessed {
			text += " unprocessed"
		}
		if ev.Err != nil {
			text += " ours"
		}
	case GoAway:
		text += fmt.Sprintf(" %v last %d %q", ev.Code, ev.Last, ev.Data)
	case Reprioritized:
		text += fmt.Sprint(" ", ev.Priority)
	}
	if ev.End && ev.Kind != Trailers {
		text += " end"
	}
	return text
}

// feeder gives bytes to a machine as they come.
type feeder struct {
	c      *Conn
	ev     Event
	events []string
	err    error
	on     func(ev *Event)
}

func (f *feeder) feed(p []byte) {
	for f.err == nil {
		n, err := f.c.Next(p, &f.ev)
		p = p[n:]
		if err != nil {
			var wrong *Error
			_ = errors.As(err, &wrong)
			f.err = err
			f.events = append(f.events, "GOAWAY "+wrong.Code.String())
			return
		}
		if f.ev.Kind == None {
			if len(p) > 0 {
				f.err = fmt.Errorf("%d bytes are not used", len(p))
			}
			return
		}
		f.note()
		if f.on != nil {
			f.on(&f.ev)
		}
	}
}

// note adds an event; parts of a DATA frame become one.
func (f *feeder) note() {
	text := describe(&f.ev)
	if n := len(f.events); f.ev.Kind == Data && n > 0 {
		before, ok := strings.CutSuffix(f.events[n-1], `"`)
		if start := fmt.Sprintf("Data %d \"", f.ev.Stream); ok && strings.HasPrefix(before, start) {
			f.events[n-1] = before + strings.TrimPrefix(text, start)
			return
		}
	}
	f.events = append(f.events, text)
}

// frames renders what a machine sends, without what it begins with.
func frames(t *testing.T, p []byte) (list []string) {
	t.Helper()
	p = bytes.TrimPrefix(p, []byte(preface))
	framer := xhttp2.NewFramer(io.Discard, bytes.NewReader(p))
	framer.SetMaxReadFrameSize(maxFrame)
	framer.AllowIllegalReads = true
	for {
		f, err := framer.ReadFrame()
		if err == io.EOF {
			return list
		}
		if err != nil {
			t.Fatalf("%v in %q", err, p)
		}
		switch f := f.(type) {
		case *xhttp2.GoAwayFrame:
			list = append(list, "GOAWAY "+f.ErrCode.String())
		case *xhttp2.RSTStreamFrame:
			list = append(list, fmt.Sprintf("RST_STREAM %d %v", f.StreamID, f.ErrCode))
		case *xhttp2.SettingsFrame:
			if f.IsAck() {
				list = append(list, "SETTINGS ack")
			} else {
				list = append(list, "SETTINGS")
			}
		case *xhttp2.WindowUpdateFrame:
			list = append(list, fmt.Sprintf("WINDOW_UPDATE %d %d", f.StreamID, f.Increment))
		case *xhttp2.PingFrame:
			list = append(list, fmt.Sprintf("PING %t %q", f.IsAck(), f.Data))
		case *xhttp2.DataFrame:
			list = append(list, fmt.Sprintf("DATA %d %q %t", f.StreamID, f.Data(), f.StreamEnded()))
		default:
			list = append(list, fmt.Sprintf("%v %d", f.Header().Type, f.Header().StreamID))
		}
	}
}
