package http1

import (
	"bufio"
	"bytes"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// message is what the machine has read of a stream.
type message struct {
	event      Event
	body       []byte
	start, end int  // in the stream; end is 0 of what has not ended
	persist    bool // by what both heads say
}

// readAll reads messages until something is refused, missing, or not HTTP. first
// and turn prepare the connection for the first and the next exchange.
func readAll(c *Conn, stream []byte, turn func()) []message {
	var messages []message
	at := 0
	var event Event
	for {
		n, err := c.Next(stream[at:], &event)
		at += n
		switch {
		case err != nil || event.Kind == Tunnel:
			return messages
		case event.Kind == None:
			if at < len(stream) || c.PeerClosed(true, &event) != nil || event.Kind != End {
				return messages
			}
		}
		switch event.Kind {
		case Request, Response, Informational:
			messages = append(messages, message{event: event, start: at - n, persist: c.persist && !c.closing})
			if event.Kind == Informational {
				messages[len(messages)-1].end = at
			}
			event = Event{}
		case Data:
			last := &messages[len(messages)-1]
			last.body = append(last.body, event.Data...)
		case End:
			last := &messages[len(messages)-1]
			last.end, last.event.Trailers = at, event.Trailers
			turn()
		}
	}
}

// FuzzRequests: of each request that the machine takes net/http sees the same
// method, target, host, fields, body, trailers and end; and how the bytes come
// makes no difference.
func FuzzRequests(f *testing.F) {
	const host = "Host: app.test\r\n"
	for _, seed := range []string{
		"GET / HTTP/1.1\r\n" + host + "\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST /a?b HTTP/1.1\r\n" + host + "Content-Length: 3\r\nX-A: b\r\n\r\nabc\r\nGET http://a:1 HTTP/1.0\r\nConnection: keep-alive, x-a\r\nX-A: c\r\n\r\n",
		"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n3;a=b\r\nabc\r\n0\r\nX-T: 1\r\nHost: y\r\n\r\nGET",
		"OPTIONS * HTTP/1.1\r\n" + host + "Connection: Upgrade, TE\r\nUpgrade: websocket\r\nTE: trailers\r\n\r\n",
		"OPTIONS https://[::1]:8 HTTP/1.1\r\n" + host + "Expect: 100-continue\r\nPragma: no-cache\r\nContent-Length: 1\r\n\r\n ",
	} {
		f.Add([]byte(seed), 30)
	}
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		compareRequests(t, data, cut)
	})
}

// cutAnywhere checks that what happens does not depend on how the bytes come.
func cutAnywhere(t *testing.T, data []byte, cut int, start func() *driver) {
	t.Helper()
	whole, parts := start(), start()
	whole.feed(data)
	cut = min(max(cut, 0), len(data))
	parts.feed(data[:cut])
	parts.feed(data[cut:])
	if got, want := parts.String(), whole.String(); got != want {
		t.Fatalf("%q cut at %d:\n%s\nwhole\n%s", data, cut, got, want)
	}
}

func sameRequest(t *testing.T, data []byte, m message) {
	t.Helper()
	data = bytes.TrimPrefix(data, []byte("\r\n"))
	source := bytes.NewReader(data)
	reader := bufio.NewReaderSize(source, len(data)+16) // which looks for the end of trailers in its buffer
	got := m.event.Request
	want, err := http.ReadRequest(reader)
	if err != nil {
		t.Fatalf("%q is taken; net/http: %v", data, err)
	}
	target := want.RequestURI
	if _, path, absolute := strings.Cut(target, "://"); absolute && target[0] != '/' {
		target = strings.TrimPrefix(path, want.URL.Host)
		if target == "" && want.Method == "OPTIONS" {
			target = "*"
		} else if !strings.HasPrefix(target, "/") {
			target = "/" + target
		}
	}
	if got.Method != want.Method || got.Target != target || got.Authority != want.Host || got.Length != want.ContentLength ||
		(got.Version == exchange.HTTP11) != want.ProtoAtLeast(1, 1) || m.persist == want.Close {
		t.Fatalf("%q is %+v, for net/http %+v", data, got, want)
	}
	if got.Protocol != "" && want.Header.Get("Upgrade") != got.Protocol {
		t.Fatalf("%q asks for %q", data, got.Protocol)
	}
	sameFields(t, data, got.Fields, want.Header, "Host", "Expect")
	if m.end == 0 {
		return
	}
	body, err := io.ReadAll(want.Body)
	if err != nil || !bytes.Equal(body, m.body) {
		t.Fatalf("%q has the body %q, for net/http %q, %v", data, m.body, body, err)
	}
	sameTrailers(t, data, m.event.Trailers, want.Trailer)
	if used := len(data) - source.Len() - reader.Buffered(); m.start+used != m.end && m.start+used+2 != m.end {
		t.Fatalf("%q ends at %d, for net/http at %d", data, m.end-m.start, used)
	}
}

