package conn

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// wire is the socket beneath a tls.Conn. It sees what crypto/tls hides: whether
// an end of stream was a FIN or a close_notify, resets, and whether a request
// byte went out. It also caps the write deadline of 5 s that crypto/tls sets
// for close_notify.
type wire struct {
	net.Conn

	fin     atomic.Bool  // the peer sent FIN
	reset   atomic.Bool  // the peer sent RST
	written atomic.Int64 // bytes
	came    atomic.Int64 // bytes

	mu  sync.Mutex
	cap time.Time // no write deadline later than this, if set
}

// Read implements net.Conn.
func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.came.Add(int64(n))
	}
	if err != nil {
		w.note(err)
	}
	return n, err
}

// Write implements net.Conn.
func (w *wire) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	w.written.Add(int64(n))
	if err != nil {
		w.note(err)
	}
	return n, err
}

func (w *wire) note(err error) {
	switch {
	case err == io.EOF:
		if !w.reset.Load() { // after RST the kernel reports end of stream as well
			w.fin.Store(true)
		}
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		w.reset.Store(true)
	}
}

// SetDeadline implements net.Conn.
func (w *wire) SetDeadline(t time.Time) error {
	return errors.Join(w.SetReadDeadline(t), w.SetWriteDeadline(t))
}

// SetWriteDeadline implements net.Conn.
func (w *wire) SetWriteDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.cap.IsZero() && (t.IsZero() || t.After(w.cap)) {
		t = w.cap
	}
	return w.Conn.SetWriteDeadline(t)
}

// capWrites lets no Write, one under way included, last longer than t.
func (w *wire) capWrites(t time.Time) {
	w.mu.Lock()
	w.cap = t
	w.mu.Unlock()
	_ = w.SetWriteDeadline(t)
}

// interrupt makes a Read under way, and later ones, fail with a time-out.
func (w *wire) interrupt() { _ = w.Conn.SetReadDeadline(time.Unix(1, 0)) }

// pending reports whether bytes of the peer wait unread in the kernel. Closing
// the socket then makes the kernel send RST.
func (w *wire) pending() bool {
	sc, ok := w.Conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	waiting := false
	_ = raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		waiting = err == nil && n > 0
	})
	return waiting
}
