package edge

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestNamesAsWritten: field names go on as they were written, between HTTP/1.1
// and HTTP/1.1.
func TestNamesAsWritten(t *testing.T) {
	b := serveHTTP1(t, func(*http.Request, []byte) string {
		return ok("", "ETag: x", "date: Sun, 29 Nov 2026 12:00:00 GMT", "content-type: text/plain", "X-lower: 1", "WWW-Authenticate: Basic")
	})
	x := newLegs(t, b.address)
	conn := x.dial("http/1.1")
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nhost: public.test\r\nSOAPAction: a\r\nsec-CH-ua: b\r\nX-Plain: c\r\nConnection: close\r\n\r\n")
	response, _ := io.ReadAll(conn)
	for _, line := range []string{"ETag: x\r\n", "date: Sun", "content-type: text/plain\r\n", "X-lower: 1\r\n", "WWW-Authenticate: Basic\r\n"} {
		if bytes.Count(bytes.ToLower(response), []byte(strings.ToLower(line[:strings.Index(line, ":")+1]))) != 1 || !bytes.Contains(response, []byte(line)) {
			t.Errorf("%q is not in %q once", line, response)
		}
	}
	got := b.received()[0]
	for _, line := range []string{"Host: public.test\r\n", "SOAPAction: a\r\n", "sec-CH-ua: b\r\n", "X-Plain: c\r\n"} {
		if !strings.Contains(got, line) {
			t.Errorf("%q is not in %q", line, got)
		}
	}
}

// TestWebSocketNamesAsWritten: some WebSocket servers and clients look for the
// names as RFC 6455 spells them.
func TestWebSocketNamesAsWritten(t *testing.T) {
	b := serveRaw(t, "http/1.1", func(c net.Conn, _ int) {
		reader := bufio.NewReader(c)
		if _, err := http.ReadRequest(reader); err != nil {
			return
		}
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n")
		_, _ = io.Copy(c, reader)
	})
	x := newLegs(t, b.address)
	conn := x.dial("http/1.1")
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: public.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n\x82\x7f\x00\nframe")
	_ = conn.CloseWrite()
	got, _ := io.ReadAll(conn)
	if head, rest, ok := bytes.Cut(got, []byte("\r\n\r\n")); !ok || !bytes.Contains(head, []byte("Sec-WebSocket-Accept: x")) || string(rest) != "\x82\x7f\x00\nframe" {
		t.Errorf("the client got %q", got)
	}
	if !strings.Contains(b.received()[0], "Sec-WebSocket-Key: k\r\n") {
		t.Errorf("the backend got %q", b.received()[0])
	}
}

// TestHalfClose: a client that has said, by close_notify, that it sends no more
// gets its answer, however long that takes.
func TestHalfClose(t *testing.T) {
	answer := make(chan struct{})
	b := serveHTTP1(t, func(_ *http.Request, body []byte) string { <-answer; return ok("got " + string(body)) })
	x := newLegs(t, b.address)
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: public.test\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: public.test\r\nContent-Length: 3\r\n\r\nabc",
		"POST / HTTP/1.1\r\nHost: public.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
	} {
		conn := x.dial("http/1.1", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 + uint16(len(request)%2) })
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		go func() {
			time.Sleep(100 * time.Millisecond) // for the edge to see close_notify first
			answer <- struct{}{}
		}()
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%q: %v", request, err)
		}
		body, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != 200 || !strings.HasPrefix(string(body), "got ") {
			t.Errorf("%q: %d %q %v", request, response.StatusCode, body, err)
		}
		conn.Close()
	}
}
