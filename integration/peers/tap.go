package peers

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Tap stands before a server that can't count for itself, and counts what both
// sides send in the clear. It passes everything on as it comes, the ends of
// connections too: FIN as FIN, RST as RST. The server knows nothing of it.
type Tap struct {
	listener net.Listener
	backend  string
	running  sync.WaitGroup

	mu     sync.Mutex
	counts Counts
	open   map[*tapped]bool // nil once closed
}

// NewTap listens on a free port of 127.0.0.1 for connections to backend, a
// host:port.
func NewTap(backend string) (*Tap, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	t := &Tap{listener: listener, backend: backend, open: make(map[*tapped]bool), counts: Counts{Requests: Unknown}}
	t.running.Go(t.accept)
	return t, nil
}

// Address is where it listens.
func (t *Tap) Address() string { return t.listener.Addr().String() }

// Counts are those of the server, without requests. Handshakes count when they
// are complete, and failed ones when their connection ends.
func (t *Tap) Counts() Counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts
}

// Close ends it with all connections.
func (t *Tap) Close() error {
	err := t.listener.Close()
	t.mu.Lock()
	for c := range t.open {
		c.cut()
	}
	t.open = nil
	t.mu.Unlock()
	t.running.Wait()
	return err
}

// before puts a tap before a backend that is running. Should that fail, the
// backend is stopped.
func before(b *Backend) (*Backend, error) {
	tap, err := NewTap(b.Address)
	if err != nil {
		return nil, errors.Join(err, b.Stop())
	}
	stop := b.stop
	b.Address = tap.Address()
	b.counts = func(context.Context) (Counts, error) { return tap.Counts(), nil }
	b.stop = func() error { return errors.Join(tap.Close(), stop()) }
	return b, nil
}

func (t *Tap) accept() {
	for {
		client, err := t.listener.Accept()
		if err != nil {
			return
		}
		t.running.Go(func() { t.serve(client.(*net.TCPConn)) })
	}
}

// serve passes on one connection until both sides have ended it.
func (t *Tap) serve(client *net.TCPConn) {
	backend, err := net.DialTimeout("tcp", t.backend, 10*time.Second)
	if err != nil {
		_ = client.SetLinger(0)
		_ = client.Close()
		return
	}
	c := &tapped{client: client, backend: backend.(*net.TCPConn)}
	t.mu.Lock()
	if t.open == nil {
		t.mu.Unlock()
		c.cut()
		return
	}
	t.open[c] = true
	t.counts.Connections++
	t.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { t.pass(c, c.backend, c.client, &c.handshake.client) })
	both.Go(func() { t.pass(c, c.client, c.backend, &c.handshake.server) })
	both.Wait()
	_ = c.client.Close()
	_ = c.backend.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.open, c)
	if c.handshake.begun && !c.counted {
		t.counts.Failed++
	}
}

// tapped is one connection. What follows handshake is guarded by Tap.mu.
type tapped struct {
	client, backend *net.TCPConn

	handshake handshake
	counted   bool // the handshake
	over      bool // one side has ended the connection
	reset     bool
}

// cut ends both sides with RST.
func (c *tapped) cut() {
	for _, side := range []*net.TCPConn{c.client, c.backend} {
		_ = side.SetLinger(0)
		_ = side.Close()
	}
}

// pass copies what one side sends until it ends.
func (t *Tap) pass(c *tapped, to, from *net.TCPConn, sent *direction) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		t.sent(c, sent, buffer[:n], err)
		if n > 0 {
			if _, failed := to.Write(buffer[:n]); failed != nil {
				t.ended(c, to == c.client, failed)
				c.cut()
				return
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			_ = to.CloseWrite()
			return
		default:
			c.cut()
			return
		}
	}
}

// sent takes what one side sent and how it ended, before the other side gets it.
func (t *Tap) sent(c *tapped, d *direction, data []byte, err error) {
	t.mu.Lock()
	d.follow(data)
	if !c.counted && c.handshake.complete() {
		c.counted = true
		switch c.handshake.mechanism() {
		case full:
			t.counts.Full++
		case bySessionID:
			t.counts.ResumedSessionID++
		case byTicket:
			t.counts.ResumedTicket++
		case byPSK:
			t.counts.ResumedPSK++
		}
	}
	t.mu.Unlock()
	if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.ended(c, d == &c.handshake.client, err)
	}
}

// ended counts how the client ended a connection, when it was the client that
// did and no close_notify of either side came before.
func (t *Tap) ended(c *tapped, client bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// After the client's FIN a write fails with EPIPE.
	if client && !c.reset && errors.Is(err, syscall.ECONNRESET) {
		c.reset = true
		t.counts.Resets++
	}
	if client && !c.over && c.counted && !c.handshake.client.notified && !c.handshake.server.notified {
		t.counts.Unclean++
	}
	c.over = true
}