// FuzzResponses is the same for responses, to requests of any methods.
func FuzzResponses(f *testing.F) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, seed := range []string{
		ok + "Content-Length: 3\r\nX-A: b\r\n c\r\n\r\nabc" + ok + "Content-Length: 1\r\n\r\n",
		ok + "Transfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n",
		"HTTP/1.1 103 \r\nLink: a\r\n\r\nHTTP/1.0 204\r\nConnection: keep-alive\r\n\r\nHTTP/1.1 304 x\r\nContent-Length: 3\r\n\r\n" + ok + "\r\nto the end",
		"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nraw",
		ok + "Transfer-Encoding: chunked\r\n\t\r\n\r\n",
		ok + "Connection: x, close\r\nX: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: 2\r\n\r\n",
	} {
		for _, methods := range []string{"g", "hg", "uh"} {
			f.Add([]byte(seed), methods, 30)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, letters string, cut int) {
		var methods []string
		for _, letter := range letters[:min(len(letters), 8)] {
			switch letter {
			case 'h':
				methods = append(methods, "HEAD")
			case 'u':
				methods = append(methods, "UPGRADE")
			default:
				methods = append(methods, "GET")
			}
		}
		compareResponses(t, data, cut, methods)
	})
}

func sameResponse(t *testing.T, data []byte, m message, method string) {
	t.Helper()
	source := bytes.NewReader(data)
	reader := bufio.NewReaderSize(source, len(data)+16) // which looks for the end of trailers in its buffer
	got := m.event.Response
	want, err := http.ReadResponse(reader, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%q is taken; net/http: %v", data, err)
	}
	if got.Status != want.StatusCode || (got.Version == exchange.HTTP11) != want.ProtoAtLeast(1, 1) || m.persist && want.Close && got.Status >= 200 {
		t.Fatalf("%q is %+v, for net/http %+v", data, got, want)
	}
	sameFields(t, data, got.Fields, want.Header)
	if m.end == 0 {
		return
	}
	body, err := io.ReadAll(want.Body)
	if err != nil || !bytes.Equal(body, m.body) {
		t.Fatalf("%q has the body %q, for net/http %q, %v", data, m.body, body, err)
	}
	sameTrailers(t, data, m.event.Trailers, want.Trailer)
	if used := len(data) - source.Len() - reader.Buffered(); m.start+used != m.end {
		t.Fatalf("%q ends at %d, for net/http at %d", data, m.end-m.start, used)
	}
}

// sameFields compares fields with those of net/http that are no affair of the
// connection's.
func sameFields(t *testing.T, data []byte, got exchange.Fields, want http.Header, own ...string) {
	t.Helper()
	kept := []string{"Host", "Content-Length", "Authorization", "Cookie", "Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port"}
	head, _, _ := strings.Cut(string(data), "\r\n\r\n")
	for line := range strings.SplitSeq(head, "\r\n") { // of responses net/http removes Connection when it says close
		name, options, _ := strings.Cut(line, ":")
		if !strings.EqualFold(name, "Connection") {
			continue
		}
		for name := range strings.SplitSeq(options, ",") {
			if name = http.CanonicalHeaderKey(strings.Trim(name, " \t")); !slices.Contains(kept, name) &&
				name != "Close" && name != "Upgrade" && name != "Keep-Alive" {
				delete(want, name)
			}
		}
	}
	for _, name := range append(own, "Content-Length", "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate",
		"Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Http2-Settings") {
		delete(want, name)
	}
	if want.Get("Pragma") == "no-cache" && !got.Has("Cache-Control") {
		delete(want, "Cache-Control") // net/http's addition
	}
	header := http.Header{}
	for _, field := range got {
		if name := http.CanonicalHeaderKey(field.Name); name != "Trailer" {
			header[name] = append(header[name], spaced(field.Value))
		}
	}
	for _, values := range want {
		for i := range values {
			values[i] = spaced(values[i])
		}
	}
	if !maps.EqualFunc(header, want, slices.Equal) {
		t.Fatalf("%q has the fields %q, for net/http %q", data, header, want)
	}
}

// spaced makes whitespace that folds lines alike.
func spaced(value string) string {
	return strings.Join(strings.FieldsFunc(value, func(r rune) bool { return r == ' ' || r == '\t' }), " ")
}

func sameTrailers(t *testing.T, data []byte, got exchange.Fields, want http.Header) {
	t.Helper()
	trailers := http.Header{}
	for name, values := range want {
		if exchange.TrailerAllowed(name) && values != nil {
			trailers[name] = values
		}
	}
	sameFields(t, data, got, trailers)
}

