package exchange

import (
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
