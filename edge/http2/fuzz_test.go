package http2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/reseal/reseal/edge/exchange"
)

// seeds are rows of the tables of rules.
func seeds() [][]byte {
	return [][]byte{
		fromClient().request(1, end, "GET").Bytes(),
		fromClient().request(1, 0, "POST", "content-length", "3", "cookie", "a", "cookie", "b").data(1, 0, "ab").data(1, end, "c").Bytes(),
		fromClient().request(1, 0, "POST").frame(frameData, padded, 1, 2, 'a', 0, 0).head(1, end, "t", "1").request(3, end, "GET").Bytes(),
		inPieces(fromClient(), 1, end, 3, "te", "trailers").frame(frameReset, 0, 1, uint32s(8)...).data(1, 0, "x").Bytes(),
		fromClient().request(1, 0, "CONNECT", ":protocol", "websocket").setting(settingInitialWindow, 5).frame(frameWindowUpdate, 0, 1, uint32s(9)...).Bytes(),
		fromClient().frame(framePriorityUpdate, 0, 0, append(uint32s(1), "u=1,i"...)...).frame(framePing, 0, 0, make([]byte, 8)...).frame(frameGoAway, 0, 0, uint32s(0, 0)...).Bytes(),
		fromServer().head(1, 0, ":status", "103").head(1, 0, ":status", "200", "content-length", "2").data(1, end, "ab").Bytes(),
		fromServer().head(3, end, ":status", "200", "content-length", "9").frame(frameGoAway, 0, 0, uint32s(1, 0)...).Bytes(),
	}
}

// sane checks what holds whatever the peer sends.
func sane(t *testing.T, f *feeder) {
	t.Helper()
	c := f.c
	if c.window < 0 || c.owed < 0 || c.open < 0 || c.open > c.cfg.MaxStreams || len(c.graves.ring) > maxGraves {
		t.Fatalf("window %d, owed %d, open %d, graves %d", c.window, c.owed, c.open, len(c.graves.ring))
	}
	open, unconsumed := 0, 0
	for _, s := range c.streams.all {
		if unconsumed += s.unconsumed; !s.over() {
			open++
		}
	}
	if open != c.open {
		t.Fatalf("%d streams are open, %d are counted", open, c.open)
	}
	if c.window+c.owed+unconsumed+c.data.left != c.cfg.ConnWindow && f.err == nil {
		t.Fatalf("window %d, owed %d, unconsumed %d, to come %d", c.window, c.owed, unconsumed, c.data.left)
	}
	if c.Held() > c.cfg.MaxFrame+2*c.cfg.MaxHeaderBytes+c.cfg.MaxPending+200 || strings.Contains(fmt.Sprint(f.err), "not used") {
		t.Fatalf("%d bytes are held, %v", c.Held(), f.err)
	}
}

// answerAll answers, so that streams come to all their states: how, the number of
// the stream says.
func answerAll(f *feeder) func(ev *Event) {
	content := []byte("0123456789")
	return func(ev *Event) {
		id := ev.Stream
		switch ev.Kind {
		case Data:
			if id%4 == 1 {
				f.c.Consumed(id, len(ev.Data))
			}
			if id == 3 && ev.End {
				f.c.Reset(id, NoError)
			}
		case Request, Refused:
			_, _ = f.c.AppendResponse(nil, id, &exchange.Response{Status: 200, Length: exchange.UnknownLength}, id%8 == 1)
			_, _, _ = f.c.AppendData(nil, id, content, id%8 == 3)
			if id == 7 {
				f.c.Reset(id, Cancel)
			}
		case Window, Response:
			_, _, _ = f.c.AppendData(nil, 5, content, true)
		case Trailers:
			_, _ = f.c.AppendTrailers(nil, id, exchange.Fields{{Name: "T", Value: "1"}})
		case Reprioritized:
			f.c.SetInitialWindow(int(id) * 7)
		case GoAway:
			f.c.Shutdown()
		}
	}
}