// FuzzRoundTrip: what the machine writes is read as what was meant, by the machine
// in the other role and by net/http, and both ends agree on whether the connection
// lives.
func FuzzRoundTrip(f *testing.F) {
	f.Add("GET", "app.test:1", "/a?b", "X-A", "b", []byte("body"), "X-T", 200, uint16(0))
	f.Add("POST", "[::1]", "/", "Trailer", "X-T", []byte("body"), "X-T", 404, uint16(0xffff))
	f.Add("OPTIONS", "a", "*", "Host", "x", []byte(""), "Host", 304, uint16(0x55))
	f.Fuzz(func(t *testing.T, method, authority, target, name, value string, body []byte, trailer string, status int, flags uint16) {
		flag := func(n int) bool { return flags>>n&1 != 0 }
		fields := exchange.Fields{{Name: name, Value: value}, {Name: "x-Second", Value: "2"}}
		trailers := exchange.Fields{{Name: trailer, Value: value}}
		request := exchange.Request{Method: method, Scheme: "https", Authority: authority, Target: target, Fields: fields, Continue: flag(0), Trailers: flag(1)}
		if flag(2) {
			request.Length = exchange.UnknownLength
		} else if flag(3) {
			request.Length = int64(len(body))
		} else if flag(4) {
			request.Protocol = "websocket"
		}
		send := NewClient(Limits{})
		if flag(5) {
			send.CloseAfter()
		}
		head, err := send.AppendRequest(nil, &request)
		if err != nil {
			return
		}
		wire := written(t, send, head, body, request.Length != 0, trailers)
		if wire == nil {
			return
		}
		receive := NewServer(Limits{})
		messages := readAll(receive, wire, func() {})
		if len(messages) != 1 || messages[0].end != len(wire) {
			t.Fatalf("%q is %d messages: %+v, %v", wire, len(messages), messages, receive.err)
		}
		m := messages[0]
		got := m.event.Request
		sameRequest(t, wire, m)
		if got.Method != method || got.Authority != authority || got.Target != target || got.Protocol != request.Protocol ||
			got.Trailers != request.Trailers || got.Continue != (request.Continue && request.Length != 0) {
			t.Fatalf("%q was read as %+v, and was %+v", wire, got, request)
		}
		sentFields(t, wire, got.Fields, request.Fields)
		if request.Length != 0 && !bytes.Equal(m.body, body) {
			t.Fatalf("%q has the body %q, not %q", wire, m.body, body)
		}
		answer := exchange.Response{Status: status, Fields: fields, Length: int64(len(body))}
		if flag(6) {
			answer.Length = exchange.UnknownLength
		}
		if flag(7) {
			receive.CloseAfter()
		}
		if head, err = receive.AppendResponse(nil, &answer); err != nil {
			return
		}
		bodiless := method == "HEAD" || status == 204 || status == 304
		if wire = written(t, receive, head, body, !bodiless, trailers); wire == nil {
			return
		}
		messages = readAll(send, wire, func() {})
		if len(messages) != 1 || messages[0].end != len(wire) {
			t.Fatalf("%q is %d messages: %+v, %v", wire, len(messages), messages, send.err)
		}
		m = messages[0]
		sameResponse(t, wire, m, method)
		if m.event.Response.Status != status || !bodiless && !bytes.Equal(m.body, body) {
			t.Fatalf("%q was read as %+v, and was %+v", wire, m.event.Response, answer)
		}
		sentFields(t, wire, m.event.Response.Fields, fields)
		if send.Reusable() != receive.Reusable() {
			t.Fatalf("%q: reusable for the client: %v, for the server: %v", wire, send.Reusable(), receive.Reusable())
		}
	})
}

// written is a whole message, or nil when its trailers can't be written.
func written(t *testing.T, c *Conn, head, body []byte, has bool, trailers exchange.Fields) []byte {
	t.Helper()
	wire := head
	var err error
	if has {
		for part := range slices.Chunk(body, 3) {
			if wire, err = c.AppendData(wire, part); err != nil {
				t.Fatalf("%q: %v", wire, err)
			}
		}
	}
	if wire, err = c.AppendEnd(wire, trailers); err != nil {
		return nil
	}
	return wire
}

// sentFields checks that what was sent came, but for announcements of trailers.
func sentFields(t *testing.T, wire []byte, got, sent exchange.Fields) {
	t.Helper()
	got, sent = slices.Clone(got), slices.Clone(sent)
	got.Del("Trailer")
	sent.Del("Trailer")
	if !slices.EqualFunc(got, sent, func(a, b exchange.Field) bool { return a.Name == b.Name && a.Value == exchange.TrimSpace(b.Value) }) {
		t.Fatalf("%q has the fields %v, not %v", wire, got, sent)
	}
}
