package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// site answers what the tests of bodies ask for.
func site() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/bytes/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.PathValue("n"))
		w.Header().Set("Content-Length", strconv.Itoa(n))
		w.Write(pattern(n))
	})
	mux.HandleFunc("/chunked/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.PathValue("n"))
		for rest := pattern(n); len(rest) > 0; {
			part := rest[:min(1000, len(rest))]
			w.Write(part)
			w.(http.Flusher).Flush()
			rest = rest[len(part):]
		}
	})
	mux.HandleFunc("/trailers", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		io.WriteString(w, "body")
		w.(http.Flusher).Flush()
		w.Header().Set("X-Sum", "42")
		w.Header().Set(http.TrailerPrefix+"X-Late", "yes")
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			w.WriteHeader(400)
			return
		}
		w.Header().Set("X-Digest", digest(body))
		w.Header().Set("X-Length", strconv.Itoa(len(body)))
		w.Header().Set("X-Framing", fmt.Sprint(r.ContentLength, r.TransferEncoding))
		w.Header().Set("X-Trailer", r.Trailer.Get("X-End"))
		w.Header().Set("X-Agent", fmt.Sprint(r.Header["User-Agent"]))
		w.Write(body)
	})
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.PathValue("code"))
		w.WriteHeader(code)
	})
	mux.HandleFunc("/early", func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex() // otherwise net/http reads the body first
		w.WriteHeader(413)
		io.WriteString(w, "too much")
	})
	mux.HandleFunc("/hints", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</a.css>")
		w.WriteHeader(103)
		w.WriteHeader(200)
	})
	mux.HandleFunc("/close", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		io.WriteString(w, "bye")
	})
	return mux
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// bothProtocols runs a test over HTTP/1.1 and HTTP/2.
func bothProtocols(t *testing.T, test func(t *testing.T, x *bench, s *server)) {
	t.Run("h1", func(t *testing.T) {
		s := serve(t, site())
		test(t, newBench(t, []string{s.addr}), s)
	})
	t.Run("h2", func(t *testing.T) {
		s := serveH2(t, site())
		test(t, newBench(t, []string{s.addr}), s)
	})
}

func TestResponseBodies(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		for _, n := range []int{0, 1, 1 << 10, 16 << 10, 16<<10 + 1, 10 << 20} {
			for _, kind := range []string{"bytes", "chunked"} {
				call := newCall()
				resp, body := x.do(newRequest(t, "GET", fmt.Sprintf("/%s/%d", kind, n), nil), call)
				if !bytes.Equal(body, pattern(n)) {
					t.Fatalf("%s of %d bytes came as %d bytes", kind, n, len(body))
				}
				if kind == "bytes" && resp.ContentLength != int64(n) {
					t.Fatalf("Content-Length %d of %d bytes", resp.ContentLength, n)
				}
				if call.Endpoint != s.addr || call.Attempts != 1 || call.TLSVersion == 0 {
					t.Fatalf("call %+v", call)
				}
			}
		}
		if n := s.opened.Load(); n != 1 {
			t.Errorf("%d connections, want 1", n)
		}
		if n := x.tally.get(func(c *tally) int { return c.reused }); n != 11 {
			t.Errorf("%d of 12 requests were counted as reusing", n)
		}
	})
}

func TestRequestBodies(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		for _, n := range []int{0, 1, 1 << 10, smallBody, smallBody + 1, 10 << 20} {
			for _, known := range []bool{true, false} {
				req := newRequest(t, "POST", "/echo", nil)
				if n > 0 || !known {
					req.Body = io.NopCloser(bytes.NewReader(pattern(n)))
					req.ContentLength = int64(n)
					if !known {
						req.ContentLength = -1
					}
				}
				resp, body := x.do(req, nil)
				if !bytes.Equal(body, pattern(n)) {
					t.Fatalf("%d bytes (known %v) came back as %d", n, known, len(body))
				}
				if got := resp.Header.Get("X-Agent"); got != "[]" {
					t.Fatalf("User-Agent %s was added", got)
				}
			}
		}
		if n := s.opened.Load(); n != 1 {
			t.Errorf("%d connections, want 1", n)
		}
	})
}

