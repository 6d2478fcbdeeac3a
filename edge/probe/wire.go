package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// maxRecorded bounds what is kept of each direction of a handshake, in bytes.
const maxRecorded = 256 << 10

// wire records a handshake as it goes over the connection, and notes how the
// peer ended it, which crypto/tls does not tell.
type wire struct {
	net.Conn

	mu        sync.Mutex
	stopped   bool // the handshake is over
	sent, got []byte
	fin, rst  bool
	// interrupted is whether the context has ended: deadlines stay in the past.
	interrupted bool
}

// Write implements net.Conn.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	if !w.stopped && len(w.sent) < maxRecorded {
		w.sent = append(w.sent, p...)
	}
	w.mu.Unlock()
	n, err := w.Conn.Write(p)
	w.noteEnd(err)
	return n, err
}

// Read implements net.Conn.
func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.mu.Lock()
	if !w.stopped && len(w.got) < maxRecorded {
		w.got = append(w.got, p[:n]...)
	}
	w.mu.Unlock()
	w.noteEnd(err)
	return n, err
}

func (w *wire) noteEnd(err error) {
	if err == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fin = w.fin || errors.Is(err, io.EOF)
	w.rst = w.rst || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// stop ends the recording and returns it.
func (w *wire) stop() (sent, got []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	sent, got = w.sent, w.got
	w.stopped, w.sent, w.got = true, nil, nil
	return sent, got
}

// received is what came so far, while it is recorded.
func (w *wire) received() []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.got
}

// ended says how the peer has ended the connection so far.
func (w *wire) ended() (fin, rst bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fin, w.rst
}

// reset closes the connection with RST. It returns false when the connection
// can't do that, and closes it all the same.
func (w *wire) reset() bool {
	tcp, ok := w.Conn.(interface{ SetLinger(seconds int) error })
	ok = ok && tcp.SetLinger(0) == nil
	w.Close()
	return ok
}

// finish sends FIN and nothing else, reads to the peer's end and closes. It
// returns false when the connection can't do that.
func (w *wire) finish(timeout time.Duration) bool {
	tcp, ok := w.Conn.(interface{ CloseWrite() error })
	if !ok || tcp.CloseWrite() != nil {
		w.Close()
		return false
	}
	_ = w.SetReadDeadline(time.Now().Add(timeout))
	_, _ = io.Copy(io.Discard, io.LimitReader(onlyReader{w}, maxBody))
	w.Close()
	return true
}

// onlyReader hides what else a connection can do from io.Copy.
type onlyReader struct{ io.Reader }

// interruptible makes reads and writes fail when ctx ends, until the returned
// func is called.
func (w *wire) interruptible(ctx context.Context) (release func() bool) {
	return context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.interrupted = true
		_ = w.Conn.SetDeadline(time.Unix(1, 0))
	})
}

// SetDeadline implements net.Conn.
func (w *wire) SetDeadline(t time.Time) error { return w.unlessInterrupted(w.Conn.SetDeadline, t) }

// SetReadDeadline implements net.Conn.
func (w *wire) SetReadDeadline(t time.Time) error {
	return w.unlessInterrupted(w.Conn.SetReadDeadline, t)
}

// SetWriteDeadline implements net.Conn.
func (w *wire) SetWriteDeadline(t time.Time) error {
	return w.unlessInterrupted(w.Conn.SetWriteDeadline, t)
}

func (w *wire) unlessInterrupted(set func(time.Time) error, t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.interrupted {
		return nil
	}
	return set(t)
}

// ticketBox is the tls.ClientSessionCache of one connection: it offers at most
// one session and keeps all that come.
type ticketBox struct {
	mu      sync.Mutex
	offer   *tls.ClientSessionState // nil: none
	tickets []*tls.ClientSessionState
}

// Get implements tls.ClientSessionCache.
func (b *ticketBox) Get(string) (*tls.ClientSessionState, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.offer, b.offer != nil
}

// Put implements tls.ClientSessionCache.
func (b *ticketBox) Put(_ string, session *tls.ClientSessionState) {
	if session == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.tickets) < maxTickets {
		b.tickets = append(b.tickets, session)
	}
}

// maxTickets bounds the tickets of one connection that are kept.
const maxTickets = 32

func (b *ticketBox) came() []*tls.ClientSessionState {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]*tls.ClientSessionState(nil), b.tickets...)
}