// newFuzzed makes a server, or a client that has sent three requests, with small
// bounds.
func newFuzzed(client bool) *Conn {
	cfg := Config{ExtendedConnect: true, MaxStreams: 5, MaxHeaderBytes: 2000, MaxHeaderFields: 10, StreamWindow: 20}
	if !client {
		return NewServer(cfg)
	}
	c := NewClient(cfg)
	for i, method := range []string{"GET", "HEAD", "POST"} {
		r := request(method, "/")
		if i == 2 {
			r.Length = exchange.UnknownLength
		}
		_, _, _ = c.AppendRequest(nil, &r, i < 2) // fails for nobody: the server has said nothing yet
	}
	return c
}

// FuzzFrames: no sequence of frames breaks a machine, of either role, and what it
// tells does not depend on how the bytes come. cut is where they are cut.
func FuzzFrames(f *testing.F) {
	f.Add([]byte{0, 1, 0, 0x10, 0, 1, 0x13, 1, 5, 7, 0, 8}, uint16(50), false)
	f.Add([]byte{0, 0, 2, 0, 1, 1, 0x22, 0, 1, 0x23, 0, 3, 12, 0, 1}, uint16(50), true)
	f.Fuzz(func(t *testing.T, program []byte, cut uint16, client bool) {
		begin := fromClient()
		if client {
			begin = fromServer()
		}
		fuzzConn(t, script(begin, program, !client), int(cut), client)
	})
}

// FuzzBytes is the same for any bytes behind preface and SETTINGS.
func FuzzBytes(f *testing.F) {
	for i, seed := range seeds() {
		f.Add(bytes.TrimPrefix(seed, []byte(preface)), uint16(20+i), i > 5)
	}
	f.Fuzz(func(t *testing.T, input []byte, cut uint16, client bool) {
		if !client {
			input = append([]byte(preface), input...)
		}
		fuzzConn(t, input, int(cut), client)
	})
}

// TestRandomFrames is a little of FuzzFrames for every day.
func TestRandomFrames(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	for range 3000 {
		program := make([]byte, random.IntN(150))
		for i := range program {
			switch i % 3 {
			case 0: // mostly what is in order: heads and content, of few streams
				program[i] = byte(random.IntN(4)<<4 | random.IntN(7))
			case 1:
				program[i] = byte(random.IntN(2))
			default:
				program[i] = byte(random.IntN(8))
			}
			if random.IntN(20) == 0 {
				program[i] = byte(random.Uint32())
			}
		}
		client := random.IntN(2) == 0
		begin := fromClient()
		if client {
			begin = fromServer()
		}
		if fuzzConn(t, script(begin, program, !client), random.IntN(1<<16), client); t.Failed() {
			t.Fatalf("seed %d: % x", seed, program)
		}
	}
}

