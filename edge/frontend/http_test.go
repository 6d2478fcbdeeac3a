package frontend

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// proxyTo is an upstream that goes to a real server.
func proxyTo(t *testing.T, handler http.HandlerFunc, http2 bool) upstreamFuncs {
	server := httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = http2
	server.StartTLS()
	transport := server.Client().Transport.(*http.Transport)
	transport.DisableCompression = true
	transport.ExpectContinueTimeout = patience
	if !http2 {
		transport.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", server.Listener.Addr().String())
	}
	transport.TLSClientConfig.ServerName = "example.com"
	t.Cleanup(server.Close)
	t.Cleanup(transport.CloseIdleConnections)
	return upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		x.Endpoint, x.Attempts = server.Listener.Addr().String(), 1
		return transport.RoundTrip(r)
	}}
}

// legs runs a test over HTTP/1.1 and HTTP/2 on both legs.
func legs(t *testing.T, handler http.HandlerFunc, test func(t *testing.T, e *edge, client *http.Client)) {
	for _, front := range []bool{false, true} {
		for _, back := range []bool{false, true} {
			t.Run(fmt.Sprintf("h2=%v,%v", front, back), func(t *testing.T) {
				e := newEdge(t, proxyTo(t, handler, back))
				test(t, e, e.client(front))
			})
		}
	}
}

func TestBodies(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 3<<20/16)
	legs(t, func(w http.ResponseWriter, r *http.Request) {
		got, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Got", fmt.Sprint(len(got), " ", r.ContentLength, " ", r.URL.RequestURI(), " ", r.Host))
		switch r.URL.Path {
		case "/empty":
		case "/small":
			_, _ = w.Write(big[:1024])
		case "/big":
			w.Header().Set("Content-Length", fmt.Sprint(len(big)))
			_, _ = w.Write(big)
		case "/chunked":
			for chunk := range slices.Chunk(big, 100_000) {
				_, _ = w.Write(chunk)
				w.(http.Flusher).Flush()
			}
		case "/204":
			w.WriteHeader(204)
		case "/304":
			w.Header().Set("Etag", `"x"`)
			w.WriteHeader(304)
		}
	}, func(t *testing.T, e *edge, client *http.Client) {
		for _, test := range []struct {
			method, path string
			send         []byte
			chunked      bool
			status, size int
		}{
			{"GET", "/empty?q=a;b&c=%2F", nil, false, 200, 0},
			{"GET", "/small", nil, false, 200, 1024},
			{"HEAD", "/small", nil, false, 200, 0},
			{"GET", "/big", nil, false, 200, len(big)},
			{"HEAD", "/big", nil, false, 200, 0},
			{"GET", "/chunked", nil, false, 200, len(big)},
			{"GET", "/204", nil, false, 204, 0},
			{"GET", "/304", nil, false, 304, 0},
			{"POST", "/small", big[:1], false, 200, 1024},
			{"POST", "/big", big, false, 200, len(big)},
			{"POST", "/chunked", big, true, 200, len(big)},
			{"PUT", "/a%2Fb/../c//d", big[:7], true, 200, 0},
		} {
			var body io.Reader
			length := fmt.Sprint(len(test.send))
			if test.send != nil {
				body = bytes.NewReader(test.send)
				if test.chunked {
					body, length = io.MultiReader(body), "-1"
				}
			}
			request := must[*http.Request](t)(http.NewRequest(test.method, "https://app.test"+test.path, body))
			response, err := client.Do(request)
			if err != nil {
				t.Fatalf("%s %s: %v", test.method, test.path, err)
			}
			got := bodyOf(t, response)
			if response.StatusCode != test.status || len(got) != test.size || got != string(big[:test.size]) {
				t.Errorf("%s %s: status %d, %d bytes", test.method, test.path, response.StatusCode, len(got))
			}
			if want := fmt.Sprint(len(test.send), " ", length, " ", test.path, " app.test"); response.Header.Get("X-Got") != want {
				t.Errorf("%s %s: the backend got %q, want %q", test.method, test.path, response.Header.Get("X-Got"), want)
			}
			if test.size == 0 && test.method == "HEAD" && response.ContentLength <= 0 {
				t.Errorf("HEAD %s: lost its Content-Length", test.path)
			}
		}
		c := e.count("main")
		if opened := read(c, func(c *counts) int { return c.opened }); opened != 1 {
			t.Errorf("%d connections, want 1", opened)
		}
		if reused := read(c, func(c *counts) int { return c.reused }); reused < 10 {
			t.Errorf("%d requests on a used connection", reused)
		}
	})
}

