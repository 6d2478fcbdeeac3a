package edge

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/net/http2"
)

// TestOneHost: the host that was checked and routed by is the host that the
// backend sees, however the client says it.
func TestOneHost(t *testing.T) {
	b := serveHTTP1(t, func(r *http.Request, _ []byte) string { return ok(r.Host + " " + r.Header.Get("X-Forwarded-Host")) })
	x := newLegs(t, b.address)

	t.Run("h1", func(t *testing.T) {
		for _, test := range []struct {
			head   string
			status int
			body   string
		}{
			{"GET / HTTP/1.1\r\nHost: public.test\r\n", 200, "public.test public.test"},
			{"GET / HTTP/1.1\r\nHost: internal.corp\r\n", 421, ""},
			// RFC 9112 section 3.2.2: the target's authority replaces the field.
			{"GET http://public.test/ HTTP/1.1\r\nHost: internal.corp\r\n", 200, "public.test public.test"},
			{"GET http://internal.corp/ HTTP/1.1\r\nHost: public.test\r\n", 421, ""},
			{"GET / HTTP/1.1\r\nHost: public.test\r\nHost: internal.corp\r\n", 400, ""},
			{"GET / HTTP/1.1\r\nHost: public.test\r\nHost: public.test\r\n", 400, ""},
			{"GET / HTTP/1.1\r\nHost: public.test, internal.corp\r\n", 400, ""},
			{"GET / HTTP/1.1\r\nHost: internal.corp@public.test\r\n", 400, ""},
			{"GET http://internal.corp@public.test/ HTTP/1.1\r\nHost: public.test\r\n", 400, ""},
		} {
			response, body := x.send(test.head + "Connection: close\r\n\r\n")
			if response.StatusCode != test.status || test.status == 200 && body != test.body {
				t.Errorf("%q: %d %q", test.head, response.StatusCode, body)
			}
		}
	})

	t.Run("h2", func(t *testing.T) {
		c := x.dialH2()
		for i, test := range []struct {
			authority string
			more      []string
			status    string
			body      string
		}{
			{"public.test", nil, "200", "public.test public.test"},
			{"internal.corp", nil, "421", ""},
			{"public.test", []string{"host", "internal.corp"}, "400", ""},
			{"public.test", []string{"host", "public.test", "host", "internal.corp"}, "400", ""},
			{"public.test", []string{"host", ""}, "400", ""},
			{"public.test", []string{"host", "public.test:444"}, "400", ""},
			{"public.test", []string{"host", "public.test"}, "200", "public.test public.test"},
		} {
			stream := uint32(2*i + 1)
			c.get(stream, "/", test.authority, test.more...)
			a := c.answer(stream)
			if a.reset {
				a.status = "400" // as good
			}
			if a.status != test.status || test.status == "200" && a.body != test.body {
				t.Errorf("%s %q: %+v", test.authority, test.more, a)
			}
		}
		// Without :authority the field is all there is (RFC 9113 section 8.3.1).
		for i, more := range [][]string{{"host", "public.test"}, {"host", "internal.corp"}, {"host", "public.test", "host", "internal.corp"}} {
			stream := uint32(101 + 2*i)
			c.headers(stream, true, append([]string{":method", "GET", ":scheme", "https", ":path", "/"}, more...)...)
			want := []string{"200", "421", "400"}[i]
			if a := c.answer(stream); a.status != want && !(a.reset && want == "400") {
				t.Errorf("%q: %+v, want %s", more, a, want)
			}
		}
	})

	for _, got := range b.received() {
		if strings.Contains(strings.ToLower(got), "internal.corp") {
			t.Errorf("the backend got %q", got)
		}
	}
}

