package interop

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/peers"
)

// step is a request of HTTP/1 as it is sent, with "@" for the host, and what
// must come back.
type step struct {
	text   string
	status int
	body   []byte
	length int64 // that the head says; -1: none
}

// steps are requests after each of which it takes care to find where the answer
// ends.
var steps = []step{
	{"HEAD " + peers.Large + " HTTP/1.1\nHost: @\n\n", 200, nil, int64(len(peers.Body(peers.Large)))},
	{"GET " + peers.Small + " HTTP/1.1\nHost: @\n\n", 200, peers.Body(peers.Small), 1 << 10},
	{"GET " + peers.Status + "/204 HTTP/1.1\nHost: @\n\n", 204, nil, 0},
	{"GET " + peers.NotModified + " HTTP/1.1\nHost: @\n\n", 304, nil, 0},
	{"HEAD " + peers.Chunked + " HTTP/1.1\nHost: @\n\n", 200, nil, -1},
	{"GET " + peers.Empty + " HTTP/1.1\nHost: @\n\n", 200, []byte{}, 0},
	{"GET " + peers.Chunked + " HTTP/1.1\nHost: @\n\n", 200, peers.Body(peers.Chunked), -1},
	{"POST " + peers.Echo + " HTTP/1.1\nHost: @\nContent-Length: 4\n\nbody", 200, []byte("body"), 4},
	{"POST " + peers.Echo + " HTTP/1.1\nHost: @\nTransfer-Encoding: chunked\n\n4\nbody\n0\n\n", 200, []byte("body"), 4},
	{"GET " + peers.Trailers + " HTTP/1.1\nHost: @\n\n", 200, peers.Body(peers.Trailers), -1},
	{"HEAD " + peers.NotModified + " HTTP/1.1\nHost: @\n\n", 304, nil, 0},
	{"GET " + peers.Medium + " HTTP/1.1\nHost: @\n\n", 200, peers.Body(peers.Medium), 256 << 10},
	{"HEAD " + peers.Status + "/404 HTTP/1.1\nHost: @\n\n", 404, nil, 0},
	{"DELETE " + peers.Status + "/204 HTTP/1.1\nHost: @\n\n", 204, nil, 0},
}

func (s step) request(pool string) string {
	return strings.ReplaceAll(strings.ReplaceAll(s.text, "@", host(pool)), "\n", "\r\n")
}

// check reads the answer.
func (s step) check(reader *bufio.Reader) error {
	method, _, _ := strings.Cut(s.text, " ")
	response, err := http.ReadResponse(reader, &http.Request{Method: method})
	if err != nil {
		return err
	}
	body, err := io.ReadAll(response.Body)
	bodiless := method == http.MethodHead || s.status == 204 || s.status == 304
	switch {
	case err != nil:
		return err
	case response.StatusCode != s.status || !bytes.Equal(body, s.body):
		return fmt.Errorf("%s with %d bytes, want %d with %d", response.Status, len(body), s.status, len(s.body))
	case response.ContentLength != s.length && !(bodiless && s.length == 0):
		return fmt.Errorf("a length of %d, want %d", response.ContentLength, s.length)
	case s.status == 204 && (response.Header.Get("Content-Length") != "" || len(response.TransferEncoding) > 0):
		return fmt.Errorf("framed as %v", response.Header) // RFC 9110 section 8.6, RFC 9112 section 6.1
	}
	return nil
}

// pipelining sends all at once, or one after the other: the answers are the same.
func (m *messages) pipelining(t *testing.T) {
	for _, pool := range []string{"h1", "h2"} {
		t.Run(pool, func(t *testing.T) {
			conn := m.raw(t, "http/1.1")
			reader := bufio.NewReader(conn)
			for _, step := range steps {
				_, _ = io.WriteString(conn, step.request(pool))
				if err := step.check(reader); err != nil {
					t.Fatalf("%q: %v", step.text, err)
				}
			}
			var all strings.Builder
			for range 5 {
				for _, step := range steps {
					all.WriteString(step.request(pool))
				}
			}
			go func() { _, _ = io.WriteString(conn, all.String()) }()
			for i := range 5 * len(steps) {
				if err := steps[i%len(steps)].check(reader); err != nil {
					t.Fatalf("pipelined, %d, %q: %v", i, steps[i%len(steps)].text, err)
				}
			}
			last := step{"GET " + peers.Small + " HTTP/1.1\nHost: @\nConnection: close\n\n", 200, peers.Body(peers.Small), 1 << 10}
			_, _ = io.WriteString(conn, last.request(pool))
			if err := last.check(reader); err != nil {
				t.Fatal(err)
			}
			if rest, err := io.ReadAll(reader); len(rest) > 0 || err != nil {
				t.Errorf("after the last answer: %q, %v", rest, err)
			}
		})
	}
}

// http10: clients of HTTP/1.0 are never sent chunks, and may keep a connection.
func (m *messages) http10(t *testing.T) {
	for _, pool := range []string{"h1", "h2"} {
		t.Run(pool, func(t *testing.T) {
			kept := []step{
				{"GET " + peers.Small + " HTTP/1.0\nHost: @\nConnection: keep-alive\n\n", 200, peers.Body(peers.Small), 1 << 10},
				{"HEAD " + peers.Large + " HTTP/1.0\nHost: @\nConnection: keep-alive\n\n", 200, nil, int64(len(peers.Body(peers.Large)))},
				{"POST " + peers.Echo + " HTTP/1.0\nHost: @\nConnection: keep-alive\nContent-Length: 4\n\nbody", 200, []byte("body"), 4},
				{"GET " + peers.NotModified + " HTTP/1.0\nHost: @\nConnection: keep-alive\n\n", 304, nil, 0},
			}
			ends := []step{
				{"GET " + peers.Chunked + " HTTP/1.0\nHost: @\nConnection: keep-alive\n\n", 200, peers.Body(peers.Chunked), -1},
				{"GET " + peers.Trailers + " HTTP/1.0\nHost: @\n\n", 200, peers.Body(peers.Trailers), -1},
				{"GET " + peers.Small + " HTTP/1.0\nHost: @\n\n", 200, peers.Body(peers.Small), 1 << 10},
			}
			for _, end := range ends {
				conn := m.raw(t, "http/1.1")
				reader := bufio.NewReader(conn)
				for _, step := range append(kept, end) {
					_, _ = io.WriteString(conn, step.request(pool))
					if err := step.check(reader); err != nil {
						t.Fatalf("%q: %v", step.text, err)
					}
				}
				if rest, err := io.ReadAll(reader); len(rest) > 0 || err != nil {
					t.Errorf("%q: after the answer %q, %v", end.text, rest, err)
				}
			}
			m.nameless(t, pool)
		})
	}
}

// nameless: without Host the name of the TLS handshake counts.
func (m *messages) nameless(t *testing.T, pool string) {
	t.Helper()
	config := m.ClientTLS()
	config.ServerName = host(pool)
	conn, err := tls.Dial("tcp", m.address, config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(soon())
	_, _ = io.WriteString(conn, "GET "+peers.Chunked+" HTTP/1.0\r\n\r\n")
	answer, err := io.ReadAll(conn)
	head, body, found := bytes.Cut(answer, []byte("\r\n\r\n"))
	if err != nil || !found || !bytes.Equal(body, peers.Body(peers.Chunked)) || bytes.Contains(bytes.ToLower(head), []byte("transfer-encoding")) {
		t.Errorf("%d bytes after %q, %v", len(body), head, err)
	}
}