func TestTrailers(t *testing.T) {
	legs(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		_, _ = io.Copy(w, r.Body)
		w.Header().Set("X-Sum", "7 "+r.Trailer.Get("X-Sent")+" "+r.Header.Get("Te"))
		w.Header().Set(http.TrailerPrefix+"X-Late", "late")
	}, func(t *testing.T, e *edge, client *http.Client) {
		request := must[*http.Request](t)(http.NewRequest("POST", "https://app.test/", io.MultiReader(strings.NewReader("body"))))
		request.Trailer = http.Header{"X-Sent": {"sent"}}
		request.Header.Set("Te", "trailers")
		response := must[*http.Response](t)(client.Do(request))
		if _, announced := response.Trailer["X-Sum"]; !announced {
			t.Error("X-Sum was not announced")
		}
		if got := bodyOf(t, response); got != "body" {
			t.Errorf("body %q", got)
		}
		if response.Trailer.Get("X-Sum") != "7 sent trailers" || response.Trailer.Get("X-Late") != "late" {
			t.Errorf("trailers %v", response.Trailer)
		}
	})
}

// TestBidirectional is what a gRPC stream does: both bodies are open at once.
func TestBidirectional(t *testing.T) {
	legs(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		lines := bufio.NewScanner(r.Body)
		for lines.Scan() {
			fmt.Fprintln(w, "echo", lines.Text())
			w.(http.Flusher).Flush()
		}
	}, func(t *testing.T, e *edge, client *http.Client) {
		reader, writer := io.Pipe()
		response := must[*http.Response](t)(client.Post("https://app.test/", "application/grpc", reader))
		defer response.Body.Close()
		lines := bufio.NewScanner(response.Body)
		for i := range 5 {
			fmt.Fprintln(writer, i)
			if !lines.Scan() || lines.Text() != fmt.Sprint("echo ", i) {
				t.Fatalf("round %d: %q %v", i, lines.Text(), lines.Err())
			}
		}
		writer.Close()
		if lines.Scan() {
			t.Error("more came")
		}
		if record := e.logged(1); record["status"] != 200.0 || record["bytes_in"] != 10.0 || record["bytes_out"] != 35.0 {
			t.Errorf("logged %v", record)
		}
	})
}

func TestEventStreamFlows(t *testing.T) {
	next := make(chan string)
	legs(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for event := range next {
			if event == "" {
				return
			}
			fmt.Fprintf(w, "data: %s\n", event)
			w.(http.Flusher).Flush()
		}
	}, func(t *testing.T, e *edge, client *http.Client) {
		go func() { next <- "0" }()
		response := must[*http.Response](t)(client.Get("https://app.test/"))
		defer response.Body.Close()
		lines := bufio.NewScanner(response.Body)
		for i := range 3 {
			if !lines.Scan() || lines.Text() != fmt.Sprintf("data: %d", i) {
				t.Fatalf("event %d: %q %v", i, lines.Text(), lines.Err())
			}
			if i < 2 {
				next <- fmt.Sprint(i + 1) // only after the one before has arrived
			}
		}
		next <- ""
		if lines.Scan() {
			t.Error("more came")
		}
	})
}

func TestInterimResponses(t *testing.T) {
	legs(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(103)
		w.Header().Del("Link")
		w.Header().Set("X-Final", "1")
		w.WriteHeader(200)
	}, func(t *testing.T, e *edge, client *http.Client) {
		var hints []string
		ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
				hints = append(hints, fmt.Sprint(code, " ", header.Get("Link")))
				return nil
			},
		})
		request := must[*http.Request](t)(http.NewRequestWithContext(ctx, "GET", "https://app.test/", nil))
		response := must[*http.Response](t)(client.Do(request))
		bodyOf(t, response)
		if !slices.Equal(hints, []string{"103 </style.css>; rel=preload"}) || response.Header.Get("Link") != "" || response.Header.Get("X-Final") != "1" {
			t.Errorf("hints %q, then %v", hints, response.Header)
		}
	})
}

