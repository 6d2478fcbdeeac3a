package http2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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

// answerAll answers requests, so that streams come to all their states.
func answerAll(f *feeder) func(ev *Event) {
	return func(ev *Event) {
		switch {
		case ev.Kind == Data && ev.Stream%4 == 1:
			f.c.Consumed(ev.Stream, len(ev.Data))
		case (ev.Kind == Request || ev.Kind == Refused) && ev.Stream%4 == 1:
			_, _ = f.c.AppendResponse(nil, ev.Stream, &exchange.Response{Status: 200}, true)
		}
	}
}

// FuzzServer: nothing that a client sends breaks the machine, and what it tells
// does not depend on how the bytes come. cut is where they are cut.
func FuzzServer(f *testing.F) {
	for i, seed := range seeds() {
		f.Add(seed[len(preface):], uint16(20+i))
	}
	f.Fuzz(func(t *testing.T, input []byte, cut uint16) {
		fuzzConn(t, append([]byte(preface), input...), int(cut), func() *Conn {
			return NewServer(Config{ExtendedConnect: true, MaxStreams: 5, MaxHeaderBytes: 2000, MaxHeaderFields: 10})
		})
	})
}

// FuzzClient is the same for what a server sends, to a client that has sent three
// requests.
func FuzzClient(f *testing.F) {
	for i, seed := range seeds() {
		f.Add(bytes.TrimPrefix(seed, []byte(preface)), uint16(20+i))
	}
	f.Fuzz(func(t *testing.T, input []byte, cut uint16) {
		fuzzConn(t, input, int(cut), func() *Conn {
			c := NewClient(Config{MaxStreams: 5, MaxHeaderBytes: 2000, MaxHeaderFields: 10})
			for i, method := range []string{"GET", "HEAD", "POST"} {
				r := request(method, "/")
				if _, _, err := c.AppendRequest(nil, &r, i < 2); err != nil {
					t.Fatal(err)
				}
			}
			return c
		})
	})
}

func fuzzConn(t *testing.T, input []byte, cut int, newConn func() *Conn) {
	whole, parts := feeder{c: newConn()}, feeder{c: newConn()}
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
			return f.Name == "host" || f.Name == "te" || f.Name == "expect" || f.Name == "content-length"
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