// sentNoter is a Front that is told of what the backend's leg has taken.
type sentNoter struct {
	exchange.Front // of which nothing else is called
	sent           chan int
}

func (s sentNoter) Sent(n int) { s.sent <- n }

// TestGatheredBody: of a small body that is waited for the client's leg learns that
// nobody but the client is waited for.
func TestGatheredBody(t *testing.T) {
	x := newBench(t, []string{serve(t, http.NotFoundHandler()).addr})
	l, front := x.Loops.Next(), sentNoter{sent: make(chan int, 1)}
	var flow exchange.Flow
	do := func(f func()) {
		done := make(chan struct{})
		l.Post(func() { f(); close(done) })
		<-done
	}
	do(func() {
		flow = x.b.Start(l, &exchange.Exchange{Pool: "p"}, &exchange.Request{
			Method: "POST", Scheme: "https", Authority: testName, Target: "/", Length: 10, Version: exchange.HTTP11,
		}, front)
		flow.Data([]byte("half"), false)
	})
	select {
	case n := <-front.sent:
		if n != 4 {
			t.Errorf("%d bytes are taken", n)
		}
	case <-time.After(10 * time.Second):
		t.Error("4 bytes that came are not said to be taken")
	}
	do(func() { flow.Abort(nil) })
}

func TestTrailers(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		resp, _ := x.do(newRequest(t, "GET", "/trailers", nil), nil)
		if resp.Trailer.Get("X-Sum") != "42" || resp.Trailer.Get("X-Late") != "yes" {
			t.Errorf("response trailers %v", resp.Trailer)
		}
		req := newRequest(t, "POST", "/echo", nil)
		req.Trailer = http.Header{"X-End": nil}
		req.Body = io.NopCloser(&atEOF{strings.NewReader("with a trailer"), func() { req.Trailer.Set("X-End", "fin") }})
		req.ContentLength = 14
		resp, body := x.do(req, nil)
		if string(body) != "with a trailer" || resp.Header.Get("X-Trailer") != "fin" {
			t.Errorf("%q, trailer %q", body, resp.Header.Get("X-Trailer"))
		}
	})
}

type atEOF struct {
	io.Reader
	f func()
}

func (r *atEOF) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err == io.EOF {
		r.f()
	}
	return n, err
}

func TestBodilessResponses(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, s *server) {
		for range 3 {
			resp, body := x.do(newRequest(t, "HEAD", "/bytes/5000", nil), nil)
			if resp.ContentLength != 5000 || len(body) != 0 {
				t.Fatalf("HEAD: length %d, %d bytes", resp.ContentLength, len(body))
			}
			for _, code := range []int{204, 304} {
				if resp, body := x.do(newRequest(t, "GET", fmt.Sprintf("/status/%d", code), nil), nil); resp.StatusCode != code || len(body) != 0 {
					t.Fatalf("%d: %s %q", code, resp.Status, body)
				}
			}
		}
		if n := s.opened.Load(); n != 1 {
			t.Errorf("%d connections, want 1", n)
		}
	})
}

func TestInformationalResponses(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, _ *server) {
		var codes []int
		req := newRequest(t, "GET", "/hints", nil)
		req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
				codes = append(codes, code)
				if h.Get("Link") == "" {
					t.Error("no Link")
				}
				return nil
			},
		}))
		resp, _ := x.do(req, nil)
		if resp.StatusCode != 200 || len(codes) != 1 || codes[0] != 103 {
			t.Errorf("%s after %v", resp.Status, codes)
		}
	})
}