// script makes frames of a program: three bytes, or little more, are a frame of a
// kind, with flags and a stream. So short inputs come far into the states.
func script(w *wire, program []byte, client bool) []byte {
	next := func() byte {
		if len(program) == 0 {
			return 0
		}
		b := program[0]
		program = program[1:]
		return b
	}
	heads := [][]string{
		{":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", "/"},
		{":method", "POST", ":scheme", "https", ":authority", "a.test", ":path", "/p", "content-length", "5", "cookie", "a"},
		{":method", "HEAD", ":scheme", "https", ":path", "/", "host", "a.test", "x-secret", "1"},
		{":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":authority", "a.test", ":path", "/"},
		{":method", "CONNECT", ":authority", "a.test:443"},
		{"grpc-status", "0"},
		{":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", "/", "connection", "close"},
		append([]string{":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", "/"}, many(11)...),
	}
	if !client {
		heads = [][]string{
			{":status", "200"}, {":status", "200", "content-length", "5"}, {":status", "103", "link", "a"}, {":status", "204"},
			{":status", "304", "content-length", "9"}, {"grpc-status", "0"}, {":status", "101"}, append([]string{":status", "200"}, many(11)...),
		}
	}
	opened := uint32(3) // by the client of a server
	if client {
		opened = 0
	}
	for len(program) > 0 {
		op, flags, more := next(), next(), next()
		if client && opened == 0 && op&15 < 9 {
			op = 0 // nothing else is in order
		}
		stream := uint32(op>>4)%max(1, opened+uint32(flags>>7))*2 + 1
		switch op & 15 {
		case 0, 1:
			if client {
				stream = 2*opened + 1
				opened++
			}
			w.head(stream, flags&end, heads[more&7]...)
		case 2:
			w.head(stream, flags&end|more>>7, heads[5]...)
		case 3, 4, 5:
			w.data(stream, flags&end, big(int(more)%8))
		case 6:
			w.frame(frameData, padded|flags&end, stream, append([]byte{more % 5}, make([]byte, 4+flags>>2%4)...)...)
		case 7:
			w.frame(frameReset, 0, stream, uint32s(uint32(more)%14)...)
		case 8:
			w.frame(frameWindowUpdate, 0, stream&^(uint32(more)>>7), uint32s(uint32(more)<<(flags%26))...)
		case 9:
			w.setting(settingID(more%10), uint32(flags)<<(more%27))
		case 10:
			w.frame(frameSettings, flagAck, 0)
		case 11:
			w.frame(framePing, flags&flagAck, 0, make([]byte, 8)...)
		case 12:
			w.frame(frameGoAway, 0, 0, uint32s(uint32(more)%12, uint32(flags)%14)...)
		case 13:
			inPieces(w, stream, flags&end, int(more)%40+1, heads[flags>>1&7]...)
		case 14:
			w.frame(framePriorityUpdate, 0, 0, append(uint32s(stream), "u=1,i"...)...)
		default: // anything
			n := min(int(more)%12, len(program))
			w.frame(frameType(op>>4), flags, uint32(flags)%4, program[:n]...)
			program = program[n:]
		}
	}
	return w.Bytes()
}

func fuzzConn(t *testing.T, input []byte, cut int, client bool) {
	t.Helper()
	whole, parts := feeder{c: newFuzzed(client)}, feeder{c: newFuzzed(client)}
	whole.on, parts.on = answerAll(&whole), answerAll(&parts)
	whole.feed(input)
	sane(t, &whole)
	if len(input) > 0 {
		cut %= len(input)
	}
	parts.feed(input[:cut])
	sane(t, &parts)
	parts.feed(input[cut:])
	sane(t, &parts)
	if !slices.Equal(whole.events, parts.events) {
		t.Fatalf("cut at %d: %q\nwhole: %q", cut, parts.events, whole.events)
	}
	_ = frames(t, whole.c.AppendPending(nil)) // what is sent can be read
}

// FuzzHeaderBlock compares the decoder with that of golang.org/x/net, over two
// blocks of one connection.
func FuzzHeaderBlock(f *testing.F) {
	w := new(wire)
	for range 2 {
		f.Add(w.encode(":method", "GET", ":path", "/some/path", "x-name", "value", "cookie", "secret", ":status", "418"), w.encode("x-name", "value"))
	}
	f.Add([]byte{0x20, 0x3f, 0x45, 0x40, 1, 'a', 0x83, 0xff, 0xff, 0xff}, []byte{0xbe, 0xbf})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		ours, theirs := newDecoder(), hpack.NewDecoder(tableSize, nil)
		for _, block := range [][]byte{first, second} {
			var s scratch
			err := ours.decode(block, &s, 1<<30, 1<<30)
			fields, theirErr := theirs.DecodeFull(block)
			// Theirs takes changes of the table's size that are late while the table is
			// empty, and integers of more bytes; its limit for the latter is its own.
			if err != nil && theirErr == nil && !errors.Is(err, errResize) && !errors.Is(err, errInteger) {
				t.Fatalf("%v, but they take %v", err, fields)
			}
			if err == nil && theirErr != nil && !strings.Contains(theirErr.Error(), "beginning of a header block") {
				t.Fatalf("they say %v", theirErr)
			}
			if err != nil || theirErr != nil {
				return
			}
			if len(fields) != len(s.fields) {
				t.Fatalf("%d fields, they have %d", len(s.fields), len(fields))
			}
			for i, f := range s.fields {
				if f.name != fields[i].Name || f.value != fields[i].Value || f.secret != fields[i].Sensitive {
					t.Fatalf("%q: %q, they have %v", f.name, f.value, fields[i])
				}
			}
		}
	})
}