func TestContinue(t *testing.T) {
	backend := proxyTo(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refuse" {
			w.WriteHeader(403)
			return
		}
		got, _ := io.ReadAll(r.Body)
		_, _ = w.Write(got)
	}, false)
	e := newEdge(t, backend)
	conn := e.dial()
	reader := bufio.NewReader(conn)
	fmt.Fprint(conn, "POST /take HTTP/1.1\r\nHost: app.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
	if line, _ := reader.ReadString('\n'); line != "HTTP/1.1 100 Continue\r\n" {
		t.Fatalf("got %q", line)
	}
	_, _ = reader.ReadString('\n')
	fmt.Fprint(conn, "body")
	response := must[*http.Response](t)(http.ReadResponse(reader, nil))
	if got := bodyOf(t, response); got != "body" {
		t.Errorf("body %q", got)
	}
	// The backend refuses: no 100, and what the client must send then is not
	// taken for a request.
	fmt.Fprint(conn, "POST /refuse HTTP/1.1\r\nHost: app.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
	response = must[*http.Response](t)(http.ReadResponse(reader, nil))
	if response.StatusCode != 403 || !response.Close {
		t.Errorf("status %d, close %v", response.StatusCode, response.Close)
	}
}

// TestEarlyResponse answers before the client has sent its body. What follows
// must not be taken for a request.
func TestEarlyResponse(t *testing.T) {
	var seen atomic.Int32
	reading := make(chan struct{}, 1)
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		seen.Add(1)
		if r.URL.Path == "/reads" { // and is still at it when the response is there
			go func() { _, _ = io.Copy(io.Discard, r.Body); reading <- struct{}{} }()
		}
		return textResponse(403, "no"), nil
	}})
	for _, path := range []string{"/ignores", "/reads"} {
		seen.Store(0)
		conn := e.dial()
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: app.test\r\nContent-Length: 100000\r\n\r\nstart", path)
		reader := bufio.NewReader(conn)
		response := must[*http.Response](t)(http.ReadResponse(reader, nil))
		if got := bodyOf(t, response); response.StatusCode != 403 || got != "no" {
			t.Errorf("%s: status %d, %q", path, response.StatusCode, got)
		}
		fmt.Fprint(conn, "GET /smuggled HTTP/1.1\r\nHost: app.test\r\n\r\n")
		if _, err := http.ReadResponse(reader, nil); err == nil {
			t.Errorf("%s: the rest of the body got an answer", path)
		}
		if seen.Load() != 1 {
			t.Errorf("%s: the upstream saw %d requests", path, seen.Load())
		}
	}
	<-reading
	// A body that is there but was not read costs nothing.
	conn := e.dial()
	reader := bufio.NewReader(conn)
	for range 3 {
		fmt.Fprint(conn, "POST /ignores HTTP/1.1\r\nHost: app.test\r\nContent-Length: 5\r\n\r\nwhole")
		response := must[*http.Response](t)(http.ReadResponse(reader, nil))
		if bodyOf(t, response); response.StatusCode != 403 {
			t.Errorf("status %d", response.StatusCode)
		}
	}
	// HTTP/2: other streams go on.
	client := e.client(true)
	body, writer := io.Pipe()
	response := must[*http.Response](t)(client.Post("https://app.test/reads", "", body))
	bodyOf(t, response)
	writer.Close()
	<-reading
	response = must[*http.Response](t)(client.Get("https://app.test/"))
	bodyOf(t, response)
}

func TestHopByHop(t *testing.T) {
	var got http.Header
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		got = r.Header
		response := textResponse(200, "")
		response.Header = http.Header{
			"Connection": {"X-Hop, keep-alive"}, "X-Hop": {"1"}, "Keep-Alive": {"timeout=1"}, "Upgrade": {"h2"},
			"Proxy-Authenticate": {"Basic"}, "X-Kept": {"1"},
		}
		return response, nil
	}})
	conn := e.dial()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: x-secret, TE, cookie, x-forwarded-for\r\nConnection: Keep-Alive\r\nX-Secret: 1\r\n"+
		"Te: trailers, deflate\r\nKeep-Alive: 1\r\nProxy-Authorization: x\r\nProxy-Connection: x\r\nCookie: a=b\r\nX-Kept: 1\r\n"+
		"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n")
	response := must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil))
	bodyOf(t, response)
	for _, name := range []string{"X-Hop", "Keep-Alive", "Upgrade", "Proxy-Authenticate", "Connection"} {
		if response.Header.Get(name) != "" {
			t.Errorf("the response has %s", name)
		}
	}
	for _, name := range []string{"X-Secret", "Connection", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection", "Upgrade", "Http2-Settings"} {
		if _, ok := got[name]; ok {
			t.Errorf("the request has %s", name)
		}
	}
	if got.Get("Te") != "trailers" || got.Get("Cookie") != "a=b" || got.Get("X-Kept") != "1" || got.Get("X-Forwarded-For") == "" || response.Header.Get("X-Kept") != "1" {
		t.Errorf("request %v, response %v", got, response.Header)
	}
	if _, ok := response.Header["Content-Type"]; ok {
		t.Error("a Content-Type was made up")
	}
}

