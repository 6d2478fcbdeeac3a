package http2

import (
	"bytes"
	"errors"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"

	"github.com/reseal/reseal/edge/exchange"
)

func request(method, target string, fields ...exchange.Field) exchange.Request {
	return exchange.Request{Method: method, Scheme: "https", Authority: "a.test", Target: target, Fields: fields}
}

// TestRefusesToSend: what would be refused when it came is not sent, and changes
// nothing.
func TestRefusesToSend(t *testing.T) {
	with := func(change func(r *exchange.Request)) exchange.Request {
		r := request("GET", "/")
		change(&r)
		return r
	}
	field := func(name, value string) exchange.Request {
		return request("GET", "/", exchange.Field{Name: name, Value: value})
	}
	for name, row := range map[string]struct {
		r    exchange.Request
		want error
	}{
		"method":            {request("GET /", "/"), ErrMalformed},
		"no method":         {request("", "/"), ErrMalformed},
		"CONNECT":           {request("CONNECT", "/"), ErrMalformed},
		"target":            {request("GET", "/ HTTP/1.1\r\n"), ErrMalformed},
		"no target":         {request("GET", ""), ErrMalformed},
		"scheme":            {with(func(r *exchange.Request) { r.Scheme = "ftp" }), ErrMalformed},
		"no authority":      {with(func(r *exchange.Request) { r.Authority = "" }), ErrMalformed},
		"authority":         {with(func(r *exchange.Request) { r.Authority = "a/b" }), ErrMalformed},
		"tunnel":            {with(func(r *exchange.Request) { r.Protocol = "websocket" }), ErrNoTunnel},
		"length":            {with(func(r *exchange.Request) { r.Length = 5 }), ErrLength},
		"line in a value":   {field("a", "1\r\nb: 2"), ErrMalformed},
		"line in a name":    {field("a\r\nb", "1"), ErrMalformed},
		"pseudo":            {field(":path", "/"), ErrMalformed},
		"empty name":        {field("", "1"), ErrMalformed},
		"Connection":        {field("Connection", "close"), ErrMalformed},
		"TE":                {field("TE", "trailers"), ErrMalformed},
		"Host":              {field("Host", "a"), ErrMalformed},
		"Expect":            {field("Expect", "100-continue"), ErrMalformed},
		"Upgrade":           {field("Upgrade", "h2c"), ErrMalformed},
		"Keep-Alive":        {field("keep-alive", "1"), ErrMalformed},
		"Content-Length":    {field("content-length", "1"), ErrMalformed},
		"HTTP2-Settings":    {field("HTTP2-Settings", "1"), ErrMalformed},
		"Proxy-Connection":  {field("Proxy-Connection", "1"), ErrMalformed},
		"Transfer-Encoding": {field("Transfer-Encoding", "chunked"), ErrMalformed},
		"too large":         {field("a", big(2000)), ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			f := feeder{c: NewClient(Config{})}
			f.feed(new(wire).setting(settingMaxHeaderList, 2000).Bytes())
			f.c.AppendPending(nil)
			out, id, err := f.c.AppendRequest(nil, &row.r, true)
			if !errors.Is(err, row.want) || id != 0 || len(out) > 0 || f.c.Open() != 0 {
				t.Errorf("%v, stream %d, %q", err, id, out)
			}
		})
	}
}

// TestBodyStates: content goes where the message allows it, and nowhere else.
func TestBodyStates(t *testing.T) {
	f, w := feeder{c: NewServer(Config{})}, fromClient()
	f.feed(w.request(1, end, "GET").request(3, end, "HEAD").request(5, end, "GET").request(7, end, "GET").Bytes())
	c := f.c
	c.AppendPending(nil)
	expect := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	data := func(id uint32, p string, end bool) error {
		_, _, err := c.AppendData(nil, id, []byte(p), end)
		return err
	}
	head := func(id uint32, status int, length int64, end bool) error {
		_, err := c.AppendResponse(nil, id, &exchange.Response{Status: status, Length: length}, end)
		return err
	}
	early := func(id uint32, status int) error {
		_, err := c.AppendInformational(nil, id, &exchange.Response{Status: status, Length: exchange.UnknownLength})
		return err
	}
	trailers := func(id uint32) error {
		_, err := c.AppendTrailers(nil, id, exchange.Fields{{Name: "T", Value: "1"}})
		return err
	}
	expect("data first", data(1, "x", false), ErrState)
	expect("trailers first", trailers(1), ErrState)
	expect("101", early(1, 101), ErrMalformed)
	expect("200 as informational", early(1, 200), ErrMalformed)
	expect("103", early(1, 103), nil)
	expect("103 as final", head(1, 103, -1, false), ErrMalformed)
	expect("101 as final", head(1, 101, -1, false), ErrMalformed)
	expect("end with a length", head(1, 200, 5, true), ErrLength)
	expect("head", head(1, 200, 5, false), nil)
	expect("second head", head(1, 200, 5, false), ErrState)
	expect("103 after the head", early(1, 103), ErrState)
	expect("too long", data(1, "abcdef", false), ErrLength)
	expect("too short", data(1, "abc", true), ErrLength)
	expect("part", data(1, "abc", false), nil)
	expect("trailers too early", trailers(1), ErrLength)
	expect("rest", data(1, "de", true), nil)
	expect("after the end", data(1, "", true), ErrClosed)
	expect("head after the end", head(1, 200, 0, true), ErrClosed)
	expect("HEAD", head(3, 200, 5, false), nil)
	expect("HEAD with content", data(3, "abcde", true), ErrLength)
	expect("end of HEAD", data(3, "", true), nil)
	expect("204", head(5, 204, -1, false), nil)
	expect("204 with content", data(5, "x", true), ErrLength)
	expect("trailers", trailers(5), nil)
	c.Reset(7, Cancel)
	expect("after a reset", head(7, 200, 0, true), ErrClosed)
	expect("a stream that never was", head(9, 200, 0, true), ErrClosed)
	_, _, err := c.AppendRequest(nil, &benchRequest, true)
	expect("a request of a server", err, ErrNoStream)
	if c.Open() != 0 {
		t.Errorf("%d streams are open", c.Open())
	}
}

