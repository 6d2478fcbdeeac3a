package http1

import (
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// asked is a server that has read a request to its end.
func asked(t *testing.T, request string) *Conn {
	t.Helper()
	d := fromClient()
	d.ended = func() {}
	d.feed([]byte(request))
	if d.failed != nil || d.heads != 1 {
		t.Fatal(d)
	}
	return d.conn
}

func TestAppendResponse(t *testing.T) {
	const get, head, old = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.0\r\n\r\n"
	const oldKept = "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
	announced := exchange.Fields{{Name: "Trailer", Value: "X-T"}}
	for _, test := range []struct {
		name, request string
		response      exchange.Response
		data          string
		trailers      exchange.Fields
		want          string
		reusable      bool
	}{
		{"length", get, exchange.Response{Status: 200, Length: 3, Fields: exchange.Fields{{Name: "x-A", Value: "b"}, {Name: "Host", Value: "h"}}}, "abc", nil,
			"HTTP/1.1 200 OK\r\nx-A: b\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", true},
		{"empty", get, exchange.Response{Status: 299}, "", nil, "HTTP/1.1 299 \r\nContent-Length: 0\r\n\r\n", true},
		{"chunks", get, exchange.Response{Status: 999, Length: -1}, "0123456789abcdef!", exchange.Fields{{Name: "X-T", Value: "1"}, {Name: "Host", Value: "no"}},
			"HTTP/1.1 999 \r\nTransfer-Encoding: chunked\r\n\r\n11\r\n0123456789abcdef!\r\n0\r\nX-T: 1\r\n\r\n", true},
		{"trailers announced", get, exchange.Response{Status: 200, Length: 1, Fields: announced}, "a", exchange.Fields{{Name: "X-T", Value: "1"}},
			"HTTP/1.1 200 OK\r\nTrailer: X-T\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-T: 1\r\n\r\n", true},
		{"trailers by length", get, exchange.Response{Status: 200, Length: 1}, "a", exchange.Fields{{Name: "X-T", Value: "1"}}, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", true},
		{"HEAD", head, exchange.Response{Status: 200, Length: 3, Fields: announced}, "", nil, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", true},
		{"HEAD unknown", head, exchange.Response{Status: 200, Length: -1}, "", nil, "HTTP/1.1 200 OK\r\n\r\n", true},
		{"204", get, exchange.Response{Status: 204, Length: 0}, "", nil, "HTTP/1.1 204 No Content\r\n\r\n", true},
		{"304", get, exchange.Response{Status: 304, Length: 5}, "", nil, "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", true},
		{"close", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", exchange.Response{Status: 200}, "", nil, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", false},
		{"1.0", old, exchange.Response{Status: 200, Length: 1}, "a", nil, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\na", false},
		{"1.0 kept", oldKept, exchange.Response{Status: 200, Length: 1}, "a", nil, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\na", true},
		{"1.0 unknown", oldKept, exchange.Response{Status: 200, Length: -1}, "a", exchange.Fields{{Name: "X-T", Value: "1"}}, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\na", false},
		{"1.0 trailers", oldKept, exchange.Response{Status: 200, Length: 1, Fields: announced}, "a", nil, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\na", true},
	} {
		c := asked(t, test.request)
		out, err := c.AppendResponse([]byte("before|"), &test.response)
		if err == nil {
			out, err = c.AppendData(out, []byte(test.data))
		}
		if err == nil {
			out, err = c.AppendEnd(out, test.trailers)
		}
		if err != nil || string(out) != "before|"+test.want || c.Reusable() != test.reusable || c.Over() == test.reusable {
			t.Errorf("%s: %q %v, reusable %v, over %v", test.name, out, err, c.Reusable(), c.Over())
		}
	}
}

// TestNothingMalformed: what can't be written leaves the bytes and the state as
// they were.
func TestNothingMalformed(t *testing.T) {
	refuses := func(name string, out []byte, err error) {
		t.Helper()
		if err == nil || string(out) != "x" {
			t.Errorf("%s: %q %v", name, out, err)
		}
	}
	dst := func() []byte { return []byte("x") }
	c := asked(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	for _, field := range []exchange.Field{
		{Name: "A\r\nB", Value: "c"}, {Name: "", Value: "c"}, {Name: "A B", Value: "c"}, {Name: "A:", Value: ""}, {Name: "A", Value: "b\r\nC: d"}, {Name: "A", Value: "b\nC"},
		{Name: "A", Value: "\x00"}, {Name: "content-length", Value: "1"}, {Name: "Transfer-Encoding", Value: "chunked"}, {Name: "Connection", Value: "close"}, {Name: "Keep-Alive", Value: ""},
	} {
		out, err := c.AppendResponse(dst(), &exchange.Response{Status: 200, Fields: exchange.Fields{{Name: "ok", Value: "ok"}, field}})
		refuses("response with "+field.Name, out, err)
		out, err = c.AppendInformational(dst(), 103, exchange.Fields{field})
		refuses("103 with "+field.Name, out, err)
	}
	for _, status := range []int{0, 99, 100, 103, 101, 1000, -1} {
		out, err := c.AppendResponse(dst(), &exchange.Response{Status: status})
		refuses("status", out, err)
	}
	for _, status := range []int{0, 99, 101, 200} {
		out, err := c.AppendInformational(dst(), status, nil)
		refuses("informational status", out, err)
	}
	out, err := c.AppendResponse(dst(), &exchange.Response{Status: 200, Length: -2})
	refuses("length", out, err)
	out, err = c.AppendData(dst(), []byte("a"))
	refuses("data before the head", out, err)
	out, err = c.AppendEnd(dst(), nil)
	refuses("end before the head", out, err)
	out, err = c.AppendRequest(dst(), &exchange.Request{Method: "GET", Authority: "a", Target: "/"})
	refuses("request of a server", out, err)
	if _, err := c.AppendResponse(nil, &exchange.Response{Status: 200, Length: 2}); err != nil {
		t.Fatal(err)
	}
	out, err = c.AppendResponse(dst(), &exchange.Response{Status: 200})
	refuses("second response", out, err)
	out, err = c.AppendInformational(dst(), 103, nil)
	refuses("103 after the response", out, err)
	out, err = c.AppendData(dst(), []byte("abc"))
	refuses("long body", out, err)
	if _, err := c.AppendData(nil, []byte("a")); err != nil {
		t.Fatal(err)
	}
	out, err = c.AppendEnd(dst(), nil)
	refuses("short body", out, err)
	if _, err := c.AppendData(nil, []byte("b")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.AppendEnd(nil, nil); err != nil || !c.Reusable() {
		t.Fatal(err)
	}
	for _, request := range []string{"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"} {
		c = asked(t, request)
		status := 200
		if strings.HasPrefix(request, "GET") {
			status = 204
		}
		if _, err := c.AppendResponse(nil, &exchange.Response{Status: status, Length: 1}); err != nil {
			t.Fatal(err)
		}
		out, err = c.AppendData(dst(), []byte("a"))
		refuses("body of none", out, err)
	}
	c = asked(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if _, err := c.AppendResponse(nil, &exchange.Response{Status: 200, Length: -1}); err != nil {
		t.Fatal(err)
	}
	out, err = c.AppendEnd(dst(), exchange.Fields{{Name: "A", Value: "b\r\n"}})
	refuses("trailer", out, err)

	for name, request := range map[string]exchange.Request{
		"method": {Method: "GET /x", Authority: "a", Target: "/"}, "no method": {Authority: "a", Target: "/"}, "CONNECT": {Method: "CONNECT", Authority: "a", Target: "/"},
		"no authority": {Method: "GET", Target: "/"}, "authority": {Method: "GET", Authority: "a\r\nb", Target: "/"}, "no target": {Method: "GET", Authority: "a"},
		"target": {Method: "GET", Authority: "a", Target: "/ HTTP/1.1\r\n"}, "absolute": {Method: "GET", Authority: "a", Target: "http://a/"}, "star": {Method: "GET", Authority: "a", Target: "*"},
		"length": {Method: "GET", Authority: "a", Target: "/", Length: -2}, "upgrade with body": {Method: "GET", Authority: "a", Target: "/", Length: 1, Protocol: "x"},
		"protocol": {Method: "GET", Authority: "a", Target: "/", Protocol: "x\r\ny"}, "h2c": {Method: "GET", Authority: "a", Target: "/", Protocol: "h2c"},
		"host field": {Method: "GET", Authority: "a", Target: "/", Fields: exchange.Fields{{Name: "host", Value: "b"}}}, "expect field": {Method: "GET", Authority: "a", Target: "/", Fields: exchange.Fields{{Name: "Expect", Value: "b"}}},
		"TE field": {Method: "GET", Authority: "a", Target: "/", Fields: exchange.Fields{{Name: "te", Value: "b"}}}, "value": {Method: "GET", Authority: "a", Target: "/", Fields: exchange.Fields{{Name: "A", Value: "b\r\n\r\nGET"}}},
	} {
		c := NewClient(Limits{})
		out, err := c.AppendRequest(dst(), &request)
		refuses(name, out, err)
		if !c.Reusable() {
			t.Errorf("%s: the connection is lost", name)
		}
	}
}

func TestAppendRequest(t *testing.T) {
	for _, test := range []struct {
		request exchange.Request
		data    string
		want    string
	}{
		{exchange.Request{Method: "GET", Authority: "a:1", Target: "/x?y", Fields: exchange.Fields{{Name: "x-A", Value: "b"}}}, "", "GET /x?y HTTP/1.1\r\nHost: a:1\r\nx-A: b\r\n\r\n"},
		{exchange.Request{Method: "POST", Authority: "a", Target: "/"}, "", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"},
		{exchange.Request{Method: "GET", Authority: "a", Target: "/", Length: 3, Continue: true}, "abc", "GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"},
		{exchange.Request{Method: "GET", Authority: "a", Target: "/", Length: -1, Trailers: true}, "abc", "GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"},
		{exchange.Request{Method: "GET", Authority: "a", Target: "/", Length: 3, Fields: exchange.Fields{{Name: "trailer", Value: "X-T"}}}, "abc", "GET / HTTP/1.1\r\nHost: a\r\ntrailer: X-T\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"},
		{exchange.Request{Method: "OPTIONS", Authority: "a", Target: "*", Protocol: "websocket", Trailers: true}, "", "OPTIONS * HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nUpgrade: websocket\r\nConnection: TE, Upgrade\r\n\r\n"},
	} {
		c := NewClient(Limits{})
		out, err := c.AppendRequest(nil, &test.request)
		if err == nil {
			out, err = c.AppendData(out, []byte(test.data))
		}
		if err == nil {
			out, err = c.AppendEnd(out, exchange.Fields{{Name: "X-T", Value: "1"}})
		}
		if err != nil || string(out) != test.want {
			t.Errorf("%q %v, want %q", out, err, test.want)
		}
		if out, err := c.AppendRequest(nil, &test.request); err == nil {
			t.Errorf("a second request: %q", out)
		}
	}
	c := NewClient(Limits{})
	if _, err := c.Next([]byte("HTTP/1.1 200 OK\r\n\r\n"), new(Event)); err == nil {
		t.Error("an answer to nothing")
	}
	if out, err := c.AppendRequest(nil, &exchange.Request{Method: "GET", Authority: "a", Target: "/"}); err == nil {
		t.Errorf("a request on a broken connection: %q", out)
	}
}

// TestEarlyResponse: a connection whose request body is still coming when the
// answer has ended lives if the body ends.
func TestEarlyResponse(t *testing.T) {
	const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab"
	answer := func(c *Conn) string {
		out, err := c.AppendResponse(nil, &exchange.Response{Status: 403})
		if err == nil {
			out, err = c.AppendEnd(out, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	d := fromClient()
	d.feed([]byte(head))
	answer(d.conn)
	if d.conn.Reusable() || d.conn.Over() {
		t.Error("the body is on its way")
	}
	d.feed([]byte("cdeGET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	if got := d.String(); d.heads != 2 || !strings.Contains(got, "data \"abcde\"") || !d.conn.Reusable() {
		t.Error(got)
	}
	d = fromClient()
	d.feed([]byte(head))
	d.conn.StopReading()
	if out := answer(d.conn); !strings.Contains(out, "Connection: close") || !d.conn.Over() || !d.conn.Lingers() {
		t.Errorf("%q, over %v, lingers %v", out, d.conn.Over(), d.conn.Lingers())
	}
	// A head that does not come: the client is told that it took too long.
	d = fromClient()
	d.feed([]byte("GET /"))
	d.conn.StopReading()
	if out := answer(d.conn); !strings.Contains(out, "Connection: close") || !d.conn.Over() {
		t.Errorf("%q", out)
	}
	// A refused request is answered once.
	d = fromClient()
	d.feed([]byte("GET / HTTP/1.1\r\n\r\n"))
	if out := answer(d.conn); !strings.Contains(out, "Connection: close") || !d.conn.Over() || !d.conn.Lingers() {
		t.Errorf("%q", out)
	}
}

func TestExpect(t *testing.T) {
	const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
	for _, test := range []struct {
		name    string
		told    bool
		data    string
		closing bool
	}{
		{"not wanted", false, "", true}, {"wanted", true, "", false}, {"sent without waiting", false, "a", false},
	} {
		d := fromClient()
		d.feed([]byte(head + test.data))
		if test.told {
			if out, err := d.conn.AppendInformational(nil, 100, nil); err != nil || string(out) != "HTTP/1.1 100 Continue\r\n\r\n" {
				t.Errorf("%q %v", out, err)
			}
		}
		out, err := d.conn.AppendResponse(nil, &exchange.Response{Status: 403})
		if err != nil || strings.Contains(string(out), "Connection: close") != test.closing {
			t.Errorf("%s: %q %v", test.name, out, err)
		}
	}
	c := asked(t, "GET / HTTP/1.0\r\n\r\n")
	if out, err := c.AppendInformational(nil, 103, nil); len(out) > 0 || err != nil {
		t.Errorf("HTTP/1.0 got %q %v", out, err)
	}
}

func TestTunnel(t *testing.T) {
	const request = "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
	d := fromClient()
	d.ended = func() {}
	d.feed([]byte(request + "early"))
	if out, err := d.conn.AppendResponse(nil, &exchange.Response{Status: 101, Protocol: "other"}); err == nil {
		t.Errorf("a protocol that was not asked for: %q", out)
	}
	out, err := d.conn.AppendResponse(nil, &exchange.Response{Status: 101, Protocol: "WebSocket", Fields: exchange.Fields{{Name: "A", Value: "b"}}})
	if want := "HTTP/1.1 101 Switching Protocols\r\nA: b\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n"; err != nil || string(out) != want {
		t.Errorf("%q %v", out, err)
	}
	d.feed([]byte(" bytes\r\n"))
	if out, err := d.conn.AppendData(nil, []byte("raw")); err != nil || string(out) != "raw" {
		t.Errorf("%q %v", out, err)
	}
	d.close(true)
	if d.conn.Over() {
		t.Error("the other direction is open")
	}
	if out, err := d.conn.AppendEnd(nil, nil); err != nil || len(out) > 0 || !d.conn.Over() || d.conn.Reusable() {
		t.Errorf("%q %v", out, err)
	}
	if got := d.String(); !strings.Contains(got, "end []\ndata \"early bytes\\r\\n\"\nend []\n") {
		t.Error(got)
	}
	d = fromClient() // the answer is no
	d.ended = func() {}
	d.feed([]byte(request))
	if _, err := d.conn.AppendResponse(nil, &exchange.Response{Status: 200}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.conn.AppendEnd(nil, nil); err != nil || !d.conn.Reusable() {
		t.Errorf("%v", err)
	}
}

func TestCloseAfter(t *testing.T) {
	c := asked(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	c.CloseAfter()
	out, err := c.AppendResponse(nil, &exchange.Response{Status: 200})
	if err != nil || !strings.Contains(string(out), "\r\nConnection: close\r\n") {
		t.Errorf("%q %v", out, err)
	}
	if _, err := c.AppendEnd(nil, nil); err != nil || c.Reusable() || !c.Over() {
		t.Error("it goes on")
	}
	d := client(Limits{})
	d.conn.CloseAfter()
	out, err = d.conn.AppendRequest(nil, &exchange.Request{Method: "GET", Authority: "a", Target: "/"})
	if err != nil || !strings.Contains(string(out), "\r\nConnection: close\r\n") {
		t.Errorf("%q %v", out, err)
	}
	_, _ = d.conn.AppendEnd(nil, nil)
	d.feed([]byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
	if d.conn.Reusable() || !d.conn.Over() {
		t.Error("it goes on")
	}
}
