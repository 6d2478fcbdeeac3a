package edge

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
)

// TestRequestFraming sends what two parsers could take for two different
// messages. Each is either one message to the backend, or refused and the
// connection closed, so that no byte of it is taken for another request.
func TestRequestFraming(t *testing.T) {
	b := serveHTTP1(t, func(r *http.Request, body []byte) string { return ok(r.Method + " " + string(body)) })
	x := newLegs(t, b.address)
	const head = "POST / HTTP/1.1\r\nHost: public.test\r\n"
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: public.test\r\n\r\n"
	for _, test := range []struct {
		name, request string
		status        int
		body          string // of the answer, when it is 200
	}{
		{"length", head + "Content-Length: 3\r\n\r\nabc", 200, "POST abc"},
		{"chunks", head + "Transfer-Encoding: Chunked\r\n\r\n3;a=\"b\"\r\nabc\r\n0\r\n\r\n", 200, "POST abc"},
		{"empty line in front", "\r\n" + head + "Content-Length: 3\r\n\r\nabc", 200, "POST abc"},
		{"length and chunks", head + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"chunks and length", head + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"chunked twice", head + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, 501, ""},
		{"chunked, chunked", head + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + smuggled, 501, ""},
		{"chunked, identity", head + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + smuggled, 501, ""},
		{"xchunked", head + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + smuggled, 501, ""},
		{"\\vchunked", head + "Transfer-Encoding: \vchunked\r\n\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"no coding", head + "Transfer-Encoding:\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + smuggled, 501, ""},
		{"chunks in HTTP/1.0", "POST / HTTP/1.0\r\nHost: public.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"+5", head + "Content-Length: +5\r\n\r\nabcde" + smuggled, 400, ""},
		{"-5", head + "Content-Length: -5\r\n\r\nabcde" + smuggled, 400, ""},
		{"0x5", head + "Content-Length: 0x5\r\n\r\nabcde" + smuggled, 400, ""},
		{"5 5", head + "Content-Length: 5 5\r\n\r\nabcde" + smuggled, 400, ""},
		{"5, 5", head + "Content-Length: 5, 5\r\n\r\nabcde" + smuggled, 400, ""},
		{"5,6", head + "Content-Length: 5,6\r\n\r\nabcde" + smuggled, 400, ""},
		{"no length", head + "Content-Length:\r\n\r\nabcde" + smuggled, 400, ""},
		{"5 and 6", head + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde" + smuggled, 400, ""},
		{"5 and 5", head + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde" + smuggled, 400, ""},
		{"length over int64", head + "Content-Length: 18446744073709551617\r\n\r\nabcde" + smuggled, 400, ""},
		{"Content-Length with space", head + "Content-Length : 5\r\n\r\nabcde" + smuggled, 400, ""},
		{"Transfer-Encoding with tab", head + "Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"folded", head + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + smuggled, 501, ""},
		{"folded field", head + "X-A: b\r\n c\r\n\r\n" + smuggled, 400, ""},
		{"first field folded", "POST / HTTP/1.1\r\n Host: public.test\r\n\r\n" + smuggled, 400, ""},
		{"no colon", head + "Content-Length 5\r\n\r\nabcde" + smuggled, 400, ""},
		{"no name", head + ": 5\r\n\r\nabcde" + smuggled, 400, ""},
		{"NUL in a value", head + "X-A: b\x00c\r\n\r\n" + smuggled, 400, ""},
		{"NUL in a name", head + "X-\x00A: b\r\n\r\n" + smuggled, 400, ""},
		{"CR in a value", head + "X-A: b\rContent-Length: 5\r\n\r\nabcde" + smuggled, 400, ""},
		{"CR in the request line", "POST /\r HTTP/1.1\r\nHost: public.test\r\n\r\n" + smuggled, 400, ""},
		{"LF ends a field", head + "X-A: b\nContent-Length: 5\r\n\r\nabcde" + smuggled, 400, ""},
		{"LF ends the request line", "POST / HTTP/1.1\nHost: public.test\r\n\r\n" + smuggled, 400, ""},
		{"LF ends all lines", "POST / HTTP/1.1\nHost: public.test\nContent-Length: 3\n\nabc" + smuggled, 400, ""},
		{"LF ends the head", head + "Content-Length: 3\r\n\nabc" + smuggled, 400, ""},
		{"DEL", head + "X-A: \x7f\r\n\r\n" + smuggled, 400, ""},
		{"HTTP/2.0", "GET / HTTP/2.0\r\nHost: public.test\r\n\r\n" + smuggled, 505, ""},
		{"size overflows", head + "Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\nx\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"size with sign", head + "Transfer-Encoding: chunked\r\n\r\n+1\r\nx\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"size with 0x", head + "Transfer-Encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"no size", head + "Transfer-Encoding: chunked\r\n\r\n\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"size ends in LF", head + "Transfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"LF in an extension", head + "Transfer-Encoding: chunked\r\n\r\n1;a\nb\r\nx\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"CR in an extension", head + "Transfer-Encoding: chunked\r\n\r\n1;a\rb\r\nx\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"chunk ends in LF", head + "Transfer-Encoding: chunked\r\n\r\n1\r\nx\n0\r\n\r\n" + smuggled, 400, ""},
		{"chunk longer than its size", head + "Transfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n0\r\n\r\n" + smuggled, 400, ""},
		{"trailer ends in LF", head + "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nA: b\n\r\n" + smuggled, 400, ""},
		{"trailer folded", head + "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nA: b\r\n c\r\n\r\n" + smuggled, 400, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn := x.dial("http/1.1")
			defer conn.Close()
			go func() { _, _ = io.WriteString(conn, test.request) }() // the edge may close before all is written
			reader := bufio.NewReader(conn)
			response, err := http.ReadResponse(reader, nil)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(response.Body)
			if response.StatusCode != test.status || test.status == 200 && string(body) != test.body {
				t.Fatalf("%d %q, want %d %q", response.StatusCode, body, test.status, test.body)
			}
			if test.status == 200 {
				return
			}
			if !response.Close {
				t.Error("the answer does not say that the connection ends")
			}
			if rest, _ := io.ReadAll(reader); len(rest) > 0 {
				t.Errorf("more came: %q", rest)
			}
		})
	}
	for _, got := range b.received() {
		if strings.Contains(got, "smuggled") {
			t.Errorf("the backend got %q", got)
		}
	}
}

// TestPipelineSplitAnywhere sends requests of all kinds of framing on one
// connection, in two parts that are cut at each byte.
func TestPipelineSplitAnywhere(t *testing.T) {
	b := serveHTTP1(t, func(r *http.Request, body []byte) string { return ok(r.URL.Path + " " + string(body)) })
	x := newLegs(t, b.address)
	const pipeline = "GET /1 HTTP/1.1\r\nHost: public.test\r\n\r\n" +
		"POST /2 HTTP/1.1\r\nHost: public.test\r\nContent-Length: 4\r\n\r\nabcd" +
		"POST /3 HTTP/1.1\r\nHost: public.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x\r\nc\r\n0\r\nX-T: 1\r\n\r\n" +
		"\r\nGET /4 HTTP/1.1\r\nHost: public.test\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" +
		"GET /5 HTTP/1.1\r\nHost: public.test\r\nA : b\r\n\r\nGET /6 HTTP/1.1\r\nHost: public.test\r\n\r\n"
	const want = "/1 |/2 abcd|/3 abc|/4 |400 Bad Request: bad_request\n|"
	for at := 1; at < len(pipeline); at += 3 {
		conn := x.dial("http/1.1")
		if _, err := io.WriteString(conn, pipeline[:at]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, pipeline[at:]); err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		for reader := bufio.NewReader(conn); ; {
			response, err := http.ReadResponse(reader, nil)
			if err != nil {
				break
			}
			body, err := io.ReadAll(response.Body)
			if err != nil {
				t.Fatal(err)
			}
			got.WriteString(string(body) + "|")
		}
		conn.Close()
		if got.String() != want {
			t.Fatalf("cut at %d: %q, want %q", at, got.String(), want)
		}
	}
}

// TestRequestFramingH2: a malformed request (RFC 9113 section 8.1.1) never
// reaches a backend.
func TestRequestFramingH2(t *testing.T) {
	var requests atomic.Int32
	b := serveHTTP1(t, func(r *http.Request, body []byte) string { requests.Add(1); return ok("") })
	x := newLegs(t, b.address)
	for _, more := range [][]string{
		{"connection", "close"}, {"connection", "x-secret"}, {"keep-alive", "1"}, {"proxy-connection", "close"},
		{"transfer-encoding", "chunked"}, {"upgrade", "websocket"}, {"te", "gzip"},
		{"content-length", "+1"}, {"content-length", ""}, {"content-length", "1, 1"}, {"content-length", "x"},
		{"content-length", "1", "content-length", "2"}, {"content-length", "18446744073709551617"},
		{"content-length", "2"}, {"content-length", "0"},
		{"Upper", "x"}, {"x-a", "b\r\nc: d"}, {"x-a", "b\x00"}, {"x a", "b"}, {":status", "200"}, {":path", "/other"},
	} {
		c := x.dialH2()
		fields := append([]string{":method", "POST", ":scheme", "https", ":path", "/", ":authority", "public.test"}, more...)
		c.headers(1, false, fields...)
		c.try(c.framer.WriteData(1, true, []byte("x")))
		if a := c.answer(1); !a.reset && !a.away && a.status != "400" {
			t.Errorf("%q: %+v", more, a)
		}
		c.conn.Close()
	}
	for _, got := range b.received() {
		// The body of a request whose length is wrong may have to be read to
		// notice; then the message never ends for the backend.
		if strings.Count(got, "\r\n\r\n") > 1 || strings.Contains(got, "c: d") {
			t.Errorf("the backend got %q", got)
		}
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("the backend got %d whole requests", n)
	}
}

// TestResponseFraming has a backend answer with what two parsers could take for
// two different messages: the client gets one whole answer or a 502, at once,
// and the backend's connection serves nobody else.
func TestResponseFraming(t *testing.T) {
	for _, test := range []struct {
		name, response string
		body           string // "": 502
	}{
		{"length", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc"},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "abc"},
		{"5 and 5", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "abc"},
		{"folded", "HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 3\r\n\r\nabc", "abc"},
		{"large head", "HTTP/1.1 200 OK\r\nX-Large: " + strings.Repeat("x", 100<<10) + "\r\nContent-Length: 3\r\n\r\nabc", "abc"},
		{"length and chunks", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", ""},
		{"chunked twice", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", ""},
		{"gzip, chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", ""},
		{"chunks in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", ""},
		{"+3", "HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc", ""},
		{"3, 3", "HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabc", ""},
		{"3 and 4", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", ""},
		{"no length", "HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nabc", ""},
		{"space before colon", "HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\nabc", ""},
		{"NUL", "HTTP/1.1 200 OK\r\nX-A: \x00\r\nContent-Length: 3\r\n\r\nabc", ""},
		{"CR", "HTTP/1.1 200 OK\r\nX-A: b\rc\r\nContent-Length: 3\r\n\r\nabc", ""},
		{"LF ends all lines", "HTTP/1.1 200 OK\nContent-Length: 3\n\nabc", ""},
		{"LF ends a field", "HTTP/1.1 200 OK\r\nX-A: b\nContent-Length: 3\r\n\r\nabc", ""},
		{"LF ends the status line", "HTTP/1.1 200 OK\n", ""},
		{"not HTTP", "SSH-2.0-x\r\n", ""},
		{"first field folded", "HTTP/1.1 200 OK\r\n X-A: b\r\nContent-Length: 3\r\n\r\nabc", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := serveRaw(t, "http/1.1", func(c net.Conn, _ int) {
				reader := bufio.NewReader(c)
				for {
					if _, err := http.ReadRequest(reader); err != nil {
						return
					}
					if _, err := io.WriteString(c, test.response); err != nil {
						return
					}
				}
			})
			x := newLegs(t, b.address)
			for range 2 {
				response, body := x.send("GET / HTTP/1.1\r\nHost: public.test\r\n\r\n")
				if test.body != "" && (response.StatusCode != 200 || body != test.body) {
					t.Fatalf("%d %q", response.StatusCode, body)
				}
				if reason := response.Header.Get("Reseal-Reason"); test.body == "" && (response.StatusCode != 502 || reason != "protocol_error") {
					t.Fatalf("%d %q %s", response.StatusCode, body, reason)
				}
			}
			want := 1
			if test.body == "" {
				want = 2
			}
			if got := b.received(); len(got) != want {
				t.Errorf("%d connections, want %d", len(got), want)
			}
		})
	}
}

// TestBrokenChunksOfBackend: what is wrong after the head cuts the answer short.
func TestBrokenChunksOfBackend(t *testing.T) {
	for _, body := range []string{
		"10000000000000003\r\nabc\r\n0\r\n\r\n", "+3\r\nabc\r\n0\r\n\r\n", "3\r\nabcd\r\n0\r\n\r\n", "3\nabc\r\n0\r\n\r\n", "x\r\n",
	} {
		b := serveHTTP1(t, func(*http.Request, []byte) string {
			return "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n" + body
		})
		x := newLegs(t, b.address)
		conn := x.dial("http/1.1")
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: public.test\r\n\r\n")
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			continue // cut before the head was out
		}
		if got, err := io.ReadAll(response.Body); err == nil {
			t.Errorf("%q: the client got %q as a whole", body, got)
		}
		conn.Close()
	}
}

// TestEndlessInformational: 1xx responses are bounded on both protocols.
func TestEndlessInformational(t *testing.T) {
	h1 := serveRaw(t, "http/1.1", func(c net.Conn, _ int) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
			return
		}
		for {
			if _, err := io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"); err != nil {
				return
			}
		}
	})
	h2 := serveRaw(t, "h2", func(c net.Conn, _ int) {
		serveH2(c, func(framer *http2.Framer, f *http2.MetaHeadersFrame) {
			for {
				// :status 103 as a literal without indexing.
				if framer.WriteHeaders(http2.HeadersFrameParam{StreamID: f.StreamID, BlockFragment: []byte("\x08\x03103"), EndHeaders: true}) != nil {
					return
				}
			}
		})
	})
	for name, b := range map[string]*rawBackend{"h1": h1, "h2": h2} {
		x := newLegs(t, b.address)
		conn := x.dial("http/1.1")
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: public.test\r\n\r\n")
		reader := bufio.NewReader(conn)
		interim := 0
		for {
			response, err := http.ReadResponse(reader, nil)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if response.StatusCode != 103 {
				if response.StatusCode != 502 || response.Header.Get("Reseal-Reason") != "protocol_error" {
					t.Errorf("%s: %d %s", name, response.StatusCode, response.Header.Get("Reseal-Reason"))
				}
				break
			}
			interim++
		}
		if interim > 101 {
			t.Errorf("%s: %d informational responses", name, interim)
		}
		conn.Close()
	}
}