// TestHeads: what one side sends the other takes, field for field: names in lower
// case, secrets marked, lengths in their place.
func TestHeads(t *testing.T) {
	p := newPair(Config{ExtendedConnect: true, MaxHeaderBytes: 1 << 20})
	var events []string
	note := func(ev *Event) { events = append(events, describe(ev)) }
	var err error
	for _, r := range []exchange.Request{
		{Method: "GET", Scheme: "https", Authority: "a.test", Target: "/", Trailers: true},
		{Method: "POST", Scheme: "https", Authority: "a.test", Target: "/", Length: 5, Continue: true},
		{Method: "PUT", Scheme: "http", Authority: "a.test:80", Target: "/"},
		{Method: "GET", Scheme: "https", Authority: "a.test", Target: "/ws", Protocol: "websocket", Length: exchange.UnknownLength},
		{Method: "GET", Scheme: "https", Authority: "a.test", Target: "/", Fields: exchange.Fields{
			{Name: "X-Mixed-Case", Value: "1"}, {Name: "Cookie", Value: "a=1"}, {Name: "x-key", Value: "k", Secret: true}, {Name: "Accept", Value: ""},
		}},
		{Method: "GET", Scheme: "https", Authority: "a.test", Target: "/", Fields: exchange.Fields{{Name: "a", Value: strings.Repeat("0123456789", 5000)}}},
	} {
		end := r.Length == 0
		if p.toServer, _, err = p.client.AppendRequest(p.toServer, &r, end); err != nil {
			t.Fatal(err)
		}
		p.atServer(note)
	}
	want := []string{
		"Request 1 GET https://a.test/ [] length 0 trailers end",
		"Request 3 POST https://a.test/ [] length 5 continue",
		"Request 5 PUT http://a.test:80/ [] length 0 end",
		"Request 7 CONNECT https://a.test/ws [] length -1 to websocket",
		"Request 9 GET https://a.test/ [{x-mixed-case 1 false} {cookie a=1 true} {x-key k true} {accept  false}] length 0 end",
		"Request 11 GET https://a.test/ [{a " + strings.Repeat("0123456789", 5000) + " false}] length 0 end",
	}
	if !slices.Equal(events, want) {
		t.Errorf("%.2000q\nwant %.2000q", events, want)
	}
	events = nil
	for i, r := range []exchange.Response{
		{Status: 200, Length: exchange.UnknownLength},
		{Status: 404, Length: 0, Fields: exchange.Fields{{Name: "Set-Cookie", Value: "a=1"}}},
		{Status: 299, Length: 0},
		{Status: 101, Length: exchange.UnknownLength, Protocol: "websocket"},
		{Status: 204, Length: 0},
		{Status: 304, Length: 17},
	} {
		if p.toClient, err = p.server.AppendResponse(p.toClient, uint32(2*i+1), &r, i != 3); err != nil {
			t.Fatal(err)
		}
	}
	p.atClient(note)
	want = []string{
		"Response 1 200 [] length -1 end", "Response 3 404 [{set-cookie a=1 true}] length 0 end", "Response 5 299 [] length 0 end",
		"Response 7 200 [] length -1 to websocket", "Response 9 204 [] length -1 end", "Response 11 304 [] length 17 end",
	}
	if !slices.Equal(events, want) {
		t.Errorf("%q\nwant %q", events, want)
	}
}