func TestExpectContinue(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	continued := false
	req := newRequest(t, "POST", "/echo", io.NopCloser(bytes.NewReader(pattern(50_000))))
	req.ContentLength = 50_000
	req.Header.Set("Expect", "100-continue")
	req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		Got100Continue: func() { continued = true },
	}))
	if _, body := x.do(req, nil); !bytes.Equal(body, pattern(50_000)) || !continued {
		t.Fatalf("%d bytes, continued %v", len(body), continued)
	}
	// Refused: the body is never read, and the connection is not reused.
	body := &countingBody{Reader: bytes.NewReader(pattern(50_000))}
	req = newRequest(t, "POST", "/early", body)
	req.ContentLength = 50_000
	req.Header.Set("Expect", "100-continue")
	if resp, _ := x.do(req, nil); resp.StatusCode != 413 {
		t.Fatal(resp.Status)
	}
	eventually(t, "the body is closed", body.isClosed)
	if body.read() != 0 {
		t.Errorf("%d bytes of a refused body were read", body.read())
	}
	x.get("/bytes/1")
	if n := s.opened.Load(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

type countingBody struct {
	io.Reader
	mu     sync.Mutex
	n      int
	closed bool
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.mu.Lock()
	b.n += n
	b.mu.Unlock()
	return n, err
}
func (b *countingBody) Close() error   { b.mu.Lock(); defer b.mu.Unlock(); b.closed = true; return nil }
func (b *countingBody) read() int      { b.mu.Lock(); defer b.mu.Unlock(); return b.n }
func (b *countingBody) isClosed() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.closed }

// A response may come while the request is still being sent.
func TestEarlyResponse(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, _ *server) {
		pr, pw := io.Pipe()
		req := newRequest(t, "POST", "/early", pr)
		resp, body := x.do(req, nil) // nothing has been written yet
		if resp.StatusCode != 413 || string(body) != "too much" {
			t.Fatalf("%s %q", resp.Status, body)
		}
		pw.CloseWithError(errors.New("the client stops"))
		x.get("/bytes/10")
	})
}

func TestSlowReader(t *testing.T) {
	bothProtocols(t, func(t *testing.T, x *bench, _ *server) {
		x.set(timeouts(func(b *resealv1.BackendTimeouts) { b.Idle = dur(time.Second) }))
		resp, err := x.RoundTrip(newRequest(t, "GET", "/bytes/3000000", nil), newCall())
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		got := make([]byte, 0, 3_000_000)
		buf := make([]byte, 1_000_000)
		for {
			time.Sleep(1200 * time.Millisecond) // slower than the idle time-out
			n, err := io.ReadFull(resp.Body, buf)
			got = append(got, buf[:n]...)
			if err != nil {
				break
			}
		}
		if !bytes.Equal(got, pattern(3_000_000)) {
			t.Fatalf("%d bytes", len(got))
		}
	})
}

func TestUpgrade(t *testing.T) {
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "echo" || !strings.EqualFold(r.Header.Get("Connection"), "upgrade") {
			w.WriteHeader(400)
			return
		}
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhello ")
		io.Copy(c, rw)
	})
	s := serveH2(t, echo) // would choose h2 if it were offered
	x := newBench(t, []string{s.addr})
	req := newRequest(t, "GET", "/", nil)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "echo")
	resp, err := x.RoundTrip(req, newCall())
	if err != nil || resp.StatusCode != 101 {
		t.Fatal(resp, err)
	}
	tunnel := resp.Body.(exchange.Tunnel)
	if _, err := tunnel.Write([]byte("world")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 11)
	if _, err := io.ReadFull(tunnel, got); err != nil || string(got) != "hello world" {
		t.Fatalf("%q %v", got, err)
	}
	if err := tunnel.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(tunnel); err != nil || len(rest) != 0 {
		t.Fatalf("%q %v", rest, err)
	}
	tunnel.Close()
}

func TestContextCancel(t *testing.T) {
	for name, path := range map[string]string{"before the header": "/hang", "in the body": "/stall"} {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			mux := http.NewServeMux()
			mux.HandleFunc("/hang", func(http.ResponseWriter, *http.Request) { <-release })
			mux.HandleFunc("/stall", func(w http.ResponseWriter, _ *http.Request) {
				w.Write([]byte("x"))
				w.(http.Flusher).Flush()
				<-release
			})
			for proto, s := range map[string]*server{"h1": serve(t, mux), "h2": serveH2(t, mux)} {
				t.Run(proto, func(t *testing.T) {
					x := newBench(t, []string{s.addr})
					ctx, cancel := context.WithCancel(t.Context())
					time.AfterFunc(20*time.Millisecond, cancel)
					begin := time.Now()
					_, _, err := x.try(newRequest(t, "GET", path, nil).WithContext(ctx), nil)
					if !errors.Is(err, context.Canceled) {
						t.Errorf("got %v", err)
					}
					if d := time.Since(begin); d > 5*time.Second {
						t.Errorf("took %v", d)
					}
					if x.tally.get(func(c *tally) int { return len(c.errors) }) != 0 {
						t.Error("a client that went away is not an error of this leg")
					}
				})
			}
			close(release)
		})
	}
}

