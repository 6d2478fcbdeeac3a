package loop

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"
)

// HandshakesConfig configures Handshakes. It is read once, by NewHandshakes. The
// functions may be called by several goroutines at once, and must be quick.
type HandshakesConfig struct {
	// Computing is how many handshakes compute at once, so that what was established
	// before them has the rest of the processors. Default: half of them, at
	// least 1.
	Computing int
	// Limit is how many handshakes may be under way, those included that wait for
	// their clients. Default: 4,096.
	Limit int
	// Waiting is how many connections that have said hello may wait for their turn.
	// Beyond that the newest of the source with the most is refused. Default: 1,024.
	Waiting int
	// HelloTime bounds how long a client may take to say hello. Default: 10 s.
	HelloTime time.Duration
	// Ours reports whether a ticket or PSK that a client offers is one that will be
	// taken, as far as can be told quickly. Such handshakes go first, four for one.
	// Default: each ticket is.
	Ours func(ticket []byte) bool
	// Wait moves the gauge of connections that wait for their turn.
	Wait func(delta int)
	// Waited is told when one that had to wait begins, or is skipped since its client
	// has left.
	Waited func(d time.Duration)
	// Refused is told when one is refused.
	Refused func()
	// Crowded is told when as many wait as may, with true, and when half of them have
	// gone, with false: time to leave new connections in the accept queue
	// (Listener.Pause). It is called in order.
	Crowded func(bool)
}

// helloSize bounds what is read to find a ClientHello. What is larger is taken for
// one that offers no ticket.
const helloSize = 16 << 10

var (
	// ErrRefused is returned when too many handshakes wait.
	ErrRefused = errors.New("too many handshakes wait")
	// ErrLeft is returned when the client ended the connection before its turn came.
	ErrLeft = errors.New("the client has left before its handshake was begun")
)

// Handshakes bounds and orders TLS handshakes of servers: likely resumptions before
// full ones, sources in turn, and those whose clients have left not at all.
type Handshakes struct {
	cfg HandshakesConfig

	mu    sync.Mutex
	turns turns

	tell    sync.Mutex // Crowded is called in order
	crowded bool
}

// NewHandshakes makes Handshakes that run nothing of their own.
func NewHandshakes(cfg HandshakesConfig) *Handshakes {
	if cfg.Computing <= 0 {
		cfg.Computing = max(processors()/2, 1)
	}
	if cfg.Limit <= 0 {
		cfg.Limit = 4096
	}
	if cfg.Waiting <= 0 {
		cfg.Waiting = 1024
	}
	if cfg.HelloTime <= 0 {
		cfg.HelloTime = 10 * time.Second
	}
	if cfg.Ours == nil {
		cfg.Ours = func([]byte) bool { return true }
	}
	if cfg.Wait == nil {
		cfg.Wait = func(int) {}
	}
	if cfg.Waited == nil {
		cfg.Waited = func(time.Duration) {}
	}
	if cfg.Refused == nil {
		cfg.Refused = func() {}
	}
	if cfg.Crowded == nil {
		cfg.Crowded = func(bool) {}
	}
	return &Handshakes{cfg: cfg, turns: turns{maxComputing: cfg.Computing, maxBegun: cfg.Limit, maxWaiting: cfg.Waiting}}
}

// Do waits for the client's hello and then for its turn, and calls shake, which
// makes the handshake over wire and nothing else. source is whom others are not to
// suffer from, as an address or a prefix of it. Do returns what shake does, or, when
// it was not called, ErrRefused, ErrLeft or the error of reading the hello, which is
// a time-out after HelloTime. It leaves wire without a read deadline: shake sets its
// own. Whoever closes the connection meanwhile ends Do when its turn comes.
func (h *Handshakes) Do(wire *Wire, source netip.Addr, shake func() error) error {
	tickets, err := wire.hello(h.cfg.HelloTime)
	if err != nil {
		return err
	}
	t := &turn{source: source, likely: slices.ContainsFunc(tickets, h.cfg.Ours), goes: make(chan struct{}, 1), pool: h}
	waited, ok := h.enter(t)
	if !ok {
		return ErrRefused
	}
	defer h.done()
	if waited && wire.left() {
		return ErrLeft
	}
	wire.turn = t
	defer func() { wire.turn = nil }()
	return shake()
}

// enter waits for the turn, if it must, and reports false if it is refused.
func (h *Handshakes) enter(t *turn) (waited, ok bool) {
	h.mu.Lock()
	refused := h.turns.enter(t)
	if refused != nil {
		refused.bad = true
		refused.goes <- struct{}{}
	}
	h.start()
	h.mu.Unlock()
	if refused != nil {
		h.cfg.Refused()
	}
	h.tellCrowded()
	select {
	case <-t.goes:
		return false, !t.bad
	default:
	}
	begin := time.Now()
	h.cfg.Wait(1)
	<-t.goes
	h.cfg.Wait(-1)
	if !t.bad {
		h.cfg.Waited(time.Since(begin))
		h.tellCrowded()
	}
	return true, !t.bad
}

// start lets those compute that may. mu is held.
func (h *Handshakes) start() {
	for t := h.turns.next(); t != nil; t = h.turns.next() {
		t.goes <- struct{}{}
	}
}

func (h *Handshakes) done() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.turns.done()
	h.start()
}

// tellCrowded tells when the state has changed.
func (h *Handshakes) tellCrowded() {
	h.tell.Lock()
	defer h.tell.Unlock()
	h.mu.Lock()
	waiting := h.turns.waiting
	h.mu.Unlock()
	switch {
	case !h.crowded && waiting >= h.cfg.Waiting:
	case h.crowded && waiting <= h.cfg.Waiting/2:
	default:
		return
	}
	h.crowded = !h.crowded
	h.cfg.Crowded(h.crowded)
}

// rest lets others compute while the handshake waits for its client.
func (t *turn) rest() {
	h := t.pool
	h.mu.Lock()
	defer h.mu.Unlock()
	h.turns.rest()
	h.start()
}

// resume waits until the handshake may compute again.
func (t *turn) resume() {
	h := t.pool
	h.mu.Lock()
	h.turns.resume(t)
	h.start()
	h.mu.Unlock()
	<-t.goes
}

// hello reads ahead until the ClientHello is complete, and returns the tickets that
// it offers.
func (w *Wire) hello(within time.Duration) ([][]byte, error) {
	if err := w.Conn.SetReadDeadline(time.Now().Add(within)); err != nil {
		return nil, err
	}
	for {
		if tickets, complete := offered(w.ahead); complete || len(w.ahead) >= helloSize {
			return tickets, w.Conn.SetReadDeadline(time.Time{})
		}
		w.ahead = slices.Grow(w.ahead, 2<<10)
		n, err := w.Conn.Read(w.ahead[len(w.ahead):cap(w.ahead)])
		w.ahead = w.ahead[:len(w.ahead)+n]
		if err != nil && n == 0 {
			return nil, err
		}
	}
}

// left reports whether the peer has ended TCP, as far as the kernel can tell: not
// if it has sent something else before.
func (w *Wire) left() bool {
	sc, ok := w.Conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	left := false
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		left = err == nil && n == 0 || err != nil && err != syscall.EAGAIN && err != syscall.EINTR
	})
	return left || err != nil // closed here
}