// TestSecretsStayOutOfTables: they are sent never-indexed (RFC 7541 section
// 7.1.3), however often.
func TestSecretsStayOutOfTables(t *testing.T) {
	c := NewClient(Config{})
	decoder := hpack.NewDecoder(tableSize, nil)
	r := request("GET", "/", exchange.Field{Name: "Authorization", Value: "one"}, exchange.Field{Name: "cookie", Value: "two"},
		exchange.Field{Name: "x-key", Value: "three", Secret: true}, exchange.Field{Name: "x-open", Value: "four"})
	c.AppendPending(nil)
	for range 5 {
		out, _, err := c.AppendRequest(nil, &r, true)
		if err != nil {
			t.Fatal(err)
		}
		fields, err := decoder.DecodeFull(out[frameHeadLen:])
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fields {
			if want := f.Name == "authorization" || f.Name == "cookie" || f.Name == "x-key"; f.Sensitive != want {
				t.Errorf("%v, sensitive %t", f, f.Sensitive)
			}
		}
		for _, e := range c.encoder.table.entries {
			if e.value == "one" || e.value == "two" || e.value == "three" {
				t.Errorf("%s is in the table", e.name)
			}
		}
	}
	if c.encoder.table.len() == 0 {
		t.Error("nothing is in the table")
	}
}