func TestForwarded(t *testing.T) {
	var got http.Header
	for _, test := range []struct {
		name    string
		trusted []string
		want    map[string]string
	}{
		{"untrusted", nil, map[string]string{
			"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "app.test:99",
			"Forwarded": `for=127.0.0.1;host="app.test:99";proto=https`, "X-Forwarded-Prefix": "", "X_forwarded_for": "",
		}},
		{"other trusted", []string{"10.0.0.0/8"}, map[string]string{"X-Forwarded-For": "127.0.0.1"}},
		{"trusted", []string{"10.0.0.0/8", "127.0.0.0/8"}, map[string]string{
			"X-Forwarded-For": "1.1.1.1, 2.2.2.2, 127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "spoof.test", "X-Forwarded-Port": "1",
			"Forwarded": `for=1.1.1.1, for=127.0.0.1;host="app.test:99";proto=https`, "X-Forwarded-Prefix": "/p",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
				got = r.Header
				return textResponse(200, ""), nil
			}}, func(l *exchange.Listener) { l.Spec.Forwarded = &resealv1.Forwarded{TrustedCidrs: test.trusted} })
			conn := e.dial()
			fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test:99\r\nX-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: 2.2.2.2\r\nX-Forwarded-Proto: http\r\n"+
				"X-Forwarded-Host: spoof.test\r\nX-Forwarded-Port: 1\r\nForwarded: for=1.1.1.1\r\nX-Forwarded-Prefix: /p\r\nX_Forwarded_For: 3.3.3.3\r\n\r\n")
			bodyOf(t, must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil)))
			for name, want := range test.want {
				if strings.Join(got[name], "|") != want {
					t.Errorf("%s: %q, want %q", name, got[name], want)
				}
			}
			if _, port, _ := net.SplitHostPort(e.address("main")); test.trusted == nil && got.Get("X-Forwarded-Port") != port {
				t.Errorf("X-Forwarded-Port %q, want %q", got.Get("X-Forwarded-Port"), port)
			}
		})
	}
}

func TestEdits(t *testing.T) {
	var got *http.Request
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		got = r
		response := textResponse(200, "")
		response.Header = http.Header{"Server": {"x"}, "X-A": {"1"}}
		return response, nil
	}}, func(l *exchange.Listener) {
		l.Route = func(string, string) (exchange.Match, bool) {
			return exchange.Match{
				Pool: "web",
				RequestHeaders: &resealv1.HeaderEdits{
					Remove: []string{"x-gone"}, Set: map[string]string{"x-set": "new", "Host": "inner.test"}, Add: map[string]string{"x-add": "2"},
				},
				ResponseHeaders: &resealv1.HeaderEdits{Remove: []string{"server"}, Add: map[string]string{"X-A": "2"}, Set: map[string]string{"X-B": "b"}},
			}, true
		}
	})
	request := must[*http.Request](t)(http.NewRequest("GET", "https://app.test/", nil))
	request.Header = http.Header{"X-Gone": {"1"}, "X-Set": {"1", "2"}, "X-Add": {"1"}}
	response := must[*http.Response](t)(e.client(true).Do(request))
	bodyOf(t, response)
	if got.Header.Get("X-Gone") != "" || !slices.Equal(got.Header["X-Set"], []string{"new"}) || !slices.Equal(got.Header["X-Add"], []string{"1", "2"}) || got.Host != "inner.test" {
		t.Errorf("request %v for %s", got.Header, got.Host)
	}
	if response.Header.Get("Server") != "" || !slices.Equal(response.Header["X-A"], []string{"1", "2"}) || response.Header.Get("X-B") != "b" {
		t.Errorf("response %v", response.Header)
	}
}

