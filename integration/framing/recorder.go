package framing

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/reseal/reseal/integration/peers"
)

// recorder is a backend that keeps which bytes came on which connection. Its answers
// hold the target that was asked for, so that an answer that reaches the wrong client
// shows.
type recorder struct {
	listener net.Listener
	running  sync.WaitGroup

	mu       sync.Mutex
	open     map[*recorded]bool // nil once closed
	messages []message          // whole ones, as net/http reads them, since the last take
	raw      []*recorded        // connections on which something came since then
}

// recorded is one connection. All but conn is guarded by recorder.mu.
type recorded struct {
	conn   net.Conn
	bytes  []byte // that came and are not judged yet
	listed bool   // in recorder.raw
}

func newRecorder(authority *peers.Authority) (*recorder, error) {
	pair, err := authority.Issue(peers.ServerName)
	if err != nil {
		return nil, err
	}
	certificate, err := pair.TLS()
	if err != nil {
		return nil, err
	}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"http/1.1"}}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		return nil, err
	}
	r := &recorder{listener: listener, open: make(map[*recorded]bool)}
	r.running.Go(r.accept)
	return r, nil
}

func (r *recorder) address() string { return r.listener.Addr().String() }

func (r *recorder) close() {
	_ = r.listener.Close()
	r.mu.Lock()
	for c := range r.open {
		_ = c.conn.Close()
	}
	r.open = nil
	r.mu.Unlock()
	r.running.Wait()
}

func (r *recorder) accept() {
	for {
		conn, err := r.listener.Accept()
		if err != nil {
			return
		}
		c := &recorded{conn: conn}
		r.mu.Lock()
		closed := r.open == nil
		if !closed {
			r.open[c] = true
		}
		r.mu.Unlock()
		if closed {
			_ = conn.Close()
			return
		}
		r.running.Go(func() { r.serve(c) })
	}
}

// tee keeps what a connection brings.
type tee struct {
	r *recorder
	c *recorded
}

func (t tee) Read(p []byte) (int, error) {
	n, err := t.c.conn.Read(p)
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	t.c.bytes = append(t.c.bytes, p[:n]...)
	if n > 0 && !t.c.listed {
		t.c.listed = true
		t.r.raw = append(t.r.raw, t.c)
	}
	return n, err
}

// serve reads requests as net/http does and answers each.
func (r *recorder) serve(c *recorded) {
	defer func() {
		_ = c.conn.Close()
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.open, c)
	}()
	for reader := bufio.NewReader(tee{r, c}); ; {
		request, err := http.ReadRequest(reader)
		if err != nil {
			if !strings.Contains(err.Error(), "EOF") {
				_, _ = io.WriteString(c.conn, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
			}
			return
		}
		if strings.EqualFold(request.Header.Get("Expect"), "100-continue") {
			_, _ = io.WriteString(c.conn, "HTTP/1.1 100 Continue\r\n\r\n")
		}
		var body bytes.Buffer
		if _, err := body.ReadFrom(request.Body); err != nil {
			return
		}
		r.mu.Lock()
		r.messages = append(r.messages, message{request.Method, request.RequestURI, body.String()})
		r.mu.Unlock()
		status, answer := "200 OK", request.RequestURI
		if request.Method == http.MethodConnect {
			status = "405 Method Not Allowed"
		}
		text := fmt.Sprintf("HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n", status, len(answer))
		if request.Method != http.MethodHead {
			text += answer
		}
		if _, err := io.WriteString(c.conn, text); err != nil || request.Close {
			return
		}
	}
}

// taken is what came since the last take.
type taken struct {
	messages []message
	raw      []string // by connection
	// stray says why some reader could see something else than others in the raw
	// bytes. nil: none can.
	stray error
}

func (r *recorder) take() taken {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := taken{messages: r.messages}
	for _, c := range r.raw {
		c.listed = false
		t.raw = append(t.raw, string(c.bytes))
		_, rest, err := canonical(c.bytes)
		if err != nil {
			t.stray, rest = err, nil // what follows is judged by itself
		}
		c.bytes = bytes.Clone(rest)
	}
	r.messages, r.raw = nil, nil
	return t
}