// TestForbiddenTrailers: what frames, routes or authenticates a message, or
// tells about the client, doesn't pass as a trailer (RFC 9110 section 6.5.1).
func TestForbiddenTrailers(t *testing.T) {
	forbidden := []string{
		"Host", "Authorization", "Cookie", "Set-Cookie", "X-Forwarded-For", "Forwarded", "X_Forwarded_For", "X-Real-IP",
		"Client-Cert", "Content-Type", "Te", "Connection", "Location",
	}
	var sent strings.Builder
	for _, name := range append(forbidden, "X-Sum") {
		fmt.Fprintf(&sent, "%s: sneaked\r\n", name)
	}
	names := strings.Join(append(forbidden, "X-Sum"), ", ")
	check := func(t *testing.T, where string, got []string) {
		t.Helper()
		all := strings.Join(got, "")
		if n := strings.Count(all, "sneaked"); n != 1 || !strings.Contains(strings.ToLower(all), "x-sum: sneaked") {
			t.Errorf("%s got %d trailers: %q", where, n, all)
		}
	}

	t.Run("requests to h1", func(t *testing.T) {
		b := serveHTTP1(t, func(r *http.Request, _ []byte) string { return ok("") })
		x := newLegs(t, b.address)
		x.send("POST / HTTP/1.1\r\nHost: public.test\r\nTransfer-Encoding: chunked\r\nTrailer: " + names + "\r\n\r\n1\r\nx\r\n0\r\n" + sent.String() + "\r\n")
		check(t, "the backend", b.received())
	})
	t.Run("requests to h2", func(t *testing.T) {
		got := make(chan string, 10)
		b := serveRaw(t, "h2", func(c net.Conn, _ int) { serveH2Trailers(c, got) })
		x := newLegs(t, b.address)
		x.send("POST / HTTP/1.1\r\nHost: public.test\r\nTransfer-Encoding: chunked\r\nTrailer: " + names + "\r\n\r\n1\r\nx\r\n0\r\n" + sent.String() + "\r\n")
		check(t, "the backend", []string{<-got})
	})
	t.Run("framing fields", func(t *testing.T) {
		b := serveHTTP1(t, func(r *http.Request, _ []byte) string { return ok("") })
		x := newLegs(t, b.address)
		for _, announce := range []bool{false, true} {
			for _, name := range []string{"Content-Length", "Transfer-Encoding", "Trailer"} {
				head := "POST / HTTP/1.1\r\nHost: public.test\r\nTransfer-Encoding: chunked\r\n"
				if announce {
					head += "Trailer: " + name + "\r\n"
				}
				conn := x.dial("http/1.1")
				fmt.Fprintf(conn, "%s\r\n1\r\nx\r\n0\r\n%s: 7\r\n\r\n", head, name)
				if response, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
					response.Body.Close()
				}
				conn.Close()
			}
		}
		for _, got := range b.received() {
			if strings.Contains(got, ": 7") {
				t.Errorf("the backend got %q", got)
			}
		}
	})
	t.Run("responses", func(t *testing.T) {
		b := serveHTTP1(t, func(r *http.Request, _ []byte) string {
			return "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: " + names + "\r\n\r\n1\r\nx\r\n0\r\n" + sent.String() + "\r\n"
		})
		x := newLegs(t, b.address)
		response, _ := x.send("GET / HTTP/1.1\r\nHost: public.test\r\n\r\n")
		if len(response.Trailer) != 1 || response.Trailer.Get("X-Sum") != "sneaked" {
			t.Errorf("trailer %v", response.Trailer)
		}
		c := x.dialH2()
		c.get(1, "/", "public.test")
		a := c.answer(1)
		var got []string
		for name, value := range a.fields {
			got = append(got, name+": "+value+"\n")
		}
		check(t, "the client", got)
	})
}

// serveH2Trailers answers one request after its trailers, which it reports.
func serveH2Trailers(c net.Conn, got chan<- string) {
	serveH2(c, func(framer *http2.Framer, f *http2.MetaHeadersFrame) {
		if !f.StreamEnded() {
			return
		}
		var all strings.Builder
		for _, field := range f.Fields {
			fmt.Fprintf(&all, "%s: %s\n", field.Name, field.Value)
		}
		got <- all.String()
		_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: f.StreamID, BlockFragment: status200, EndHeaders: true, EndStream: true})
	})
}