func TestRefusals(t *testing.T) {
	var called atomic.Int32
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		called.Add(1)
		return textResponse(200, ""), nil
	}}, func(l *exchange.Listener) {
		l.Route = func(_, path string) (exchange.Match, bool) { return exchange.Match{Pool: "web"}, path != "/none" }
	})
	for _, test := range []struct {
		request string
		status  int
		reason  string
	}{
		{"GET /none HTTP/1.1\r\nHost: app.test\r\n\r\n", 404, "no_route"},
		{"GET /x/..//none HTTP/1.1\r\nHost: app.test\r\n\r\n", 400, "bad_target"},
		{"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n", 421, "misdirected"},
		{"GET / HTTP/1.1\r\nHost: a.wild.test\r\n\r\n", 200, ""},
		{"GET / HTTP/1.1\r\nHost: APP.test.:443\r\n\r\n", 200, ""},
		{"GET http://other.test/ HTTP/1.1\r\nHost: app.test\r\n\r\n", 421, "misdirected"},
		{"GET http://app.test/none?x HTTP/1.1\r\nHost: other.test\r\n\r\n", 404, "no_route"},
		{"CONNECT app.test:443 HTTP/1.1\r\nHost: app.test\r\n\r\n", 405, "method_not_allowed"},
		{"OPTIONS * HTTP/1.1\r\nHost: app.test\r\n\r\n", 200, ""},
		{"GET / HTTP/1.1\r\nHost: a~b\r\n\r\n", 400, "bad_host"},
		{"GET / HTTP/1.1\r\nHost: app.test:http\r\n\r\n", 400, "bad_host"},
		{"GET mailto:x HTTP/1.1\r\nHost: app.test\r\n\r\n", 400, "bad_target"},
		{"GET / HTTP/1.1\r\n\r\n", 400, "bad_host"},
		{"GET / HTTP/1.1\r\nHost: app.test\r\nHost: app.test\r\n\r\n", 400, "bad_host"},
		{"GET / HTTP/1.1\r\nHost: app.test\r\nX-Big: " + strings.Repeat("x", 65<<10) + "\r\n\r\n", 431, "header_too_large"},
		{"GET / HTTP/1.1\r\nHost: app.test\r\nX-Big: " + strings.Repeat("x", 200<<10) + "\r\n\r\n", 431, "header_too_large"},
		// Smuggling attempts.
		{"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400, "bad_request"},
		{"POST / HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 501, "bad_request"},
		{"POST / HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501, "bad_request"},
		{"POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: +1\r\n\r\nx", 400, "bad_request"},
		{"GET / HTTP/1.1\r\nHost: app.test\r\nX-A : b\r\n\r\n", 400, "bad_request"},
		{"GET / HTTP/1.1\r\nHost: app.test\r\nX-A: b\x00\r\n\r\n", 400, "bad_request"},
	} {
		called.Store(0)
		conn := e.dial()
		// The server may answer and close before all is written.
		go func() { _, _ = io.WriteString(conn, test.request) }()
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%.60q: %v", test.request, err)
			continue
		}
		body, _ := io.ReadAll(response.Body)
		if response.StatusCode != test.status || response.Header.Get(ReasonHeader) != test.reason || test.reason != "" && !strings.Contains(string(body), test.reason) {
			t.Errorf("%.60q: %d %q %q, want %d %q", test.request, response.StatusCode, response.Header.Get(ReasonHeader), body, test.status, test.reason)
		}
		if got, want := called.Load() == 1, test.status == 200; got != want {
			t.Errorf("%.60q: reached the upstream: %v", test.request, got)
		}
		if test.reason != "" && read(e.count("main"), func(c *counts) int { return c.errors[test.reason] }) == 0 {
			t.Errorf("%.60q: %s was not counted", test.request, test.reason)
		}
		conn.Close()
	}
	response, err := e.client(true).Do(&http.Request{Method: "GET", URL: must[*http.Request](t)(http.NewRequest("GET", "https://app.test/", nil)).URL,
		Header: http.Header{"X-Big": {strings.Repeat("x", 65<<10)}}})
	if err != nil || response.StatusCode != 431 {
		t.Errorf("HTTP/2 with a header of 65 KiB: %v %v", response, err)
	} else {
		bodyOf(t, response)
	}
}

func TestUpstreamErrors(t *testing.T) {
	var fail atomic.Value
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		x.Endpoint = "10.0.0.1:443"
		return nil, *fail.Load().(*error)
	}})
	for i, test := range []struct {
		err    error
		status int
		reason string
	}{
		{statusError{503, "no_endpoint"}, 503, "no_endpoint"},
		{fmt.Errorf("wrapped: %w", statusError{504, "timeout_header"}), 504, "timeout_header"},
		{statusError{421, "misdirected"}, 421, "misdirected"},
		{errors.New("anything"), 502, "upstream_error"},
	} {
		fail.Store(&test.err)
		response := must[*http.Response](t)(e.client(i%2 == 0).Get("https://app.test/p?secret=1"))
		body := bodyOf(t, response)
		if response.StatusCode != test.status || response.Header.Get(ReasonHeader) != test.reason || !strings.Contains(body, test.reason) {
			t.Errorf("%v: %d %q", test.err, response.StatusCode, body)
		}
		record := e.logged(i + 1)
		for key, want := range map[string]any{
			"status": float64(test.status), "reason": test.reason, "error": test.err.Error(), "path": "/p", "host": "app.test", "listener": "main",
			"pool": "web", "route": "r", "method": "GET", "sni": "app.test", "tls_version": "tls1.3", "resumed": false, "backend_endpoint": "10.0.0.1:443",
		} {
			if record[key] != want {
				t.Errorf("logged %s=%v, want %v", key, record[key], want)
			}
		}
		for _, key := range []string{"peer", "protocol", "backend_reused", "backend_resumed", "backend_tls_version", "attempts", "bytes_in", "bytes_out", "duration_ms", "backend_connect_ms"} {
			if _, ok := record[key]; !ok {
				t.Errorf("%s is not logged", key)
			}
		}
	}
	if errs := read(e.count("main"), func(c *counts) int { return len(c.errors) }); errs != 0 {
		t.Error("errors of the upstream are counted on the frontend")
	}
}

