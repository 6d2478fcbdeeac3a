package http1

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// pump owns one connection, as a loop will.
type pump struct {
	t    *testing.T
	conn net.Conn
	c    *Conn
	held []byte
	data []byte // of the message under way
	ev   Event
}

// next returns the next event other than Data, or false at the end.
func (p *pump) next() bool {
	for {
		n, err := p.c.Next(p.held, &p.ev)
		p.held = p.held[n:]
		switch {
		case err != nil:
			p.t.Errorf("%q: %v", p.held, err)
			return false
		case p.ev.Kind == Data:
			p.data = append(p.data, p.ev.Data...)
		case p.ev.Kind != None:
			return true
		case p.c.Over():
			return false
		default:
			var buffer [512]byte
			n, err := p.conn.Read(buffer[:])
			if p.held = append(p.held, buffer[:n]...); n == 0 {
				if err := p.c.PeerClosed(err == io.EOF, &p.ev); err != nil {
					p.t.Error(err)
				}
				return p.ev.Kind == End
			}
		}
	}
}

func (p *pump) write(out []byte, err error) {
	if err == nil {
		_, err = p.conn.Write(out)
	}
	if err != nil {
		p.t.Error(err)
	}
}

// send writes a message behind its head.
func (p *pump) send(out []byte, err error, body []byte, trailers exchange.Fields) {
	if err == nil && len(body) > 0 {
		out, err = p.c.AppendData(out, body)
	}
	if err == nil {
		out, err = p.c.AppendEnd(out, trailers)
	}
	p.write(out, err)
}

// echo answers each request with 103 and its body.
func (p *pump) echo() {
	defer p.conn.Close()
	var request exchange.Request
	for p.next() {
		if p.ev.Kind == Request {
			request, p.ev.Request.Fields, p.data = p.ev.Request, nil, nil
			if request.Continue {
				p.write(p.c.AppendInformational(nil, 100, nil))
			}
			continue
		}
		p.write(p.c.AppendInformational(nil, 103, exchange.Fields{{Name: "Link", Value: "a"}}))
		sum := exchange.Fields{{Name: "X-Sum", Value: fmt.Sprint(len(p.data), p.ev.Trailers.Get("X-Sent"))}}
		response := exchange.Response{Status: 200, Length: int64(len(p.data)), Fields: exchange.Fields{{Name: "X-Length", Value: fmt.Sprint(request.Length)}}}
		if request.Length < 0 {
			response.Fields.Add("Trailer", "X-Sum")
		}
		if request.Method == "HEAD" {
			response.Length = 7
		}
		out, err := p.c.AppendResponse(nil, &response)
		p.send(out, err, p.data, sum)
	}
}

// TestNetHTTPClient serves a client of net/http on one connection.
func TestNetHTTPClient(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var connections int
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections++
			all.Go((&pump{t: t, conn: conn, c: NewServer(Limits{})}).echo)
		}
	})
	transport := &http.Transport{ExpectContinueTimeout: time.Hour}
	large := strings.Repeat("0123456789", 10_000)
	for _, test := range []struct {
		method, body      string
		chunked, expected bool
	}{
		{"GET", "", false, false}, {"HEAD", "", false, false}, {"POST", "abc", false, false}, {"PUT", large, false, true}, {"POST", large, true, false}, {"POST", "x", true, true}, {"GET", "", false, false},
	} {
		request, err := http.NewRequest(test.method, "http://"+listener.Addr().String()+"/", strings.NewReader(test.body))
		if err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprint(len(test.body))
		if test.chunked {
			request.Body, request.ContentLength, want = io.NopCloser(strings.NewReader(test.body)), -1, "-1"
			request.Trailer = http.Header{"X-Sent": {"!"}}
		}
		if test.expected {
			request.Header.Set("Expect", "100-continue")
		}
		hints := 0
		request = request.WithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, _ textproto.MIMEHeader) error { hints += code; return nil },
		}))
		response, err := transport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		if err != nil || string(body) != test.body || response.Header.Get("X-Length") != want {
			t.Errorf("%+v: %d bytes, %v, %v", test.method, len(body), response.Header, err)
		}
		if got := response.Trailer.Get("X-Sum"); test.chunked && got != fmt.Sprint(len(test.body), "!") {
			t.Errorf("trailer %q", got)
		}
		if wantHints := map[bool]int{false: 103, true: 203}[test.expected]; hints != wantHints {
			t.Errorf("informational responses %d, want %d", hints, wantHints)
		}
		if test.method == "HEAD" && response.ContentLength != 7 {
			t.Errorf("HEAD says %d", response.ContentLength)
		}
	}
	transport.CloseIdleConnections()
	listener.Close()
	all.Wait()
	if connections != 1 {
		t.Errorf("%d connections", connections)
	}
}

// TestNetHTTPServer asks a server of net/http on one connection.
func TestNetHTTPServer(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Link", "a")
		w.WriteHeader(103)
		w.Header().Set("Trailer", "X-Sum")
		w.Header().Set("X-Got", fmt.Sprint(r.Method, r.Host, r.RequestURI, r.ContentLength, r.Header.Get("Te")))
		w.WriteHeader(200)
		_, _ = w.Write(body)
		w.Header().Set("X-Sum", fmt.Sprint(len(body), r.Trailer.Get("X-Sent")))
	}))
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p := &pump{t: t, conn: conn, c: NewClient(Limits{})}
	for round, request := range []exchange.Request{
		{Method: "GET"}, {Method: "HEAD"}, {Method: "POST", Length: 5}, {Method: "POST", Length: -1, Trailers: true}, {Method: "PUT", Length: 5, Continue: true}, {Method: "DELETE"},
	} {
		request.Authority, request.Target = "app.test", "/a%2Fb?c"
		var body []byte
		var trailers exchange.Fields
		if request.Length != 0 {
			body = []byte("01234")
		}
		te := ""
		if request.Trailers {
			request.Fields.Add("Trailer", "X-Sent")
			trailers, te = exchange.Fields{{Name: "X-Sent", Value: "!"}}, "trailers"
		}
		if round == 5 {
			p.c.CloseAfter()
		}
		out, err := p.c.AppendRequest(nil, &request)
		if request.Continue {
			p.write(out, err)
			if out = nil; !p.next() || p.ev.Response.Status != 100 {
				t.Fatalf("round %d: %+v", round, p.ev)
			}
		}
		p.send(out, err, body, trailers)
		p.data = nil
		if !p.next() || p.ev.Kind != Informational || p.ev.Response.Status != 103 {
			t.Fatalf("round %d: %+v", round, p.ev)
		}
		want := fmt.Sprint(request.Method, "app.test", "/a%2Fb?c", request.Length, te)
		if !p.next() || p.ev.Kind != Response || p.ev.Response.Fields.Get("X-Got") != want {
			t.Fatalf("round %d: %+v, want %s", round, p.ev, want)
		}
		if !p.next() || p.ev.Kind != End {
			t.Fatalf("round %d: %+v", round, p.ev)
		}
		if sum := fmt.Sprint(len(body), trailers.Get("X-Sent")); request.Method != "HEAD" && (!bytes.Equal(p.data, body) || p.ev.Trailers.Get("X-Sum") != sum) {
			t.Errorf("round %d: %q, trailers %v, want %s", round, p.data, p.ev.Trailers, sum)
		}
		if last := round == 5; p.c.Reusable() == last || p.c.Over() != last || len(p.held) > 0 {
			t.Errorf("round %d: reusable %v, over %v, %q", round, p.c.Reusable(), p.c.Over(), p.held)
		}
	}
}
