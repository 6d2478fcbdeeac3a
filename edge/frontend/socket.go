package frontend

import (
	"context"
	"log/slog"
	"net"
	"sync/atomic"
	"time"
)

// socket accepts on one address for the slot that owns it at the time.
type socket struct {
	listener *net.TCPListener
	owner    atomic.Pointer[slot]
	woken    chan struct{} // holds a token after the owner changed
	closed   context.Context
	cancel   context.CancelFunc
	ended    chan struct{} // closed when accept has returned
}

func newSocket(listener *net.TCPListener) *socket {
	closed, cancel := context.WithCancel(context.Background())
	return &socket{listener: listener, woken: make(chan struct{}, 1), closed: closed, cancel: cancel, ended: make(chan struct{})}
}

// close ends accept.
func (s *socket) close() {
	s.cancel()
	_ = s.listener.Close() // frees the port in any case
}

// wake makes accept look at its owner again.
func (s *socket) wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// accept hands connections to the owner until the socket is closed. While the
// owner is full, connections wait in the kernel's accept queue.
func (s *socket) accept(logger *slog.Logger) {
	defer close(s.ended)
	var pause time.Duration
	for {
		if !s.owner.Load().gate.wait(s.woken, s.closed.Done()) {
			if s.closed.Err() != nil {
				return
			}
			continue
		}
		conn, err := s.listener.AcceptTCP()
		if err == nil {
			pause = 0
			s.owner.Load().take(conn) // which refuses it if the listener is gone
			continue
		}
		if s.closed.Err() != nil {
			return
		}
		// Out of descriptors or memory, or the client is gone already.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		logger.Warn("can't accept", "address", s.listener.Addr().String(), "error", err, "retry_in", pause)
		if !s.sleep(pause) {
			return
		}
	}
}

func (s *socket) sleep(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.closed.Done():
		return false
	}
}

// gate bounds the connections of a slot.
type gate struct {
	open    atomic.Int64
	max     atomic.Int64
	crowded atomic.Bool   // too many handshakes wait
	freed   chan struct{} // holds a token after a connection ended or a bound changed
}

func newGate() *gate { return &gate{freed: make(chan struct{}, 1)} }

// wait reports whether one more connection may come, and waits for that. It
// reports false when woken or closed fires first.
func (g *gate) wait(woken, closed <-chan struct{}) bool {
	waited := false
	for g.open.Load() >= g.max.Load() || g.crowded.Load() {
		select {
		case <-g.freed:
			waited = true
		case <-woken:
			return false
		case <-closed:
			return false
		}
	}
	if waited {
		g.signal() // this socket may have no client: let another try
	}
	return true
}

func (g *gate) enter() { g.open.Add(1) }

func (g *gate) leave() {
	g.open.Add(-1)
	g.signal()
}

func (g *gate) limit(connections int64) {
	g.max.Store(connections)
	g.signal()
}

// crowd keeps new connections out while too many handshakes wait.
func (g *gate) crowd(crowded bool) {
	g.crowded.Store(crowded)
	g.signal()
}

// signal wakes a waiter, which wakes the next: a slot may have several sockets.
func (g *gate) signal() {
	select {
	case g.freed <- struct{}{}:
	default:
	}
}
