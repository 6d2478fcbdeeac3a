package frontend

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// ask makes a request on a connection and returns the status.
func ask(t *testing.T, conn net.Conn) int {
	t.Helper()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
	response := must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil))
	bodyOf(t, response)
	return response.StatusCode
}

// TestRecordIsJSON writes values as log/slog does.
func TestRecordIsJSON(t *testing.T) {
	for _, value := range []string{"", "plain", `q"u\o`, "a\x00\x1f\x7f\nb", "\xff\xfe", "é€😀", "<&>", "\u2028", strings.Repeat("é", 2000)} {
		line := record("{")
		line.boolean("b", true)
		line.text("text", value)
		line.number("n", -7)
		line.milliseconds("ms", 1234567*time.Nanosecond)
		line = append(line, '}')
		line = append(line[:1], line[2:]...) // the first comma
		var buffer bytes.Buffer
		slog.New(slog.NewJSONHandler(&buffer, nil)).Info("", "b", true, "text", bounded(value), "n", -7, "ms", 1.234)
		var got, want map[string]any
		if err := json.Unmarshal(line, &got); err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if err := json.Unmarshal(buffer.Bytes(), &want); err != nil {
			t.Fatal(err)
		}
		for name, value := range got {
			if value != want[name] {
				t.Errorf("%s: %q, want %q", name, value, want[name])
			}
		}
	}
}

func BenchmarkAccessLog(b *testing.B) {
	q, out := loggedRequest(), &discard{}
	q.client.slot.frontend.cfg.AccessLog = out
	b.ReportAllocs()
	for b.Loop() {
		q.log(time.Millisecond)
	}
}

type discard struct{}

func (*discard) Write(p []byte) (int, error) { return len(p), nil }

func loggedRequest() *request {
	s := &slot{name: "main", frontend: &Frontend{}}
	q := &request{client: &clientConn{slot: s, lane: &lane{}, serverName: "app.test"}, status: 200}
	q.head.Method, q.head.Target, q.authority = "GET", "/some/path?query", "app.test"
	return q
}
