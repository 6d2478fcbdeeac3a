package frontend

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// guard is a client's HTTP/1.1 connection as net/http reads it. It follows the
// stream of messages more strictly than net/http does and lets nothing through
// that another parser could read as other messages. It keeps what net/http
// forgets: how the names of fields were written. And it lets a client that has
// only said that it will send no more wait for its answer.
//
// The head of a request that is refused is replaced by one that net/http takes,
// so that the refusal is answered in its turn, counted and logged like any other.
type guard struct {
	*tls.Conn
	client    *clientConn
	maxHead   int
	maxFields int
	headTime  time.Duration

	// Used by Read alone, which net/http never calls twice at a time.
	state  guardState
	body   exchange.Body
	held   []byte // came, not let through yet: an unfinished head or line, or what follows
	seen   int    // of held: searched for its end
	ready  []byte // may be let through
	failed error  // once the stream is broken

	mu       sync.Mutex
	heads    []requestHead // let through, not yet served
	deadline time.Time     // that net/http set
	headBy   time.Time     // by when an unfinished head must be there, or zero
	past     chan struct{} // closed while deadline is in the past
	pending  int           // requests let through whose handler has not ended
	broken   bool          // a body broke its framing
}

// requestHead is what is known of a request besides what net/http says.
type requestHead struct {
	exchange.Head
	refused int // status; 0: not refused
	reason  string
	err     error
}

type guardState int8

const (
	atHead     guardState = iota // a head, or the rest of one, comes next
	inBody                       // a body is under way
	undecided                    // a request asked for an upgrade and has no answer yet
	raw                          // not HTTP any more
	atRefusal                    // nothing more is read
	halfClosed                   // the client sends no more
)

var newline = []byte{'\n'}

// substitute is the head that stands in for one that is refused.
const substitute = "GET / HTTP/1.1\r\nHost: refused.invalid\r\n\r\n"

func newGuard(conn *tls.Conn, client *clientConn, with settings) *guard {
	return &guard{Conn: conn, client: client, maxHead: 2 * with.maxHeaderBytes, maxFields: with.maxHeaderFields, headTime: with.header, past: make(chan struct{})}
}

// Read implements net.Conn.
func (g *guard) Read(p []byte) (int, error) {
	for {
		if len(g.ready) > 0 {
			n := copy(p, g.ready)
			if g.ready = g.ready[n:]; len(g.ready) == 0 {
				g.ready = nil
			}
			return n, nil
		}
		if g.failed != nil {
			return 0, g.failed
		}
		if err := g.settle(); err != nil {
			return 0, err
		}
		if g.state == raw && len(g.held) == 0 {
			return g.Conn.Read(p)
		}
		if n, err := g.more(p); n > 0 || err != nil {
			return n, err
		}
	}
}

// settle waits in the states in which nothing may be let through for now.
func (g *guard) settle() error {
	switch {
	case g.state == undecided && g.busy():
		return g.wait()
	case g.state == undecided:
		g.state = atHead // there was no upgrade
	case g.state == atRefusal:
		return g.wait()
	case g.state == halfClosed && g.busy():
		return g.lookout()
	case g.state == halfClosed:
		return io.EOF
	}
	return nil
}

// more reads and lets through what may go. It returns nothing when the next
// round of Read has to go on.
func (g *guard) more(p []byte) (int, error) {
	if len(g.held) > 0 && g.seen < len(g.held) {
		data := g.held
		g.held = nil
		pass := g.admit(data, true)
		g.ready = append(pass[:len(pass):len(pass)], g.ready...) // behind it, a substitute
		return 0, nil
	}
	if len(g.held) == 0 {
		// The usual case: whole messages, which need no copy.
		n, err := g.Conn.Read(p)
		if n > 0 {
			return len(g.admit(p[:n], false)), nil
		}
		return 0, g.ended(err)
	}
	if cap(g.held)-len(g.held) < 512 {
		g.held = append(make([]byte, 0, 2*len(g.held)+4096), g.held...)
	}
	n, err := g.Conn.Read(g.held[len(g.held):cap(g.held)])
	if n == 0 {
		return 0, err
	}
	g.held = g.held[:len(g.held)+n]
	return 0, nil
}

// ended looks at an error of the connection. A client that sent close_notify,
// but not FIN, between two messages waits for its answer.
func (g *guard) ended(err error) error {
	if errors.Is(err, io.EOF) && g.state == atHead && len(g.held) == 0 && g.busy() && !g.client.peerClosed.Load() {
		g.state = halfClosed
		return nil
	}
	return err
}

