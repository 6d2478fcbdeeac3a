package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"math/rand"
	"net/http"
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// TestAnyOrder calls a server in any order with anything. What it writes is at
// most one answer, and a whole one when it says so.
func TestAnyOrder(t *testing.T) {
	requests := []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
	}
	whole, kept := 0, 0
	for seed := range int64(5000) {
		r := rand.New(rand.NewSource(seed))
		request := requests[r.Intn(len(requests))]
		d := server(Limits{})
		d.ended = func() {}
		fed := 0
		var out []byte
		for range 8 + r.Intn(16) {
			if d.heads > 0 && d.conn.Reusable() {
				break
			}
			switch r.Intn(12) {
			case 0, 1, 2, 3:
				more := len(request) - fed
				if r.Intn(3) == 0 {
					more = r.Intn(more + 1)
				}
				d.feed([]byte(request[fed : fed+more]))
				fed += more
			case 4:
				out, _ = d.conn.AppendInformational(out, []int{100, 103, 200}[r.Intn(3)], exchange.Fields{{Name: "Link", Value: "a"}})
			case 5, 6:
				response := exchange.Response{Status: []int{101, 103, 200, 204, 304, 500}[r.Intn(6)], Length: int64(r.Intn(5) - 1), Protocol: "websocket"}
				response.Fields.Add([]string{"A", "Trailer", "Content-Length", "bad name"}[r.Intn(4)], "X-T")
				out, _ = d.conn.AppendResponse(out, &response)
			case 7, 8, 9:
				out, _ = d.conn.AppendData(out, []byte("body")[:r.Intn(5)])
			case 10:
				out, _ = d.conn.AppendEnd(out, exchange.Fields{{Name: "X-T", Value: "1"}})
			default:
				if r.Intn(5) == 0 {
					d.conn.CloseAfter()
				} else if r.Intn(5) == 0 {
					d.conn.StopReading()
				}
			}
		}
		ended := d.conn.writing == writeEnd || d.heads > 0 && d.conn.Reusable()
		if ended {
			whole++
		}
		reader := bufio.NewReader(bytes.NewReader(out))
		answers, closing, method := 0, false, "GET" // of a head that has not come nobody knows
		if d.heads > 0 {
			method = request[:strings.IndexByte(request, ' ')]
		}
		for {
			response, err := http.ReadResponse(reader, &http.Request{Method: method})
			if errors.Is(err, io.ErrUnexpectedEOF) {
				break
			}
			if err != nil {
				t.Fatalf("seed %d, %q: %q: %v", seed, request, out, err)
			}
			if response.StatusCode >= 200 {
				answers++
				closing = response.Close
			}
			if _, err := io.Copy(io.Discard, response.Body); err != nil && ended {
				t.Fatalf("seed %d, %q: %q: %v", seed, request, out, err)
			}
		}
		if answers > 1 || ended && answers != 1 || reader.Buffered() > 0 {
			t.Fatalf("seed %d, %q: %d answers in %q", seed, request, answers, out)
		}
		if d.heads > 0 && d.conn.Reusable() {
			if kept++; closing || fed < len(request) {
				t.Fatalf("seed %d, %q: reusable after %q, %d bytes of the request", seed, request, out, fed)
			}
		}
	}
	if whole < 500 || kept < 200 {
		t.Errorf("%d whole answers, %d connections kept", whole, kept)
	}
}
