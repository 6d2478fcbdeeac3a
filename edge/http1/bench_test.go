package http1

import (
	"bytes"
	"testing"
	"unsafe"

	"github.com/reseal/reseal/edge/exchange"
)

const typicalRequest = "GET /catalogue/items?page=2&sort=price HTTP/1.1\r\nHost: shop.example.test\r\n" +
	"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n" +
	"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\nAccept-Language: en-GB,en;q=0.5\r\n" +
	"Accept-Encoding: gzip, deflate, br, zstd\r\nReferer: https://shop.example.test/catalogue\r\nConnection: keep-alive\r\n" +
	"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark\r\nSec-Fetch-Mode: navigate\r\nPriority: u=0, i\r\n\r\n"

var typicalResponse = "HTTP/1.1 200 OK\r\nDate: Sun, 29 Nov 2026 12:00:00 GMT\r\nContent-Type: text/html; charset=utf-8\r\n" +
	"Cache-Control: max-age=60\r\nServer: backend\r\nContent-Length: 1024\r\n\r\n" + string(bytes.Repeat([]byte("x"), 1024))

// served answers as typicalResponse does.
func served(b testing.TB, c *Conn, out []byte, r *exchange.Response, body []byte) []byte {
	out, err := c.AppendResponse(out, r)
	if err == nil {
		out, err = c.AppendData(out, body)
	}
	if err == nil {
		out, err = c.AppendEnd(out, nil)
	}
	if err != nil || !c.Reusable() {
		b.Fatal(err)
	}
	return out
}

// serverRound is a request and its answer.
func serverRound(b testing.TB, c *Conn, in []byte, event *Event, out []byte) {
	if n, err := c.Next(in, event); n != len(in) || err != nil || event.Kind != Request {
		b.Fatal(n, err)
	}
	if _, err := c.Next(nil, event); err != nil || event.Kind != End {
		b.Fatal(err)
	}
	served(b, c, out, &emptyResponse, nil)
}

var emptyResponse = exchange.Response{Status: 200}

func BenchmarkNextRequest(b *testing.B) {
	c, in, event, out := NewServer(Limits{}), []byte(typicalRequest), Event{}, make([]byte, 0, 256)
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		serverRound(b, c, in, &event, out)
	}
}

// clientRound is a request and its answer of 1 KB.
func clientRound(b testing.TB, c *Conn, r *exchange.Request, in []byte, event *Event, out []byte) {
	out, err := c.AppendRequest(out, r)
	if err != nil {
		b.Fatal(err)
	}
	if _, err = c.AppendEnd(out, nil); err != nil {
		b.Fatal(err)
	}
	for at := 0; event.Kind != End; {
		n, err := c.Next(in[at:], event)
		if at += n; err != nil {
			b.Fatal(err)
		}
	}
	if !c.Reusable() {
		b.Fatal("not reusable")
	}
	event.Kind = None
}

func BenchmarkNextResponse(b *testing.B) {
	c, in, event, out := NewClient(Limits{}), []byte(typicalResponse), Event{}, make([]byte, 0, 256)
	r := &exchange.Request{Method: "GET", Authority: "shop.example.test", Target: "/"}
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		clientRound(b, c, r, in, &event, out)
	}
}

// BenchmarkData reads and writes bodies alone.
func BenchmarkData(b *testing.B) {
	for _, framing := range []string{"length", "chunks of 1 KB", "chunks of 32 KB"} {
		chunk := 32 << 10
		length := int64(1) << 60
		if framing != "length" {
			length = exchange.UnknownLength
		}
		if framing == "chunks of 1 KB" {
			chunk = 1 << 10
		}
		writer := NewClient(Limits{})
		head, err := writer.AppendRequest(nil, &exchange.Request{Method: "POST", Authority: "a", Target: "/", Length: length})
		if err != nil {
			b.Fatal(err)
		}
		data := make([]byte, chunk)
		var wire []byte
		for range 32 << 10 / chunk {
			if wire, err = writer.AppendData(wire, data); err != nil {
				b.Fatal(err)
			}
		}
		b.Run("read "+framing, func(b *testing.B) {
			c, event := NewServer(Limits{}), Event{}
			if n, err := c.Next(head, &event); n != len(head) || err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(wire)))
			b.ReportAllocs()
			for b.Loop() {
				for at := 0; at < len(wire); {
					n, err := c.Next(wire[at:], &event)
					if at += n; err != nil || n == 0 {
						b.Fatal(err)
					}
				}
			}
		})
		b.Run("write "+framing, func(b *testing.B) {
			out := make([]byte, 0, 2*len(wire))
			b.SetBytes(int64(len(wire)))
			b.ReportAllocs()
			for b.Loop() {
				out = out[:0]
				for range 32 << 10 / chunk {
					if out, err = writer.AppendData(out, data); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// TestAllocations: a head costs one string, if the caller lends the fields, and a
// body nothing.
func TestAllocations(t *testing.T) {
	in, out, event := []byte(typicalRequest), make([]byte, 0, 4096), Event{}
	s := NewServer(Limits{})
	c, response, answer := NewClient(Limits{}), []byte(typicalResponse), Event{}
	request := &exchange.Request{Method: "GET", Authority: "shop.example.test", Target: "/", Fields: exchange.Fields{{Name: "Accept", Value: "*/*"}}}
	for name, test := range map[string]struct {
		most float64
		run  func()
	}{
		"request":                    {1, func() { serverRound(t, s, in, &event, out) }},
		"request, fields taken over": {2, func() { event.Request.Fields = nil; serverRound(t, s, in, &event, out) }},
		"response":                   {1, func() { clientRound(t, c, request, response, &answer, out) }},
	} {
		if got := testing.AllocsPerRun(100, test.run); got > test.most {
			t.Errorf("%s: %v allocations, want %v", name, got, test.most)
		}
	}
	if size := unsafe.Sizeof(Conn{}); size > 160 {
		t.Errorf("a connection holds %d bytes", size)
	}
}