// failingBody breaks after some bytes.
type failingBody struct{ left int }

func (b *failingBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, statusError{502, "reset"}
	}
	n := min(b.left, len(p))
	b.left -= n
	return n, nil
}
func (b *failingBody) Close() error { return nil }

func TestCutResponsesAreNoticed(t *testing.T) {
	for _, length := range []int64{-1, 100_000} {
		for _, http2 := range []bool{false, true} {
			t.Run(fmt.Sprint(length, http2), func(t *testing.T) {
				e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
					response := &http.Response{StatusCode: 200, Header: http.Header{}, Body: &failingBody{50_000}, ContentLength: length}
					if length >= 0 {
						response.Header.Set("Content-Length", fmt.Sprint(length))
					}
					return response, nil
				}})
				response := must[*http.Response](t)(e.client(http2).Get("https://app.test/"))
				defer response.Body.Close()
				if got, err := io.ReadAll(response.Body); err == nil {
					t.Errorf("%d bytes without an error", len(got))
				}
				if record := e.logged(1); record["reason"] != "reset" || record["status"] != 200.0 {
					t.Errorf("logged %v", record)
				}
			})
		}
	}
}

func TestShortBodyIsNoticed(t *testing.T) {
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		response := textResponse(200, "short")
		response.ContentLength = 10
		response.Header.Set("Content-Length", "10")
		return response, nil
	}})
	response := must[*http.Response](t)(e.client(true).Get("https://app.test/"))
	defer response.Body.Close()
	if got, err := io.ReadAll(response.Body); err == nil {
		t.Errorf("%q without an error", got)
	}
}

func TestClientAbort(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprint(http2), func(t *testing.T) {
			arrived, ended := make(chan struct{}), make(chan error, 1)
			e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
				close(arrived)
				<-r.Context().Done()
				ended <- r.Context().Err()
				return nil, statusError{502, "reset"}
			}})
			ctx, cancel := context.WithCancel(context.Background())
			go func() { <-arrived; cancel() }()
			request := must[*http.Request](t)(http.NewRequestWithContext(ctx, "GET", "https://app.test/", nil))
			if response, err := e.client(http2).Do(request); err == nil {
				response.Body.Close()
				t.Error("an answer")
			}
			select {
			case <-ended:
			case <-time.After(patience):
				t.Fatal("the upstream does not learn that the client is gone")
			}
			if record := e.logged(1); record["status"] != 499.0 || record["reason"] != "client_abort" {
				t.Errorf("logged %v", record)
			}
		})
	}
}

func TestClientAbortsItsBody(t *testing.T) {
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			t.Error("a part is taken for the whole")
		}
		return nil, statusError{502, "reset"}
	}})
	conn := e.dial()
	fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 100\r\n\r\nstart")
	conn.Close()
	if record := e.logged(1); record["status"] != 499.0 || record["reason"] != "client_abort" || record["bytes_in"] != 5.0 {
		t.Errorf("logged %v", record)
	}
}

