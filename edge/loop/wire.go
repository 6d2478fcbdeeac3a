package loop

import (
	"errors"
	"net"
	"time"
)

// Wire is the connection beneath TLS. Until the connection joins a loop it is the
// net.Conn that it wraps, blocking and with deadlines; from then on it is memory
// that the loop fills and empties, deadlines have no effect, and the net.Conn is
// the loop's. What stands between it and TLS (to count bytes, for example) must
// pass errors on as they are and hold back nothing that it has read.
type Wire struct {
	net.Conn // until the connection joins a loop

	ahead         []byte // read before, and to be read first
	turn          *turn  // in which the handshake is made; or nil
	local, remote net.Addr

	conn  *Conn  // of which this is the memory; nil until then
	input []byte // to be read
	end   error  // to be returned after input; nil: more may come
	ended bool   // it was returned
}

// NewWire wraps a connection. Nothing else may read from or write to conn then.
func NewWire(conn net.Conn) *Wire {
	return &Wire{Conn: conn, local: conn.LocalAddr(), remote: conn.RemoteAddr()}
}

// Unread puts a copy of p in front of what is read next. It is for what stands in
// front of TLS, like a PROXY header, and has been read with more behind it.
func (w *Wire) Unread(p []byte) { w.ahead = append(append([]byte(nil), p...), w.ahead...) }

// Ahead is how many bytes of the peer were read and wait to be read again, as those
// of a hello that has not come as a whole.
func (w *Wire) Ahead() int { return len(w.ahead) }

// errAgain is what Read returns when there is nothing to read for now. crypto/tls
// takes an error as passing by Temporary; abbreviated.Conn does by Timeout.
var errAgain error = again{}

type again struct{}

func (again) Error() string   { return "nothing to read for now" }
func (again) Timeout() bool   { return true }
func (again) Temporary() bool { return true }

// Read implements net.Conn.
func (w *Wire) Read(p []byte) (int, error) {
	switch {
	case len(w.ahead) > 0:
		n := copy(p, w.ahead)
		if w.ahead = w.ahead[n:]; len(w.ahead) == 0 {
			w.ahead = nil
		}
		return n, nil
	case w.conn == nil:
		return w.receive(p)
	case len(w.input) > 0:
		n := copy(p, w.input)
		w.input = w.input[n:]
		return n, nil
	case w.end != nil:
		w.ended = true
		return 0, w.end
	}
	return 0, errAgain
}

// receive reads during a handshake, which lets others have its turn meanwhile.
func (w *Wire) receive(p []byte) (int, error) {
	if w.turn != nil {
		w.turn.rest()
		defer w.turn.resume()
	}
	return w.Conn.Read(p)
}

// Write implements net.Conn.
func (w *Wire) Write(p []byte) (int, error) {
	if w.conn != nil {
		return w.conn.sealed(p)
	}
	if w.turn != nil {
		w.turn.rest() // the client may not read
		defer w.turn.resume()
	}
	return w.Conn.Write(p)
}

// Close implements net.Conn. Once the connection is a loop's it ends it, and may
// be called on the loop alone.
func (w *Wire) Close() error {
	if w.conn == nil {
		return w.Conn.Close()
	}
	w.conn.finish(net.ErrClosed, false)
	return nil
}

// LocalAddr implements net.Conn.
func (w *Wire) LocalAddr() net.Addr { return w.local }

// RemoteAddr implements net.Conn.
func (w *Wire) RemoteAddr() net.Addr { return w.remote }

// SetDeadline implements net.Conn.
func (w *Wire) SetDeadline(t time.Time) error { return w.deadline(net.Conn.SetDeadline, t) }

// SetReadDeadline implements net.Conn.
func (w *Wire) SetReadDeadline(t time.Time) error { return w.deadline(net.Conn.SetReadDeadline, t) }

// SetWriteDeadline implements net.Conn.
func (w *Wire) SetWriteDeadline(t time.Time) error { return w.deadline(net.Conn.SetWriteDeadline, t) }

// deadline sets a deadline. In memory nothing waits, so there is none to set:
// crypto/tls does with each close_notify.
func (w *Wire) deadline(set func(net.Conn, time.Time) error, t time.Time) error {
	if w.conn != nil {
		return nil
	}
	return set(w.Conn, t)
}

// passing reports whether an error of a read only says that there is nothing now.
func passing(err error) bool {
	return errors.Is(err, errAgain)
}