// FuzzRequestHead: a head that a machine sends is the one that the other gets,
// also when golang.org/x/net reads it; what would not be taken is not sent.
func FuzzRequestHead(f *testing.F) {
	f.Add("GET", "/", "X-Name", "value", "cookie", "a=1", false)
	f.Add("POST", "/p?q", "te", "x", "a", "b\r\nc: d", true)
	f.Fuzz(func(t *testing.T, method, target, name1, value1, name2, value2 string, secret bool) {
		p := newPair(Config{})
		decoder := hpack.NewDecoder(tableSize, nil)
		r := request(method, target, exchange.Field{Name: name1, Value: value1, Secret: secret}, exchange.Field{Name: name2, Value: value2})
		for range 3 { // the third time from the tables
			out, _, err := p.client.AppendRequest(nil, &r, true)
			if err != nil {
				if len(out) > 0 || p.client.Open() > 0 {
					t.Fatalf("%v, but %q", err, out)
				}
				return
			}
			var got exchange.Request
			p.toServer = append(p.toServer, out...)
			p.atServer(func(ev *Event) {
				if ev.Kind == Request {
					got = ev.Request
					got.Fields = slices.Clone(got.Fields)
				} else {
					t.Fatal(describe(ev), ev.Err)
				}
			})
			want := exchange.Fields{}
			for i, f := range r.Fields {
				low := strings.ToLower(f.Name)
				if i == 1 && low == "cookie" && len(want) > 0 && want[0].Name == "cookie" {
					want[0].Value += "; " + f.Value
					continue
				}
				want = append(want, exchange.Field{Name: low, Value: f.Value, Secret: f.Secret || isSecret(low)})
			}
			if got.Method != method || got.Target != target || !slices.Equal(got.Fields, want) {
				t.Fatalf("%+v, want %v", got, want)
			}
			framer := xhttp2.NewFramer(io.Discard, bytes.NewReader(out))
			framer.ReadMetaHeaders = decoder
			if _, err := framer.ReadFrame(); err != nil {
				t.Fatalf("they say %v", err)
			}
		}
	})
}

// FuzzRequestAgainstFramer: a header block that the server takes as a request is
// one for golang.org/x/net, too, and the same one.
func FuzzRequestAgainstFramer(f *testing.F) {
	w := new(wire)
	get := []string{":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", "/"}
	f.Add(w.encode(append(get, "x-name", "value", "te", "trailers", "accept", "")...))
	f.Add(w.encode(append(get, "x-name", "value ", "content-length", "0")...))
	f.Add(w.encode(":method", "CONNECT", ":authority", "a.test"))
	f.Add(w.encode(append(get, "host", "A.test", "expect", "100-continue", "connection", "x")...))
	f.Fuzz(func(t *testing.T, block []byte) {
		if len(block) > minFrame {
			return
		}
		input := append(appendFrame(nil, frameHeaders, flagEndHeaders|flagEndStream, 1, len(block)), block...)
		server := feeder{c: NewServer(Config{})}
		server.feed(fromClient().Bytes())
		var got exchange.Request
		server.on = func(ev *Event) {
			if ev.Kind == Request {
				got = ev.Request
				got.Fields = slices.Clone(got.Fields)
			}
		}
		if server.feed(input); got.Method == "" {
			return
		}
		framer := xhttp2.NewFramer(io.Discard, bytes.NewReader(input))
		framer.ReadMetaHeaders = hpack.NewDecoder(tableSize, nil)
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatalf("they say %v of %+v", err, got)
		}
		theirs := frame.(*xhttp2.MetaHeadersFrame)
		if got.Method != theirs.PseudoValue("method") || got.Target != theirs.PseudoValue("path") || got.Scheme != theirs.PseudoValue("scheme") {
			t.Fatalf("%+v, they have %v", got, theirs.Fields)
		}
		passed := slices.DeleteFunc(theirs.RegularFields(), func(f hpack.HeaderField) bool {
			switch exchange.NameOf(f.Name) {
			case exchange.OtherName, exchange.Trailer:
				return false
			}
			return true
		})
		if slices.ContainsFunc(passed, func(f hpack.HeaderField) bool { return f.Name == "cookie" }) {
			return // joined
		}
		for i, f := range passed {
			if len(passed) != len(got.Fields) || f.Name != got.Fields[i].Name || f.Value != got.Fields[i].Value {
				t.Fatalf("%v, they have %v", got.Fields, passed)
			}
		}
	})
}
