package conn

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// socket is what stands beneath TLS where that is no TCP connection of the loop's
// own. It sees what is hidden otherwise: whether bytes went out, and whether an end of
// stream was a FIN or a close_notify.
type socket struct {
	net.Conn
	c          *Conn
	fin, reset atomic.Bool
}

// Read implements net.Conn.
func (s *socket) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	s.note(err)
	return n, err
}

// Write implements net.Conn.
func (s *socket) Write(p []byte) (int, error) {
	n, err := s.Conn.Write(p)
	if s.c.whole == nil {
		s.c.kept.Add(int64(len(p) - n))
	}
	s.note(err)
	return n, err
}

// CloseWrite sends FIN.
func (s *socket) CloseWrite() error {
	if half, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (s *socket) note(err error) {
	switch {
	case err == io.EOF && !s.reset.Load(): // after RST the kernel reports end of stream as well
		s.fin.Store(true)
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		s.reset.Store(true)
	}
}

// whole is a TLS connection whose peer may renegotiate, which crypto/tls can't do on
// a loop: goroutines read and write it, and the loop sees a connection without TLS.
type whole struct {
	exchange.TLSConn
	c        *Conn
	finished []byte // of the handshake; another one writes into it

	renegotiated   atomic.Bool
	notified, sent atomic.Bool // the peer's close_notify, and ours
	failed         atomic.Pointer[error]
	ended          chan loop.Ending // of capacity 1; what the loop knows of the end
}

// Read implements net.Conn.
func (w *whole) Read(p []byte) (n int, err error) {
	defer w.c.dialer.Guard.Caught("a read", &err)
	n, err = w.TLSConn.Read(p)
	switch {
	case err == nil:
		// Here no handshake is under way, for which ConnectionState would wait.
		w.renegotiated.Store(w.renegotiated.Load() || !bytes.Equal(w.finished, w.ConnectionState().TLSUnique))
		return n, nil
	case err == io.EOF && !w.c.socket.fin.Load():
		w.notified.Store(true)
	case err != io.EOF:
		explained := renegotiationError(err, true)
		w.failed.CompareAndSwap(nil, &explained)
	}
	return n, err
}

// Write implements net.Conn.
func (w *whole) Write(p []byte) (n int, err error) {
	defer func() { w.c.kept.Add(int64(len(p) - n)) }()
	defer w.c.dialer.Guard.Caught("a write", &err)
	return w.TLSConn.Write(p)
}

// CloseWrite sends close_notify.
func (w *whole) CloseWrite() (err error) {
	defer w.c.dialer.Guard.Caught("a close", &err)
	err = w.TLSConn.CloseWrite()
	w.sent.Store(err == nil)
	return err
}

// failure is what reading ended with, if that was no end in order.
func (w *whole) failure() error {
	if err := w.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// Close ends what is left, TCP: after the peer has ended it, if it is about to.
func (w *whole) Close() error {
	c := w.c
	if w.sent.Load() && w.notified.Load() {
		_ = c.socket.SetReadDeadline(time.Now().Add(c.owner.CloseTimeout()))
		drain(c.socket)
	}
	err := w.NetConn().Close() // whoever waits for a session learns of it
	end := <-w.ended
	end.Notified, end.PeerNotified = w.sent.Load(), w.notified.Load()
	end.FIN, end.Reset = c.socket.fin.Load(), c.socket.reset.Load()
	c.count(kindOf(end), end.ByPeer)
	return err
}