// TestRepeatedFieldsGetIntoTable: whatever their hashes are, and although each
// message has a path of its own.
func TestRepeatedFieldsGetIntoTable(t *testing.T) {
	seed := hashSeed
	defer func() { hashSeed = seed }()
	for range 2000 {
		hashSeed = maphash.MakeSeed()
		c := NewClient(Config{})
		for i := range 10 {
			r := request("GET", "/"+strconv.Itoa(i), exchange.Field{Name: "x-open", Value: "four"})
			if _, _, err := c.AppendRequest(nil, &r, true); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range []string{":authority", "x-open"} {
			if !slices.ContainsFunc(c.encoder.table.entries, func(e entry) bool { return e.name == name }) {
				t.Fatalf("%s is not in the table: %v", name, c.encoder.table.entries)
			}
		}
	}
}

// TestHeaderTableSize: the encoder follows the peer's SETTINGS_HEADER_TABLE_SIZE.
func TestHeaderTableSize(t *testing.T) {
	f := feeder{c: NewClient(Config{})}
	decoder := hpack.NewDecoder(tableSize, nil)
	r := request("GET", "/", exchange.Field{Name: "x-a", Value: "1"}, exchange.Field{Name: "x-b", Value: "2"})
	send := func(want byte) {
		t.Helper()
		f.c.AppendPending(nil)
		out, _, err := f.c.AppendRequest(nil, &r, true)
		if err != nil {
			t.Fatal(err)
		}
		if fields, err := decoder.DecodeFull(out[frameHeadLen:]); err != nil || len(fields) != 6 {
			t.Fatal(fields, err)
		}
		if out[frameHeadLen] != want {
			t.Errorf("the block begins with %#x, want %#x", out[frameHeadLen], want)
		}
	}
	f.feed(fromServer().Bytes())
	for range 3 {
		send(0x82)
	}
	f.feed(new(wire).setting(settingHeaderTableSize, 0).setting(settingHeaderTableSize, 100).Bytes())
	send(0x20) // first to 0, then to 100
	send(0x82)
	f.feed(new(wire).setting(settingHeaderTableSize, 1<<30).Bytes())
	send(0x3f)
	for range 3 {
		send(0x82)
	}
	if f.c.encoder.table.max != tableSize {
		t.Errorf("the table is %d", f.c.encoder.table.max)
	}
}

// TestLargeFrames: no frame is larger than the peer allows.
func TestLargeFrames(t *testing.T) {
	f, w := feeder{c: NewServer(Config{})}, fromClient()
	w.setting(settingMaxFrame, 20000).setting(settingInitialWindow, 1<<20).frame(frameWindowUpdate, 0, 0, uint32s(1<<20)...)
	f.feed(w.request(1, end, "GET").Bytes())
	r := exchange.Response{Status: 200, Length: 50000, Fields: exchange.Fields{{Name: "a", Value: big(50000)}}}
	out, err := f.c.AppendResponse(nil, 1, &r, false)
	if err == nil {
		out, _, err = f.c.AppendData(out, 1, make([]byte, 50000), true)
	}
	if err != nil {
		t.Fatal(err)
	}
	var sizes []int
	for ; len(out) > 0; out = out[frameHeadLen+parseFrame(out).length:] {
		if f := parseFrame(out); f.stream == 1 {
			sizes = append(sizes, f.length)
		}
	}
	if len(sizes) != 6 || sizes[0] != 20000 || sizes[1] != 20000 || sizes[2] > 11000 || !slices.Equal(sizes[3:], []int{20000, 20000, 10000}) {
		t.Errorf("frames of %d bytes", sizes)
	}
}

// TestAvailable: a client opens what both sides allow.
func TestAvailable(t *testing.T) {
	f := feeder{c: NewClient(Config{MaxStreams: 5})}
	f.feed(new(wire).setting(settingMaxStreams, 2).Bytes())
	if f.c.Limit() != 2 {
		t.Error(f.c.Limit())
	}
	r := request("GET", "/")
	for range 2 {
		if _, _, err := f.c.AppendRequest(nil, &r, true); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := f.c.AppendRequest(nil, &r, true); !errors.Is(err, ErrNoStream) || f.c.Available() != 0 {
		t.Error(err, f.c.Available())
	}
	f.feed(new(wire).setting(settingMaxStreams, 100).Bytes())
	if f.c.Available() != 3 || f.c.Limit() != 5 {
		t.Error(f.c.Available(), f.c.Limit())
	}
	f.feed(new(wire).frame(frameGoAway, 0, 0, uint32s(3, 0)...).Bytes())
	if f.c.Available() != 0 || f.c.Open() != 2 {
		t.Error(f.c.Available(), f.c.Open())
	}
	f.c.next = maxStream + 2
	if f.c.peerLeft = false; f.c.Available() != 0 {
		t.Error(f.c.Available())
	}
}

// TestShutdown: a server that leaves serves what the client had sent before it
// knew (RFC 9113 section 6.8), and no more.
func TestShutdown(t *testing.T) {
	f, w := feeder{c: NewServer(Config{})}, fromClient()
	f.feed(w.request(1, end, "GET").Bytes())
	f.c.AppendPending(nil)
	f.c.Shutdown()
	f.c.Shutdown()
	out := f.c.AppendPending(nil)
	if sent := frames(t, out); !slices.Equal(sent, []string{"GOAWAY NO_ERROR", `PING false "reseal:s"`}) || !bytes.Contains(out, uint32s(maxStream, 0)) {
		t.Fatalf("%q", sent)
	}
	w.Reset()
	f.feed(w.request(3, end, "GET").frame(framePing, flagAck, 0, []byte(shutdownPing)...).Bytes())
	out = f.c.AppendPending(nil)
	if sent := frames(t, out); !slices.Equal(sent, []string{"GOAWAY NO_ERROR"}) || !bytes.Contains(out, uint32s(3, 0)) || !f.c.Leaving() {
		t.Fatalf("%q in % x", sent, out)
	}
	w.Reset()
	events := len(f.events)
	f.feed(w.request(5, 0, "POST").data(5, 0, "x").head(5, end, "t", "1").Bytes())
	if f.err != nil || len(f.events) != events || f.c.Open() != 2 {
		t.Errorf("%v, %q, %d open", f.err, f.events[events:], f.c.Open())
	}
}

// TestPing: one answer, one event.
func TestPing(t *testing.T) {
	p := newPair(Config{})
	p.client.Ping()
	p.toServer = p.client.AppendPending(p.toServer)
	p.atServer(func(ev *Event) { t.Error(describe(ev)) })
	var events []string
	p.atClient(func(ev *Event) { events = append(events, describe(ev)) })
	if !slices.Equal(events, []string{"Pong 0"}) {
		t.Errorf("%q", events)
	}
}

// TestRefusedIsAnswered: the answer goes out, and the client is told to stop.
func TestRefusedIsAnswered(t *testing.T) {
	f, w := feeder{c: NewServer(Config{})}, fromClient()
	f.feed(w.head(1, 0, ":method", "CONNECT", ":authority", "a.test").data(1, 0, "x").Bytes())
	out, err := f.c.AppendResponse(nil, 1, &exchange.Response{Status: 405}, true)
	if err != nil {
		t.Fatal(err)
	}
	sent := frames(t, f.c.AppendPending(out))
	if tail := sent[len(sent)-2:]; !slices.Equal(tail, []string{"HEADERS 1", "RST_STREAM 1 NO_ERROR"}) || f.c.Open() != 0 {
		t.Errorf("%q", sent)
	}
	w.Reset()
	if f.feed(w.data(1, end, "late").Bytes()); f.err != nil {
		t.Error(f.err)
	}
}

func TestParsePriority(t *testing.T) {
	for value, want := range map[string]Priority{
		"": {3, false}, "u=0": {0, false}, "u=7, i": {7, true}, "i,u=2": {2, true}, "i=?0": {3, false}, "i=?1": {3, true},
		"u=8": {3, false}, "u=-1": {3, false}, "u=1;x=2, y=3": {1, false}, " u=4 ": {4, false}, "u=1, u=5": {5, false}, "u": {3, false},
	} {
		if got := ParsePriority(value); got != want {
			t.Errorf("%q: %v, want %v", value, got, want)
		}
	}
}