func TestHeaderTimeout(t *testing.T) {
	release := make(chan struct{})
	hang := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-release
	})
	defer close(release)
	for proto, s := range map[string]*server{"h1": serve(t, hang), "h2": serveH2(t, hang)} {
		for _, body := range []int{0, 100, 100_000} {
			t.Run(fmt.Sprint(proto, body), func(t *testing.T) {
				x := newBench(t, []string{s.addr})
				call := newCall()
				call.ResponseHeaderTimeout = 30 * time.Millisecond
				req := newRequest(t, "POST", "/", bytes.NewReader(pattern(body)))
				_, _, err := x.try(req, call)
				wantReason(t, err, ReasonTimeoutHeader, 504)
				if call.Status != 504 || call.Reason != ReasonTimeoutHeader {
					t.Errorf("call %+v", call)
				}
			})
		}
	}
}

func TestIdleTimeoutInBody(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	stall := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "2") // without one nobody owes a byte: TestBlame
		w.Write([]byte("x"))
		w.(http.Flusher).Flush()
		<-release
	})
	for proto, s := range map[string]*server{"h1": serve(t, stall), "h2": serveH2(t, stall)} {
		t.Run(proto, func(t *testing.T) {
			x := newBench(t, []string{s.addr}, timeouts(func(b *resealv1.BackendTimeouts) { b.Idle = dur(500 * time.Millisecond) }))
			_, body, err := x.try(newRequest(t, "GET", "/", nil), nil)
			wantReason(t, err, ReasonTimeoutIdle, 504)
			if string(body) != "x" {
				t.Errorf("%q", body)
			}
			if x.tally.get(func(c *tally) int { return c.errors[ReasonTimeoutIdle] }) != 1 {
				t.Error("not counted")
			}
		})
	}
}

func TestMisuse(t *testing.T) {
	s := serve(t, site())
	x := newBench(t, []string{s.addr})
	call := newCall()
	call.Pool = "other"
	_, _, err := x.try(newRequest(t, "GET", "/", nil), call)
	wantReason(t, err, ReasonUnknownPool, 503)
	_, err = x.Tunnel(t.Context(), newCall())
	wantReason(t, err, ReasonProtocolError, 502)
	for name, spoil := range map[string]func(*http.Request){
		"header name":  func(r *http.Request) { r.Header["X\r\nY"] = []string{"1"} },
		"header value": func(r *http.Request) { r.Header["X"] = []string{"1\r\nEvil: yes"} },
		"method":       func(r *http.Request) { r.Method = "GET / HTTP/1.1\r\n" },
		"host":         func(r *http.Request) { r.Host = "a\r\nb" },
		"target":       func(r *http.Request) { r.URL.Opaque = "/a b" },
	} {
		t.Run(name, func(t *testing.T) {
			req := newRequest(t, "GET", "/", nil)
			spoil(req)
			_, _, err := x.try(req, nil)
			wantReason(t, err, ReasonBadRequest, 400)
		})
	}
	x.set(func(p *resealv1.BackendPool) { p.Tls.ServerName = "" })
	_, _, err = x.try(newRequest(t, "GET", "/", nil), nil)
	wantReason(t, err, ReasonMisdirected, 421)
	x.set(func(p *resealv1.BackendPool) { p.Endpoints = nil })
	call = newCall()
	call.ServerName = testName
	_, _, err = x.try(newRequest(t, "GET", "/", nil), call)
	wantReason(t, err, ReasonNoEndpoint, 503)
}
