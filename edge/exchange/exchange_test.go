package exchange

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestTrailerAllowed(t *testing.T) {
	for _, name := range []string{"X-Sum", "grpc-status", "Server-Timing", "Digest"} {
		if !TrailerAllowed(name) {
			t.Errorf("%s is forbidden", name)
		}
	}
	for _, name := range []string{
		"Host", "host", "Content-Length", "Transfer-Encoding", "TE", "Trailer", "Connection", "Cookie", "Authorization", "If-Match",
		"X-Forwarded-For", "x_forwarded_for", "X-Real-IP", "Client-Cert", "X-SSL-Client-Verify", "", "a b", ":path",
	} {
		if TrailerAllowed(name) {
			t.Errorf("%q is allowed", name)
		}
	}
}

func TestEndOfHeadInParts(t *testing.T) {
	const head = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	for cut := range head {
		if end, err := EndOfHead([]byte(head[:cut]), 0); end != 0 || err != nil {
			t.Fatalf("%q: %d %v", head[:cut], end, err)
		}
		if end, err := EndOfHead([]byte(head+"rest"), cut); end != len(head) || err != nil {
			t.Fatalf("from %d: %d %v", cut, end, err)
		}
	}
}

// TestBodyInParts: what has not ended is passed again, and searched once.
func TestBodyInParts(t *testing.T) {
	const body = "3;a=b\r\nabc\r\n0\r\nX-T: 1\r\nHost: x\r\n\r\n"
	b, held, content := NewBody(Framing{Chunked: true, Length: UnknownLength}), "", ""
	for i := range len(body) {
		held += body[i : i+1]
		n, part, err := b.Next([]byte(held))
		content, held = content+string(part), held[n:]
		if err != nil || b.seen > len(held) {
			t.Fatalf("byte %d: %v, %d searched of %q", i, err, b.seen, held)
		}
		if !b.AtTrailer() {
			continue
		}
		n, fields, err := b.Trailer([]byte(held), 100, 2)
		if err != nil || n == 0 && b.seen != len(held) {
			t.Fatalf("byte %d: %v, %d searched of %q", i, err, b.seen, held)
		}
		if n > 0 && (len(fields) != 1 || fields[0] != Field{Name: "X-T", Value: "1"}) {
			t.Errorf("%v", fields)
		}
	}
	if !b.Over() || content != "abc" {
		t.Errorf("%q, over %v", content, b.Over())
	}
}

// FuzzRequest holds the rules against net/http: of each message that they let
// through, net/http sees the same end, and the same body whole or in parts.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /2 HTTP/1.1\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcGET",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nX-T: 1\r\n\r\nGET",
		"POST / HTTP/1.1\r\nHost: x\r\ntransfer-encoding: CHUNKED\r\n\r\n3 \r\nabc\r\n00\r\n\r\nGET",
		"POST / HTTP/1.0\r\nHost: x\r\nContent-Length: 0\r\n\r\nGET",
	} {
		f.Add([]byte(seed), 7)
	}
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		end, err := EndOfHead(data, 0)
		if err != nil || end == 0 {
			return
		}
		head, err := CheckHead(data[:end], true)
		if err != nil {
			return
		}
		whole, parts := NewBody(head.Framing), NewBody(head.Framing)
		n, err := whole.Advance(data[end:])
		if err != nil || !whole.Over() {
			return
		}
		rest := data[end:]
		cut = min(max(cut, 0), len(rest))
		first, err := parts.Advance(rest[:cut])
		if err != nil {
			t.Fatalf("in parts: %v", err)
		}
		if second, err := parts.Advance(rest[first:]); err != nil || first+second != n {
			t.Fatalf("in parts: %d and %d, whole %d, %v", first, second, n, err)
		}
		source := bytes.NewReader(data)
		reader := bufio.NewReader(source)
		request, err := http.ReadRequest(reader)
		if err != nil {
			return // net/http is stricter: nothing goes on
		}
		if _, err := io.Copy(io.Discard, request.Body); err != nil {
			return
		}
		if used := len(data) - source.Len() - reader.Buffered(); used != end+n {
			t.Fatalf("%q ends at %d, for net/http at %d", data, end+n, used)
		}
	})
}

func TestNames(t *testing.T) {
	head, err := CheckHead([]byte("GET / HTTP/1.1\r\nHost: x\r\nSOAPAction: a\r\nsoapaction: b\r\nX-Ok: 1\r\n\r\n"), true)
	if err != nil || len(head.Names) != 1 || head.Names["Soapaction"] != "SOAPAction" || !strings.HasPrefix(head.Start, "GET") {
		t.Errorf("%+v %v", head, err)
	}
}
