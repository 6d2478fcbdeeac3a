package frontend

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"

	"github.com/reseal/reseal/edge/exchange"
)

// TestHeaderFields: fields are bounded in number, since each costs more than its
// bytes, and above all in HTTP/2, where one byte can stand for a field.
func TestHeaderFields(t *testing.T) {
	e := newEdge(t, answering("ok"))
	fields := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "x%d: y\r\n", i)
		}
		return b.String()
	}
	for n, want := range map[int]int{99: 200, 100: 431, 3000: 431} { // and Host
		conn := e.dial()
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: app.test\r\n%s\r\n", fields(n))
		if got := must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil)); got.StatusCode != want {
			t.Errorf("http/1.1: %d fields: %s, want %d", n, got.Status, want)
		}
	}
	h := e.h2Dial()
	var stream uint32 = 1
	for n, want := range map[int]string{99: "200", 100: "431", 3000: "431"} {
		var more []string
		for i := range n {
			more = append(more, fmt.Sprintf("x%d", i), "y")
		}
		if err := h.request(stream, "GET", true, more...); err != nil {
			t.Fatal(err)
		}
		if end := h.read(func(end *h2End) bool { return end.answers[stream] != "" }); end.answers[stream] != want {
			t.Errorf("h2: %d fields: %+v, want %s", n, end, want)
		}
		stream += 2
	}
	// The same few bytes again and again: an indexed field of 4 kB.
	big := strings.Repeat("z", 4000)
	for range 20 {
		if err := h.request(stream, "GET", true, "big", big); err != nil {
			t.Fatal(err)
		}
		stream += 2
	}
	bomb := make([]string, 0, 200)
	for range 90 {
		bomb = append(bomb, "big", big)
	}
	if err := h.request(stream, "GET", true, bomb...); err != nil {
		t.Fatal(err)
	}
	if size := len(h.block.Bytes()); size > 200 {
		t.Fatalf("the bomb has %d bytes", size)
	}
	if end := h.read(func(end *h2End) bool { return end.answers[stream] != "" }); end.answers[stream] != "431" {
		t.Errorf("h2 bomb: %+v", end)
	}
	eventually(t, "they are counted", func() bool {
		return read(e.count("main"), func(c *counts) bool {
			return c.errors["too_many_fields"] == 4 && c.codes[431] >= 4
		})
	})
}

// TestMemoryOfRequests: at the bound the newest are refused with a reason, those
// under way end well, and then there is room again.
func TestMemoryOfRequests(t *testing.T) {
	finish := make(chan struct{})
	var arrived atomic.Int64
	e := newEdgeOf(t, Config{MemoryLimit: 8 << 20, Upstream: upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		arrived.Add(1)
		<-finish
		return textResponse(200, "ok"), nil
	}}.onLoops()})
	h := e.h2Dial()
	const streams = 200
	for i := range uint32(streams) {
		if err := h.request(2*i+1, "GET", true); err != nil {
			t.Fatal(err)
		}
	}
	// Those that are refused are answered at once.
	eventually(t, "all are admitted or refused", func() bool {
		return read(e.count("main"), func(c *counts) int { return c.errors["memory_limit"] })+int(arrived.Load()) == streams
	})
	refused := h.read(func(end *h2End) bool { return int64(len(end.answers))+arrived.Load() == streams })
	admitted := arrived.Load()
	if admitted < 50 || admitted > 150 {
		t.Errorf("%d requests were admitted to 8 MiB", admitted)
	}
	for stream, status := range refused.answers {
		if status != "503" {
			t.Errorf("stream %d: %s", stream, status)
		}
	}
	if record := e.logged(1); record["reason"] != "memory_limit" || record["status"] != 503.0 {
		t.Errorf("logged %v", record)
	}
	close(finish)
	for stream, status := range h.read(func(end *h2End) bool { return int64(len(end.answers)) == admitted }).answers {
		if status != "200" {
			t.Errorf("stream %d, which was under way: %s", stream, status)
		}
	}
	eventually(t, "they are counted and let go of", func() bool {
		return read(e.count("main"), func(c *counts) bool {
			return c.codes[200] == int(admitted) && c.errors["memory_limit"] == streams-int(admitted)
		})
	})
	_ = h.request(2*streams+1, "GET", true)
	if end := h.read(func(end *h2End) bool { return len(end.answers) > 0 }); end.answers[2*streams+1] != "200" {
		t.Errorf("afterwards: %+v", end)
	}
}