// admit returns what of data, from its beginning, may be let through, and keeps
// the rest: as it is when the guard owns data, otherwise a copy.
func (g *guard) admit(data []byte, own bool) []byte {
	pass, from := 0, g.seen
	g.seen = 0
	for pass < len(data) && g.failed == nil {
		switch g.state {
		case raw:
			g.expectHead(false)
			return data
		case inBody:
			n, err := g.body.Advance(data[pass:])
			pass, from = pass+n, 0
			switch {
			case err != nil:
				g.breaks(err)
			case g.body.Over():
				g.state = atHead
			case pass < len(data): // the beginning of a line
				return g.hold(data, pass, own)
			}
		case atHead:
			end, err := exchange.EndOfHead(data[pass:], from)
			from = 0
			switch {
			case err != nil:
				return g.refuse(data[:pass], http.StatusBadRequest, "bad_request", err)
			case end == 0 && len(data)-pass > g.maxHead:
				return g.refuse(data[:pass], http.StatusRequestHeaderFieldsTooLarge, "header_too_large", nil)
			case end == 0:
				return g.hold(data, pass, own)
			case end == 2: // an empty line before a request (RFC 9112 section 2.2)
				g.keep(data[pass+2:], own)
				return data[:pass]
			case bytes.Count(data[pass:pass+end], newline)-2 > g.maxFields:
				// Before anybody parses it: parsed fields cost many times their bytes.
				return g.refuse(data[:pass], http.StatusRequestHeaderFieldsTooLarge, "too_many_fields", nil)
			}
			head, err := exchange.CheckHead(data[pass:pass+end], true)
			switch {
			case errors.Is(err, exchange.ErrCoding):
				return g.refuse(data[:pass], http.StatusNotImplemented, "bad_request", err)
			case err != nil:
				return g.refuse(data[:pass], http.StatusBadRequest, "bad_request", err)
			}
			g.begin(head)
			pass += end
		default:
			return g.hold(data, pass, own)
		}
	}
	return data[:pass]
}

// begin lets a head through.
func (g *guard) begin(head exchange.Head) {
	g.expectHead(false)
	g.body = exchange.NewBody(head.Framing)
	switch {
	case !g.body.Over():
		g.state = inBody
	case head.Upgrade:
		g.state = undecided
	default:
		g.state = atHead
	}
	g.push(requestHead{Head: head})
}

// breaks ends the stream in the middle of a body.
func (g *guard) breaks(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.failed, g.broken = err, true
}

// isBroken reports whether the client broke the framing of a body.
func (g *guard) isBroken() bool {
	if g == nil {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.broken
}

func (g *guard) keep(rest []byte, own bool) {
	if !own {
		rest = append([]byte(nil), rest...)
	}
	g.held = rest
}

// hold keeps what may not be let through yet.
func (g *guard) hold(data []byte, pass int, own bool) []byte {
	g.keep(data[pass:], own)
	if g.state == atHead || g.state == inBody {
		g.seen = len(g.held)
		g.expectHead(g.state == atHead)
	}
	return data[:pass]
}

// refuse puts a head in the place of a bad one. Nothing is read after it.
func (g *guard) refuse(good []byte, status int, reason string, err error) []byte {
	g.expectHead(false)
	g.state, g.held = atRefusal, nil
	g.push(requestHead{refused: status, reason: reason, err: err})
	// The good part may lie in the caller's buffer, and so must what is returned.
	g.ready = append(g.ready, substitute...)
	return good
}

func (g *guard) push(head requestHead) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.heads = append(g.heads, head)
	g.pending++
}

// serve returns the head of the request that a handler begins to serve.
func (g *guard) serve() requestHead {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.heads) == 0 {
		return requestHead{}
	}
	head := g.heads[0]
	g.heads = g.heads[1:]
	return head
}

// served notes that the handler has ended. net/http has no Read under way then
// that would go on.
func (g *guard) served() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pending--
}

func (g *guard) busy() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.pending > 0
}

// hijacked lets everything through from now on. No Read is under way.
func (g *guard) hijacked() { g.state = raw }

// wait blocks until net/http ends the Read.
func (g *guard) wait() error {
	g.mu.Lock()
	past := g.past
	g.mu.Unlock()
	select {
	case <-past:
		return errReadAborted
	case <-g.client.gone:
		return io.EOF
	}
}

// lookout waits for what comes after close_notify: the end of TCP.
func (g *guard) lookout() error {
	var scratch [64]byte
	for {
		if _, err := g.client.Read(scratch[:]); err != nil {
			return err
		}
	}
}

// errReadAborted is what a Read returns whose deadline has passed.
var errReadAborted abortedRead = "the deadline has passed"

type abortedRead string

// Error implements error.
func (e abortedRead) Error() string { return string(e) }

// Timeout implements net.Error.
func (e abortedRead) Timeout() bool { return true }

// Temporary implements net.Error.
func (e abortedRead) Temporary() bool { return true }

// expectHead starts or ends the time that a head may take, from its first byte
// (listener's timeouts.header): net/http counts it only once it has got four
// bytes.
func (g *guard) expectHead(begun bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case begun && g.headBy.IsZero():
		g.headBy = time.Now().Add(g.headTime)
	case !begun && !g.headBy.IsZero():
		g.headBy = time.Time{}
	default:
		return
	}
	g.setDeadline()
}

// setDeadline sets the earlier deadline. g.mu is held.
func (g *guard) setDeadline() {
	first := g.deadline
	if !g.headBy.IsZero() && (first.IsZero() || g.headBy.Before(first)) {
		first = g.headBy
	}
	_ = g.Conn.SetReadDeadline(first) // fails only on a closed connection
}

// SetReadDeadline implements net.Conn.
func (g *guard) SetReadDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deadline = t
	past := !t.IsZero() && !t.After(time.Now())
	select {
	case <-g.past:
		if !past {
			g.past = make(chan struct{})
		}
	default:
		if past {
			close(g.past)
		}
	}
	g.setDeadline()
	return nil
}

// SetDeadline implements net.Conn.
func (g *guard) SetDeadline(t time.Time) error {
	_ = g.SetReadDeadline(t)
	return g.Conn.SetWriteDeadline(t)
}
