package integration

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
)

// wiretap passes connections on and counts the TLS records in which data travels.
type wiretap struct {
	listener net.Listener
	backend  string
	running  sync.WaitGroup

	mu    sync.Mutex
	open  map[net.Conn]bool // nil once closed
	count recordCounts
}

// recordCounts are the records of application data (RFC 8446 section 5.1), which in
// TLS 1.3 most of a handshake is, too.
type recordCounts struct {
	fromClient, fromServer int
}

// newWiretap listens for connections to backend for the length of the test.
func newWiretap(t *testing.T, backend string) *wiretap {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wiretap{listener: listener, backend: backend, open: make(map[net.Conn]bool)}
	w.running.Go(w.accept)
	t.Cleanup(w.close)
	return w
}

func (w *wiretap) address() string { return w.listener.Addr().String() }

// records are those that were passed on so far.
func (w *wiretap) records() recordCounts {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.count
}

func (w *wiretap) close() {
	_ = w.listener.Close()
	w.mu.Lock()
	for conn := range w.open {
		_ = conn.Close()
	}
	w.open = nil
	w.mu.Unlock()
	w.running.Wait()
}

func (w *wiretap) accept() {
	for {
		client, err := w.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", w.backend)
		if err != nil {
			_ = client.Close()
			continue
		}
		w.mu.Lock()
		closed := w.open == nil
		if !closed {
			w.open[client], w.open[server] = true, true
		}
		w.mu.Unlock()
		if closed {
			_, _ = client.Close(), server.Close()
			return
		}
		w.running.Go(func() { w.pass(server, client, &w.count.fromClient) })
		w.running.Go(func() { w.pass(client, server, &w.count.fromServer) })
	}
}

// pass copies one direction to its end, and counts what has passed before it is
// there.
func (w *wiretap) pass(to, from net.Conn, count *int) {
	var header [5]byte
	have, rest := 0, 0
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		records := 0
		for data := buffer[:n]; len(data) > 0; {
			if rest > 0 {
				step := min(rest, len(data))
				rest, data = rest-step, data[step:]
				continue
			}
			step := copy(header[have:], data)
			have, data = have+step, data[step:]
			if have == len(header) {
				const applicationData = 23
				if header[0] == applicationData {
					records++
				}
				have, rest = 0, int(header[3])<<8|int(header[4])
			}
		}
		w.mu.Lock()
		*count += records
		w.mu.Unlock()
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				break
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				_ = to.(*net.TCPConn).CloseWrite()
				return
			}
			break
		}
	}
	_, _ = to.Close(), from.Close()
}
