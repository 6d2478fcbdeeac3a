package interop

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// socketServer serves WebSockets, and a protocol of plain bytes.
type socketServer struct {
	mu    sync.Mutex
	ended map[string]error // how the server saw a socket of a path end
}

func (s *socketServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == "/refuse":
		w.Header().Set("X-Why", "no room")
		http.Error(w, "not now", http.StatusServiceUnavailable)
		return
	case r.Header.Get("Upgrade") == "bytes":
		plainBytes(w, r)
		return
	}
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		InsecureSkipVerify: true, Subprotocols: []string{"v2.echo"}, CompressionMode: websocket.CompressionContextTakeover,
	})
	if err != nil {
		return
	}
	defer func() { _ = conn.CloseNow() }()
	conn.SetReadLimit(-1)
	// The request's context ends with the handler of a switched connection.
	err = serveSocket(context.Background(), conn, r.URL.Path)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended[r.URL.Path] = err
}

// end is how the server saw the socket of a path end. It waits for that.
func (s *socketServer) end(t *testing.T, path string) error {
	t.Helper()
	var end error
	harness.Settle(t, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		var ended bool
		if end, ended = s.ended[path]; !ended {
			return fmt.Errorf("the server has not seen the end of %s", path)
		}
		return nil
	})
	return end
}

func serveSocket(ctx context.Context, conn *websocket.Conn, path string) error {
	switch path {
	case "/close":
		return conn.Close(4001, "enough of it")
	case "/drop":
		return conn.CloseNow()
	case "/both":
		// It sends while it gets, regardless of what it gets.
		var sending sync.WaitGroup
		defer sending.Wait()
		sending.Go(func() {
			for range bothMessages {
				if conn.Write(ctx, websocket.MessageBinary, peers.Body(peers.Medium)) != nil {
					return
				}
			}
		})
		for range bothMessages {
			if _, got, err := conn.Read(ctx); err != nil || !bytes.Equal(got, peers.Body(peers.Medium)) {
				return fmt.Errorf("%d bytes: %w", len(got), err)
			}
		}
		sending.Wait()
		_, _, err := conn.Read(ctx) // the client's close
		return err
	}
	for {
		kind, message, err := conn.Read(ctx)
		if err != nil {
			return err
		}
		if err := conn.Write(ctx, kind, message); err != nil {
			return err
		}
	}
}

const bothMessages = 80 // of 256 KiB each way

// plainBytes switches to bytes. The server answers only when the client's have
// ended (/client-ends), or ends its own first and then says in the log what came
// (/server-ends).
func plainBytes(w http.ResponseWriter, r *http.Request) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(soon())
	_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: bytes\r\n\r\n")
	if r.URL.Path == "/server-ends" {
		_, _ = conn.Write(peers.Body(peers.Medium))
		_ = conn.(*tls.Conn).CloseWrite()
		_, _ = io.Copy(io.Discard, buffered)
		return
	}
	n, err := io.Copy(io.Discard, buffered)
	fmt.Fprintf(conn, "%d bytes, %v", n, err)
}

// TestWebSocket puts an edge between clients and servers of WebSockets.
func TestWebSocket(t *testing.T) {
	s := newSite(t, "")
	server := &socketServer{ended: make(map[string]error)}
	backend := s.Launch(t, goWith(server), peers.Options{HTTP2: true}) // the edge asks for http/1.1 all the same
	s.pool("ws", []*peers.Backend{backend}, "")
	w := &sockets{site: s, server: server, brisk: s.Address()}
	s.WaitAcked(s.Apply(harness.Listener("brisk", w.brisk, "", "  pool: ws\n  timeouts: {idle: 1s}\n")), s.edge)
	t.Run("messages", w.messages)
	t.Run("both ways", w.bothWays)
	t.Run("server closes", w.serverCloses)
	t.Run("client closes", w.clientCloses)
	t.Run("server drops", w.serverDrops)
	t.Run("client drops", w.clientDrops)
	t.Run("idle", w.idle)
	t.Run("refused", w.refused)
	t.Run("half-close", w.halfClose)
	harness.Settle(t, func() error {
		if n := s.PoolStats("ws").Connections; n.Active+n.Idle != 0 {
			return fmt.Errorf("connections to the backend are left: %+v", n)
		}
		return nil
	})
}

type sockets struct {
	*site
	server *socketServer
	brisk  string // the address of a listener that ends what is silent for a second
}

