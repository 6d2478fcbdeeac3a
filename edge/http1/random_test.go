package http1

import (
	"math/rand"
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// Lines and pieces of which random messages are made: what frames them, what
// means something to a connection, and what may confuse a parser.
var (
	requestLines  = []string{"GET / HTTP/1.1\r\nHost: a\r\n", "POST /x HTTP/1.1\r\nHost: a\r\n", "POST /x HTTP/1.0\r\n", "HEAD https://b?y HTTP/1.1\r\nHost: a\r\n", "OPTIONS http://b:1 HTTP/1.1\r\nHost: [::1]:8\r\n"}
	responseLines = []string{"HTTP/1.1 200 OK\r\n", "HTTP/1.0 204\r\n", "HTTP/1.1 304 x\r\n", "HTTP/1.1 103 x\r\n", "HTTP/1.1 101 x\r\nUpgrade: websocket\r\n", "HTTP/1.0 200 x\r\nConnection: keep-alive\r\n"}
	fieldLines    = []string{
		"Content-Length: 3\r\n", "Content-Length: 0\r\n", "Transfer-Encoding: chunked\r\n", "Connection: close\r\n", "Connection: keep-alive\r\n", "Connection: x, Upgrade\r\n",
		"Connection: trailer, X-T\r\n", "Upgrade: websocket\r\n", "TE: trailers\r\n", "Trailer: X-T\r\n", "Trailer: Expires, X\r\n", "X-T: 1\r\n", "X: y\r\n", "x-A: \xff\r\n", "Expect: 100-continue\r\n",
		"Pragma: no-cache\r\n", "Cache-Control: y\r\n", "Cookie: a=b\r\n", "Keep-Alive: 1\r\n", "Host: b\r\n", " folded\r\n", "\tfolded\r\n", " \r\n",
	}
	bodyPieces = []string{"3\r\nabc\r\n", "0\r\n", "0\r\n\r\n", "1;a=b\r\nx\r\n", "abc", "\r\n", "\n", "\r", " ", "X-T: 1\r\n"}
)

// TestRandomMessages holds random messages against net/http, as the fuzzers do,
// which find the way to a whole message more slowly.
func TestRandomMessages(t *testing.T) {
	taken := 0
	for seed := range int64(10_000) {
		r := rand.New(rand.NewSource(seed))
		pick := func(from []string) string { return from[r.Intn(len(from))] }
		response := r.Intn(2) == 0
		var text strings.Builder
		for range 1 + r.Intn(3) {
			if response {
				text.WriteString(pick(responseLines))
			} else {
				text.WriteString(pick(requestLines))
			}
			for range r.Intn(6) {
				text.WriteString(pick(fieldLines))
			}
			text.WriteString("\r\n")
			for range r.Intn(5) {
				text.WriteString(pick(bodyPieces))
			}
		}
		data := []byte(text.String())
		if r.Intn(3) == 0 {
			data[r.Intn(len(data))] = byte(r.Intn(256))
		}
		if cut := r.Intn(len(data)); response {
			methods := []string{"GET", "HEAD", "UPGRADE", "GET"}
			r.Shuffle(len(methods), func(i, j int) { methods[i], methods[j] = methods[j], methods[i] })
			taken += compareResponses(t, data, cut, methods)
		} else {
			taken += compareRequests(t, data, cut)
		}
	}
	if taken < 2000 {
		t.Errorf("only %d messages were taken", taken)
	}
}

// compareRequests compares what the machine takes with what net/http sees, and
// returns how many messages that are.
func compareRequests(t *testing.T, data []byte, cut int) int {
	t.Helper()
	cutAnywhere(t, data, cut, func() *driver { return server(Limits{}) })
	c := NewServer(Limits{})
	messages := readAll(c, data, func() {
		if _, err := c.AppendResponse(nil, &exchange.Response{Status: 200}); err != nil {
			t.Fatal(err)
		}
		_, _ = c.AppendEnd(nil, nil)
	})
	for _, m := range messages {
		sameRequest(t, data[m.start:], m)
	}
	return len(messages)
}

// compareResponses is the same for responses to requests of methods.
func compareResponses(t *testing.T, data []byte, cut int, methods []string) int {
	t.Helper()
	cutAnywhere(t, data, cut, func() *driver { return client(Limits{}, methods...) })
	d, next := client(Limits{}, methods...), 0
	messages := readAll(d.conn, data, d.send)
	for _, m := range messages {
		method := methods[next]
		if m.event.Kind == Response {
			next++
		}
		sameResponse(t, data[m.start:], m, method)
	}
	return len(messages)
}