func TestRequestTimeout(t *testing.T) {
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		if x.ResponseHeaderTimeout != time.Hour {
			t.Error("the route's timeout did not arrive")
		}
		<-r.Context().Done()
		return nil, r.Context().Err()
	}}, func(l *exchange.Listener) {
		l.Route = func(string, string) (exchange.Match, bool) {
			return exchange.Match{Pool: "web", RequestTimeout: 20 * time.Millisecond, ResponseHeaderTimeout: time.Hour}, true
		}
	})
	response := must[*http.Response](t)(e.client(true).Get("https://app.test/"))
	if bodyOf(t, response); response.StatusCode != 504 || response.Header.Get(ReasonHeader) != "timeout_request" {
		t.Errorf("%d %v", response.StatusCode, response.Header)
	}
}

// endless is a body without end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
func (endless) Close() error               { return nil }

func TestStalledClient(t *testing.T) {
	for _, protocol := range []string{"http/1.1", "h2"} {
		t.Run(protocol, func(t *testing.T) {
			e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
				return &http.Response{StatusCode: 200, Header: http.Header{}, Body: endless{}, ContentLength: -1}, nil
			}}, func(l *exchange.Listener) { l.Spec.Timeouts.Idle = durationpb.New(300 * time.Millisecond) })
			if protocol == "h2" {
				response := must[*http.Response](t)(e.client(true).Get("https://app.test/"))
				defer response.Body.Close() // not read: the window fills up
			} else {
				fmt.Fprint(e.dial(), "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
			}
			if record := e.logged(1); record["reason"] != "client_stalled" {
				t.Errorf("logged %v", record)
			}
		})
	}
}

func TestServerNames(t *testing.T) {
	var mu sync.Mutex
	var seen []exchange.Exchange
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, *x)
		return textResponse(200, ""), nil
	}})
	conn := e.dial(func(c *tls.Config) { c.ServerName, c.InsecureSkipVerify = "", true })
	reader := bufio.NewReader(conn)
	for _, host := range []string{"App.Test:443", "unknown.test"} {
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		bodyOf(t, must[*http.Response](t)(http.ReadResponse(reader, nil)))
	}
	if len(seen) != 2 || seen[0].ServerName != "app.test" || seen[1].ServerName != "" || !seen[0].First || seen[1].First ||
		seen[0].Client != seen[1].Client || seen[0].Pool != "web" || seen[0].Source.String() != conn.LocalAddr().String() {
		t.Errorf("exchanges %+v", seen)
	}
}

func TestPanic(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2=%v", http2), func(t *testing.T) {
			e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
				switch r.URL.Path {
				case "/bug":
					panic("a bug")
				case "/late":
					return &http.Response{StatusCode: 200, Header: http.Header{"X": {"y"}}, Body: buggyBody{}, ContentLength: -1}, nil
				}
				return textResponse(200, "ok"), nil
			}})
			client := e.client(http2)
			response := must[*http.Response](t)(client.Get("https://app.test/bug"))
			if got := bodyOf(t, response); response.StatusCode != 500 || response.Header.Get(ReasonHeader) != "internal" || !strings.HasPrefix(got, "500 ") {
				t.Errorf("answer %d %q %q", response.StatusCode, response.Header, got)
			}
			if record := e.logged(1); record["reason"] != "internal" || record["status"] != 500.0 || record["error"] != "panic: a bug" {
				t.Errorf("logged %v", record)
			}
			// After the answer has begun it can only be cut.
			response = must[*http.Response](t)(client.Get("https://app.test/late"))
			if body, err := io.ReadAll(response.Body); err == nil {
				t.Errorf("a whole answer: %q", body)
			}
			response.Body.Close()
			if got := bodyOf(t, must[*http.Response](t)(client.Get("https://app.test/"))); got != "ok" {
				t.Errorf("got %q", got)
			}
			if n := read(e.count("main"), func(c *counts) int { return c.errors["internal"] }); n != 2 {
				t.Errorf("%d panics are counted, want 2", n)
			}
		})
	}
}

// buggyBody panics when it is read.
type buggyBody struct{}