// dial opens a socket.
func (w *sockets) dial(t *testing.T, path string, options websocket.DialOptions) *websocket.Conn {
	t.Helper()
	return w.dialAt(t, w.address, path, options)
}

func (w *sockets) dialAt(t *testing.T, address, path string, options websocket.DialOptions) *websocket.Conn {
	t.Helper()
	ctx, cancel := context.WithDeadline(t.Context(), soon())
	t.Cleanup(cancel)
	options.HTTPClient = &http.Client{Transport: w.Client(t, address, false).Transport} // its time-out would end the socket
	conn, _, err := websocket.Dial(ctx, "wss://"+host("ws")+path, &options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseNow() })
	conn.SetReadLimit(-1)
	return conn
}

func (w *sockets) messages(t *testing.T) {
	for _, mode := range []websocket.CompressionMode{websocket.CompressionDisabled, websocket.CompressionContextTakeover} {
		conn := w.dial(t, fmt.Sprintf("/echo-%d", mode), websocket.DialOptions{CompressionMode: mode, Subprotocols: []string{"v1.echo", "v2.echo"}})
		if got := conn.Subprotocol(); got != "v2.echo" {
			t.Errorf("subprotocol %q", got)
		}
		// The lengths about which a frame's header changes, and frames that are
		// larger than what anybody keeps.
		for _, size := range []int{0, 1, 125, 126, 65535, 65536, 4 << 20} {
			message := peers.Body(peers.Large)[:size]
			for _, kind := range []websocket.MessageType{websocket.MessageText, websocket.MessageBinary} {
				sent := make(chan error, 1)
				go func() { sent <- conn.Write(t.Context(), kind, message) }()
				gotKind, got, err := conn.Read(t.Context())
				if err != nil || gotKind != kind || !bytes.Equal(got, message) {
					t.Fatalf("echo of %d bytes: %d bytes, %v, %v", size, len(got), gotKind, err)
				}
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := conn.Close(websocket.StatusNormalClosure, ""); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

// bothWays sends 20 MiB each way at once.
func (w *sockets) bothWays(t *testing.T) {
	conn := w.dial(t, "/both", websocket.DialOptions{})
	sent := make(chan error, 1)
	go func() {
		for range bothMessages {
			if err := conn.Write(t.Context(), websocket.MessageBinary, peers.Body(peers.Medium)); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	for i := range bothMessages {
		if _, got, err := conn.Read(t.Context()); err != nil || !bytes.Equal(got, peers.Body(peers.Medium)) {
			t.Fatalf("message %d: %d bytes, %v", i, len(got), err)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	_ = conn.Close(websocket.StatusNormalClosure, "")
	if err := w.server.end(t, "/both"); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		t.Errorf("the server: %v", err)
	}
	if r := w.logged(t, "/both"); r.Status != 101 || r.Reason != "" || r.BytesIn < bothMessages<<18 || r.BytesOut < bothMessages<<18 {
		t.Errorf("logged as %+v", r)
	}
}

func (w *sockets) serverCloses(t *testing.T) {
	conn := w.dial(t, "/close", websocket.DialOptions{})
	_, _, err := conn.Read(t.Context())
	var closed websocket.CloseError
	if !errors.As(err, &closed) || closed.Code != 4001 || closed.Reason != "enough of it" {
		t.Errorf("the client: %v", err)
	}
	if err := w.server.end(t, "/close"); err != nil {
		t.Errorf("the server: %v", err)
	}
	if r := w.logged(t, "/close"); r.Status != 101 {
		t.Errorf("logged as %+v", r)
	}
}

func (w *sockets) clientCloses(t *testing.T) {
	conn := w.dial(t, "/client-closes", websocket.DialOptions{})
	if err := conn.Close(4002, "bye"); err != nil {
		t.Errorf("the client: %v", err)
	}
	var closed websocket.CloseError
	if err := w.server.end(t, "/client-closes"); !errors.As(err, &closed) || closed.Code != 4002 || closed.Reason != "bye" {
		t.Errorf("the server: %v", err)
	}
	if r := w.logged(t, "/client-closes"); r.Status != 101 || r.Reason != "" {
		t.Errorf("logged as %+v", r)
	}
}

// serverDrops: a server that ends the connection without a close frame.
func (w *sockets) serverDrops(t *testing.T) {
	conn := w.dial(t, "/drop", websocket.DialOptions{})
	if _, _, err := conn.Read(t.Context()); err == nil || websocket.CloseStatus(err) != -1 {
		t.Errorf("the client: %v", err)
	}
	_ = conn.CloseNow() // before that the server's end might be half of one
	if r := w.logged(t, "/drop"); r.Status != 101 {
		t.Errorf("logged as %+v", r)
	}
}

func (w *sockets) clientDrops(t *testing.T) {
	conn := w.dial(t, "/client-drops", websocket.DialOptions{})
	w.echo(t, conn)
	_ = conn.CloseNow()
	if err := w.server.end(t, "/client-drops"); err == nil || websocket.CloseStatus(err) != -1 {
		t.Errorf("the server: %v", err)
	}
	if r := w.logged(t, "/client-drops"); r.Status != 101 {
		t.Errorf("logged as %+v", r)
	}
}

func (w *sockets) echo(t *testing.T, conn *websocket.Conn) {
	t.Helper()
	if err := conn.Write(t.Context(), websocket.MessageText, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, got, err := conn.Read(t.Context()); err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}
}

// idle: a socket on which nothing moves is ended, one with pings lives on.
func (w *sockets) idle(t *testing.T) {
	started := time.Now()
	silent := w.dialAt(t, w.brisk, "/silent", websocket.DialOptions{})
	w.echo(t, silent)
	busy := w.dialAt(t, w.brisk, "/busy", websocket.DialOptions{})
	w.echo(t, busy)
	ended := make(chan error, 1)
	go func() {
		_, _, err := silent.Read(t.Context())
		ended <- err
	}()
	reading := busy.CloseRead(t.Context()) // takes the pongs
	for pings := time.Now(); time.Since(pings) < 3*time.Second; time.Sleep(100 * time.Millisecond) {
		if err := busy.Ping(reading); err != nil {
			t.Fatalf("ping after %v: %v", time.Since(pings), err)
		}
	}
	if err := <-ended; err == nil || time.Since(started) > 20*time.Second {
		t.Errorf("the silent socket was ended after %v: %v", time.Since(started), err)
	}
	if err := w.server.end(t, "/silent"); err == nil {
		t.Error("nor at the server")
	}
	if r := w.logged(t, "/silent"); r.Status != 101 || r.Reason != "timeout_idle" {
		t.Errorf("logged as %+v", r)
	}
	if err := busy.Close(websocket.StatusNormalClosure, ""); err != nil && websocket.CloseStatus(w.server.end(t, "/busy")) != websocket.StatusNormalClosure {
		t.Errorf("close: %v", err)
	}
}

// refused: a server may answer anything but 101.
func (w *sockets) refused(t *testing.T) {
	for range 3 {
		_, response, err := websocket.Dial(t.Context(), "wss://"+host("ws")+"/refuse", &websocket.DialOptions{HTTPClient: w.Client(t, w.address, false)})
		if err == nil || response == nil || response.StatusCode != http.StatusServiceUnavailable || response.Header.Get("X-Why") != "no room" {
			t.Fatalf("%v, %v", response, err)
		}
	}
}

// halfClose: each side may end its bytes and get the other's.
func (w *sockets) halfClose(t *testing.T) {
	body := peers.Body(peers.Large)[:3<<20]
	t.Run("client", func(t *testing.T) {
		conn, reader := w.upgrade(t, "/client-ends")
		if _, err := conn.Write(body); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(reader); string(got) != fmt.Sprintf("%d bytes, <nil>", len(body)) || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("server", func(t *testing.T) {
		conn, reader := w.upgrade(t, "/server-ends")
		if got, err := io.ReadAll(reader); !bytes.Equal(got, peers.Body(peers.Medium)) || err != nil {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if _, err := conn.Write(body); err != nil {
			t.Errorf("after the server's end: %v", err)
		}
		_ = conn.Close()
		if r := w.logged(t, "/server-ends"); r.Status != 101 || r.Reason != "" || r.BytesIn != int64(len(body)) {
			t.Errorf("logged as %+v", r)
		}
	})
}

// upgrade switches a connection to bytes.
func (w *sockets) upgrade(t *testing.T, path string) (*tls.Conn, *bufio.Reader) {
	t.Helper()
	conn := w.raw(t, "http/1.1")
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: bytes\r\n\r\n", path, host("ws"))
	reader := bufio.NewReader(conn)
	response, err := http.ReadResponse(reader, nil)
	if err != nil || response.StatusCode != http.StatusSwitchingProtocols || !strings.EqualFold(response.Header.Get("Upgrade"), "bytes") {
		t.Fatalf("%v, %v", response, err)
	}
	return conn, reader
}