// TestMemoryOfBodies: what HTTP/2 clients don't take, and what backends don't, is
// bounded over all streams. Those beyond it are ended with a reason, and the
// connection goes on.
func TestMemoryOfBodies(t *testing.T) {
	finish := make(chan struct{})
	e := newEdgeOf(t, Config{MemoryLimit: 20 << 20, Upstream: upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		if r.Method == "POST" {
			select {
			case <-finish:
			case <-r.Context().Done():
				return nil, r.Context().Err()
			}
		}
		return obliging(r, x)
	}}.onLoops()})
	c := e.count("main")
	refused := func() int { return read(c, func(c *counts) int { return c.errors["memory_limit"] }) }
	h := e.h2DialWith([]http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}})
	h.path = "/big"
	const streams = 100
	for i := range uint32(streams) {
		_ = h.request(2*i+1, "GET", true)
	}
	end := h.read(func(end *h2End) bool { return len(end.answers) == streams && len(end.resets) > 0 })
	eventually(t, "some are cut", func() bool { return refused() > 0 })
	if held := e.frontend.memory.held.Load(); end.goAway || held > 20<<20 {
		t.Errorf("%d bytes are held: %+v", held, end)
	}
	for i := range uint32(streams) {
		_ = h.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
	}
	if err := h.ping(); err != nil {
		t.Fatal(err)
	}
	// The other direction, on several connections, since one has not the window.
	before := refused()
	var clients []*h2Raw
	for range 6 {
		clients = append(clients, e.h2Dial())
	}
	for _, h := range clients {
		for i := range uint32(connectionStreams) {
			_ = h.request(2*i+1, "POST", false)
			for range exchange.UploadWindow >> 14 {
				_ = h.WriteData(2*i+1, false, make([]byte, 1<<14))
			}
		}
		if err := h.ping(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "some are refused", func() bool { return refused() > before })
	if held := e.frontend.memory.held.Load(); held > 20<<20 {
		t.Errorf("%d bytes are held", held)
	}
	close(finish)
	for _, h := range clients {
		h.conn.Close()
	}
}

// TestMemoryOfConnections: connections are refused before requests of those that
// are there.
func TestMemoryOfConnections(t *testing.T) {
	var used atomic.Int64
	const limit = 100 << 20
	e := newEdgeOf(t, Config{Upstream: answering("ok").onLoops(), MemoryLimit: limit, MemoryUsed: used.Load})
	old := e.dial()
	answers := bufio.NewReader(old)
	ask := func() int {
		fmt.Fprint(old, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
		response := must[*http.Response](t)(http.ReadResponse(answers, nil))
		bodyOf(t, response)
		return response.StatusCode
	}
	for _, step := range []struct {
		used              int64 // percent
		old, new          int   // status
		closed, newCloses bool
	}{
		{70, 200, 200, false, false}, {80, 200, 503, false, true}, {88, 200, 0, true, true}, {95, 503, 0, true, true}, {10, 200, 200, false, false},
	} {
		used.Store(limit / 100 * step.used)
		if got := ask(); got != step.old {
			t.Errorf("%d%%: %d on an old connection, want %d", step.used, got, step.old)
		}
		for _, http2 := range []bool{false, true} {
			response, err := e.client(http2).Get("https://app.test/")
			if step.closed {
				if err == nil {
					t.Errorf("%d%%: %s on a new connection", step.used, response.Status)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, response.Body)
			response.Body.Close()
			if response.StatusCode != step.new || !http2 && response.Close != step.newCloses {
				t.Errorf("%d%%, h2 %v: %s on a new connection, close %v", step.used, http2, response.Status, response.Close)
			}
			if want := map[bool]string{true: "memory_limit"}[step.new == 503]; response.Header.Get(ReasonHeader) != want {
				t.Errorf("%d%%: reason %q", step.used, response.Header.Get(ReasonHeader))
			}
		}
	}
}
