package edge

import (
	"bytes"
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http2"
)

// serveHandler is a backend that speaks HTTP/1.1 by net/http.
func serveHandler(t *testing.T, handler http.Handler) (address string) {
	t.Helper()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{issue(t, nil, "backend.test")}})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	t.Cleanup(func() {
		server.Close()
		serving.Wait()
	})
	return listener.Addr().String()
}

// machineClient drives a client's machine of HTTP/2, event by event.
type machineClient struct {
	t       *testing.T
	conn    *tls.Conn
	machine *http2.Conn
	event   http2.Event
	in      []byte
}

func (x *bothLegs) machineClient() *machineClient {
	c := &machineClient{t: x.t, conn: x.dial("h2"), machine: http2.NewClient(http2.Config{})}
	c.send(c.machine.AppendPending(nil))
	c.until(http2.Settings)
	return c
}

func (c *machineClient) send(out []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(out); err != nil {
		c.t.Fatal(err)
	}
}

// next is the next event. Data is consumed.
func (c *machineClient) next() *http2.Event {
	c.t.Helper()
	for {
		n, err := c.machine.Next(c.in, &c.event)
		if c.in = c.in[n:]; err != nil {
			c.t.Fatal(err)
		}
		if c.event.Kind == http2.Data {
			c.event.Data = bytes.Clone(c.event.Data)
			c.machine.Consumed(c.event.Stream, len(c.event.Data))
		}
		if out := c.machine.AppendPending(nil); len(out) > 0 {
			c.send(out)
		}
		if c.event.Kind != http2.None {
			return &c.event
		}
		buffer := make([]byte, 16<<10)
		if n, err = c.conn.Read(buffer); err != nil {
			c.t.Fatal(err)
		}
		c.in = buffer[:n]
	}
}

// until skips all events before one of a kind.
func (c *machineClient) until(kind http2.Kind) *http2.Event {
	c.t.Helper()
	for {
		if ev := c.next(); ev.Kind == kind {
			return ev
		}
	}
}

// read reads that many bytes of the content that comes.
func (c *machineClient) read(n int) string {
	c.t.Helper()
	var got string
	for len(got) < n {
		ev := c.next()
		if ev.Kind != http2.Data {
			c.t.Fatalf("%v (%v) after %q", ev.Kind, ev.Code, got)
		}
		got += string(ev.Data)
	}
	return got
}

// connect asks for a WebSocket.
func (c *machineClient) connect(path string) (stream uint32) {
	c.t.Helper()
	out, stream, err := c.machine.AppendRequest(nil, &exchange.Request{
		Method: "CONNECT", Scheme: "https", Authority: "public.test", Target: path, Protocol: "websocket", Length: exchange.UnknownLength,
		Fields: exchange.Fields{{Name: "sec-websocket-version", Value: "13"}, {Name: "origin", Value: "https://public.test"}},
	}, false)
	if err != nil {
		c.t.Fatal(err)
	}
	c.send(out)
	return stream
}

func (c *machineClient) data(stream uint32, p []byte, end bool) {
	c.t.Helper()
	out, n, err := c.machine.AppendData(nil, stream, p, end)
	if err != nil || n != len(p) {
		c.t.Fatalf("sent %d bytes: %v", n, err)
	}
	c.send(out)
}

// frame is a frame of a WebSocket as clients send it, masked with zeros (RFC 6455
// section 5.2).
func frame(text string) []byte {
	return append([]byte{0x81, 0x80 | byte(len(text)), 0, 0, 0, 0}, text...)
}

// TestWebSocket: a WebSocket over HTTP/2 (RFC 8441) to a server that knows those
// over HTTP/1.1 alone.
func TestWebSocket(t *testing.T) {
	ended := make(chan error, 10)
	mux := http.NewServeMux()
	mux.Handle("/echo", websocket.Server{Handler: func(ws *websocket.Conn) {
		_, err := io.Copy(ws, ws)
		ended <- err
	}})
	mux.Handle("/bye", websocket.Server{Handler: func(ws *websocket.Conn) {
		_, _ = io.WriteString(ws, "bye")
	}})
	mux.HandleFunc("/reset", func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: "+
			acceptOf(r.Header.Get("Sec-WebSocket-Key"))+"\r\n\r\nhello")
		time.Sleep(50 * time.Millisecond)
		_ = conn.(*tls.Conn).NetConn().(*net.TCPConn).SetLinger(0)
		_ = conn.(*tls.Conn).NetConn().Close()
	})
	mux.HandleFunc("/wrong", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "upgrade")
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Sec-WebSocket-Accept", "of another key")
		w.WriteHeader(http.StatusSwitchingProtocols)
	})
	mux.HandleFunc("/no", func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusForbidden) })
	mux.HandleFunc("/plain", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "not switched") })
	x := newLegs(t, serveHandler(t, mux))

	t.Run("both directions", func(t *testing.T) {
		c := x.machineClient()
		if !c.machine.ExtendedConnect() {
			t.Fatal("the edge does not offer extended CONNECT")
		}
		stream := c.connect("/echo")
		ev := c.until(http2.Response)
		if ev.Response.Status != 200 || ev.Response.Fields.Has("sec-websocket-accept") {
			t.Fatalf("answered %+v", ev.Response)
		}
		for _, text := range []string{"hello", "again", strings.Repeat("x", 100)} {
			c.data(stream, frame(text), false)
			if got := c.read(2 + len(text)); got[2:] != text {
				t.Errorf("echoed %q", got)
			}
		}
		// The client ends its direction, the server ends its own.
		c.data(stream, nil, true)
		for ev := c.until(http2.Data); !ev.End; {
			ev = c.next()
		}
		if err := <-ended; err != nil {
			t.Errorf("the server's end: %v", err)
		}
	})
	t.Run("sent before the answer", func(t *testing.T) {
		c := x.machineClient()
		stream := c.connect("/echo")
		c.data(stream, frame("early"), false)
		c.until(http2.Response)
		if got := c.read(2 + len("early")); got[2:] != "early" {
			t.Errorf("echoed %q", got)
		}
		c.machine.Reset(stream, http2.Cancel)
		c.send(c.machine.AppendPending(nil))
		<-ended // however it ends
	})
	t.Run("ended by the server", func(t *testing.T) {
		c := x.machineClient()
		c.connect("/bye")
		c.until(http2.Response)
		got := ""
		for end := false; !end; {
			ev := c.until(http2.Data)
			got += string(ev.Data)
			end = ev.End
		}
		if !strings.Contains(got, "bye") {
			t.Errorf("got %q", got)
		}
	})
	t.Run("reset by the server", func(t *testing.T) {
		c := x.machineClient()
		c.connect("/reset")
		c.until(http2.Response)
		if got := c.read(5); got != "hello" {
			t.Errorf("got %q", got)
		}
		if ev := c.next(); ev.Kind != http2.Reset || ev.Code != http2.Cancel {
			t.Errorf("%v %v", ev.Kind, ev.Code)
		}
	})
	for path, want := range map[string]int{"/wrong": 502, "/no": 403, "/plain": 502} {
		t.Run(path, func(t *testing.T) {
			c := x.machineClient()
			c.connect(path)
			if ev := c.until(http2.Response); ev.Response.Status != want {
				t.Errorf("status %d, want %d", ev.Response.Status, want)
			}
		})
	}
}

// acceptOf is the answer to a key (RFC 6455 section 4.2.2).
func acceptOf(key string) string {
	digest := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(digest[:])
}
