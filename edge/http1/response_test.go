package http1

import (
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

func fromBackend(methods ...string) func() *driver {
	return func() *driver { return client(Limits{HeadBytes: 600, Fields: 8, TrailerBytes: 64}, methods...) }
}

func TestResponses(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, test := range []struct {
		methods, stream, want string
	}{
		{"GET", ok + "Content-Length: 3\r\nX-A: b\r\n\r\nabc", "200 \"\" 3 HTTP/1.1 [{\"X-A\" \"b\"}]\ndata \"abc\"\nend []\nreusable true"},
		{"GET", ok + "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "data \"abc\"\nend []\nreusable true"},
		{"GET", ok + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n", "200 \"\" -1 HTTP/1.1 []\ndata \"abc\"\nend [{\"X-T\" \"1\"}]\nreusable true"},
		{"GET", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "200 \"\" 0 HTTP/1.1 []\nend []\nreusable true"},
		{"GET", "HTTP/1.1 999 \x80\r\nContent-Length: 0\r\n\r\n", "999 \"\" 0 HTTP/1.1 []\nend []\nreusable true"},
		{"GET", ok + "X-A: b\r\n c\r\n\td\r\nContent-Length: 0\r\n\r\n", "[{\"X-A\" \"b c d\"}]\nend []\nreusable true"},
		{"GET", ok + "Connection: close, x\r\nX: 1\r\nUpgrade: h2\r\nContent-Length: 0\r\n\r\n", "0 HTTP/1.1 []\nend []\nreusable false over true"},
		{"GET", "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP/1.0 []\nend []\nreusable false over true"},
		{"GET", "HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n", "HTTP/1.0 []\nend []\nreusable true"},
		{"GET", ok + "\r\nabc", "-1 HTTP/1.1 []\ndata \"abc\"\nreusable false over false"},
		{"HEAD", ok + "Content-Length: 3\r\n\r\n", "200 \"\" 3 HTTP/1.1 []\nend []\nreusable true"},
		{"HEAD", ok + "Transfer-Encoding: chunked\r\n\r\n", "end []\nreusable true"},
		{"HEAD", ok + "\r\n", "200 \"\" -1 HTTP/1.1 []\nend []\nreusable true"},
		{"GET", "HTTP/1.1 304 x\r\nContent-Length: 3\r\n\r\n", "304 \"\" 3 HTTP/1.1 []\nend []\nreusable true"},
		{"GET", "HTTP/1.1 204 x\r\nContent-Length: 0\r\n\r\n", "end []\nreusable true"},
		{"GET", "HTTP/1.1 204 x\r\nContent-Length: 3\r\n\r\n", "end []\nreusable false over true"},
		{"GET", "HTTP/1.1 204 x\r\nTransfer-Encoding: chunked\r\n\r\n", "end []\nreusable false over true"},
		{"GET", "HTTP/1.1 103 x\r\nLink: a\r\n\r\nHTTP/1.1 100 \r\n\r\n" + ok + "Content-Length: 0\r\n\r\n", "103 \"\" -1 HTTP/1.1 [{\"Link\" \"a\"}]\n100 \"\" -1 HTTP/1.1 []\n200 \"\" 0 HTTP/1.1 []\nend []\nreusable true"},
		{"GET", "HTTP/1.1 103 x\r\nContent-Length: 3\r\n\r\n" + ok + "Content-Length: 0\r\n\r\n", "end []\nreusable false over true"},
		{"UPGRADE", "HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\nX: y\r\n\r\n\x00raw", "101 \"WebSocket\" -1 HTTP/1.1 [{\"X\" \"y\"}]\ndata \"\\x00raw\"\nreusable false over false"},
		{"UPGRADE", ok + "Content-Length: 0\r\n\r\n", "200 \"\" 0 HTTP/1.1 []\nend []\nreusable true"},
		{"GET HEAD GET", ok + "Content-Length: 1\r\n\r\na" + ok + "Content-Length: 1\r\n\r\n" + ok + "Content-Length: 1\r\n\r\nb", "data \"a\"\nend []\n200 \"\" 1 HTTP/1.1 []\nend []\n200 \"\" 1 HTTP/1.1 []\ndata \"b\"\nend []\nreusable true"},
		// Refused.
		{"GET", ok + "Content-Length: 1\r\n\r\nabc", "data \"a\"\nend []\nerror 502 protocol_error\nreusable false over true"},
		{"HEAD", ok + "Content-Length: 1\r\n\r\na", "end []\nerror 502 protocol_error"},
		{"", "H", "error 502 protocol_error\nreusable false over true"},
		{"GET", "SSH-2.0\r\n", "error 502"}, {"GET", "\r\n" + ok, "error 502"}, {"GET", "HTTP/2.0 200 OK\r\n\r\n", "error 502"},
		{"GET", "HTTP/1.1 099 x\r\n\r\n", "error 502"}, {"GET", "HTTP/1.1 20 x\r\n\r\n", "error 502"}, {"GET", "HTTP/1.1 2000 x\r\n\r\n", "error 502"},
		{"GET", "HTTP/1.1 +20 x\r\n\r\n", "error 502"}, {"GET", "HTTP/1.1  200 x\r\n\r\n", "error 502"}, {"GET", "HTTP/1.1 200 \x00\r\n\r\n", "error 502"},
		{"GET", "HTTP/1.1 200 a\rb\r\n\r\n", "error 502"}, {"GET", "HTTP/1.1 200 OK\n\n", "error 502"},
		{"GET", "HTTP/1.1 101 x\r\nUpgrade: websocket\r\n\r\n", "error 502"}, {"UPGRADE", "HTTP/1.1 101 x\r\nUpgrade: other\r\n\r\n", "error 502"},
		{"GET", ok + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", "error 502"},
		{"GET", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "error 502"},
		{"GET", ok + "Transfer-Encoding: gzip, chunked\r\n\r\n", "error 502"}, {"GET", ok + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", "error 502"},
		{"GET", ok + "Content-Length: 3\r\n 4\r\n\r\nabc", "error 502"}, {"GET", ok + "Transfer-Encoding: chunked\r\n\t\r\n\r\n", "error 502"},
		{"GET", ok + "X-A: b\r\n \x00\r\n\r\n", "error 502"}, {"GET", ok + "Content-Length:\r\n\r\n", "error 502"},
		{"GET", ok + " X-A: b\r\n\r\n", "error 502"}, {"GET", ok + "X: " + strings.Repeat("x", 600) + "\r\n\r\n", "error 502"},
		{"GET", ok + strings.Repeat("X: x\r\n", 9) + "\r\n", "error 502"},
		{"GET", strings.Repeat("HTTP/1.1 103 x\r\n\r\n", 101), "error 502"},
	} {
		got := everySplit(t, test.stream, fromBackend(strings.Fields(test.methods)...))
		if !strings.Contains(got, test.want) {
			t.Errorf("%s %q:\n%s\nwant\n%s", test.methods, test.stream, got, test.want)
		}
	}
}

// TestPeerClosed: only a clean end completes what has no other end.
func TestPeerClosed(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	backend := func(methods ...string) func() *driver { return fromBackend(methods...) }
	for _, test := range []struct {
		name, stream string
		start        func() *driver
		clean, cut   string
	}{
		{"idle backend", "", backend(), "reusable false over true", "reusable false over true"},
		{"no response", "", backend("GET"), "cut reset: the connection ended before the response", "cut reset"},
		{"head", "HTTP/1.1 2", backend("GET"), "cut reset: the connection ended inside a head", "cut reset"},
		{"to close", ok + "\r\nab", backend("GET"), "data \"ab\"\nend []\nreusable false over true", "data \"ab\"\ncut reset: the connection ended inside a body\nreusable false over true"},
		{"length", ok + "Content-Length: 3\r\n\r\nab", backend("GET"), "cut reset", "cut reset"},
		{"chunks", ok + "Transfer-Encoding: chunked\r\n\r\n0\r\n", backend("GET"), "cut reset", "cut reset"},
		{"tunnel", "HTTP/1.1 101 x\r\nUpgrade: websocket\r\n\r\nab", backend("UPGRADE"), "data \"ab\"\nend []\nreusable false over false", "cut reset: the connection of a tunnel"},
		{"answered", ok + "Content-Length: 1\r\n\r\na", backend("GET"), "end []\nreusable false over true", "end []\nreusable false over true"},
		{"idle client", "", fromClient, "reusable false over true lingers false", "reusable false over true"},
		{"request head", "GET", fromClient, "cut client_abort: the connection ended inside a head", "cut client_abort"},
		{"request body", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\na", fromClient, "cut client_abort: the connection ended inside a body", "cut client_abort"},
	} {
		for clean, want := range map[bool]string{true: test.clean, false: test.cut} {
			d := test.start()
			d.ended = func() {}
			d.feed([]byte(test.stream))
			d.close(clean)
			if got := d.String(); !strings.Contains(got, want) {
				t.Errorf("%s, clean %v: %s\nwant %s", test.name, clean, got, want)
			}
		}
	}
	// A client that has sent all it wants to send gets its answer.
	d := fromClient()
	d.ended = func() {}
	d.feed([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	d.close(true)
	out, err := d.conn.AppendResponse(nil, &exchange.Response{Status: 200})
	if err == nil {
		out, err = d.conn.AppendEnd(out, nil)
	}
	if want := "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"; err != nil || string(out) != want || !d.conn.Over() {
		t.Errorf("%q %v, over %v", out, err, d.conn.Over())
	}
}