func (buggyBody) Read([]byte) (int, error)    { panic("a bug in a body") }
func (buggyBody) Write(p []byte) (int, error) { return len(p), nil }
func (buggyBody) Close() error                { return nil }
func (buggyBody) CloseWrite() error           { return nil }

// TestPanicInTunnel: the process lives, and the client sees a cut connection.
func TestPanicInTunnel(t *testing.T) {
	for name, tunnel := range map[string]func() (exchange.Tunnel, error){
		"dialling": func() (exchange.Tunnel, error) { panic("a bug") },
		"copying":  func() (exchange.Tunnel, error) { return buggyBody{}, nil },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEdge(t, upstreamFuncs{tunnel: func(context.Context, *exchange.Exchange) (exchange.Tunnel, error) { return tunnel() }},
				func(l *exchange.Listener) { l.Spec.Protocol, l.TLS.NextProtos = resealv1.Listener_PROTOCOL_TLS, nil })
			if _, err := io.ReadAll(e.dial(func(c *tls.Config) { c.NextProtos = nil })); err == nil {
				t.Error("the client sees an end in order")
			}
			if record := e.logged(1); record["reason"] != "internal" {
				t.Errorf("logged %v", record)
			}
			c := e.count("main")
			eventually(t, "it is counted and ended", func() bool {
				return read(c, func(c *counts) bool { return c.errors["internal"] == 1 && c.gone == 1 })
			})
		})
	}
	t.Run("upgrade", func(t *testing.T) {
		e := newEdge(t, upstreamFuncs{roundTrip: func(*http.Request, *exchange.Exchange) (*http.Response, error) {
			return upgraded("websocket", buggyBody{}), nil
		}})
		conn := e.dial()
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = io.ReadAll(conn)
		if record := e.logged(1); record["reason"] != "internal" {
			t.Errorf("logged %v", record)
		}
	})
}

// TestFailures: who is told of what went wrong, with what was known, and without what
// clients alone did wrong.
func TestFailures(t *testing.T) {
	var mu sync.Mutex
	var told []*resealv1.Failure
	cfg := Config{Failed: func(f *resealv1.Failure) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, f)
	}}
	cfg.Upstream = upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		x.Endpoint, x.Attempts, x.Miss = "10.0.0.1:1", 2, resealv1.MissReason_MISS_REASON_DECLINED
		switch r.URL.Path {
		case "/fine":
			return textResponse(200, "fine"), nil
		case "/theirs":
			return textResponse(503, "busy"), nil
		}
		x.Status, x.Reason, x.Blame = 502, "reset", resealv1.Failure_BLAME_BACKEND
		return nil, statusError{502, "reset"}
	}}.onLoops()
	e := newEdgeOf(t, cfg)
	client := e.client(false)
	for _, path := range []string{"/fine", "/theirs?secret", "/cut?secret"} {
		request, _ := http.NewRequest(http.MethodGet, "https://app.test"+path, nil)
		request.Header.Set("X-Request-Id", strings.Repeat("é", maxTold))
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		// A client that left in the midst of an answer would be to blame itself.
		_, _ = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
	}
	eventually(t, "both are told", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(told) == 2
	})
	client.CloseIdleConnections()
	mu.Lock()
	defer mu.Unlock()
	if len(told) != 2 {
		t.Fatalf("told %v", told)
	}
	for i, want := range []*resealv1.Failure{
		{Path: "/theirs", Status: 503, Blame: resealv1.Failure_BLAME_BACKEND},
		{Path: "/cut", Status: 502, Blame: resealv1.Failure_BLAME_BACKEND, Reason: "reset", Error: "upstream: reset"},
	} {
		f := told[i]
		if f.GetPath() != want.GetPath() || f.GetStatus() != want.GetStatus() || f.GetBlame() != want.GetBlame() || f.GetReason() != want.GetReason() || f.GetError() != want.GetError() ||
			f.GetListener() != "main" || f.GetPool() != "web" || f.GetEndpoint() != "10.0.0.1:1" || f.GetAttempts() != 2 || f.GetHost() != "app.test" ||
			f.GetMethod() != "GET" || f.GetMiss() != resealv1.MissReason_MISS_REASON_DECLINED || f.GetDuration().AsDuration() <= 0 || f.GetTime().AsTime().IsZero() {
			t.Errorf("told %v, want %v", f, want)
		}
		if id := f.GetRequestId(); len(id) > maxTold || !strings.HasSuffix(id, "é…") {
			t.Errorf("request id %q", id)
		}
	}
}
