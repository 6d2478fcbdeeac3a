package frontend

import (
	"crypto/tls"
	"fmt"
	"maps"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/loop"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// slot is a listener by name, for as long as it is configured.
type slot struct {
	name     string
	frontend *Frontend
	counters Counters
	gate     *gate
	state    atomic.Pointer[state]
	// hello is what handshakes begin with. Tickets are off in it, since the keys
	// that crypto/tls would make for it are not used.
	hello *tls.Config

	handshakes atomic.Pointer[loop.Handshakes]

	mu    sync.Mutex
	conns map[*clientConn]struct{}
	ended bool // takes no new ones
}

func newSlot(f *Frontend, name string) *slot {
	s := &slot{
		name:     name,
		frontend: f,
		counters: f.cfg.Counters(name),
		gate:     newGate(),
		conns:    map[*clientConn]struct{}{},
	}
	s.hello = &tls.Config{SessionTicketsDisabled: true, GetConfigForClient: s.configForClient}
	return s
}

// settings are what requests and connections go by. Bounds of headers, streams and
// handshakes are those of when a connection began.
type settings struct {
	protocol             resealv1.Listener_Protocol
	maxHeaderBytes       int
	maxHeaderFields      int
	maxConcurrentStreams int
	header, idle         time.Duration
}

func (s *settings) http() bool { return s.protocol != resealv1.Listener_PROTOCOL_TLS }

func newSettings(spec *resealv1.Listener) settings {
	return settings{
		protocol:             spec.GetProtocol(),
		maxHeaderBytes:       int(spec.GetLimits().GetMaxHeaderBytes()),
		maxHeaderFields:      int(spec.GetLimits().GetMaxHeaderFields()),
		maxConcurrentStreams: int(spec.GetLimits().GetMaxConcurrentStreams()),
		header:               spec.GetTimeouts().GetHeader().AsDuration(),
		idle:                 spec.GetTimeouts().GetIdle().AsDuration(),
	}
}

// update puts next in force.
func (s *slot) update(next *state) {
	before := s.state.Swap(next)
	s.gate.limit(int64(next.Spec.GetLimits().GetMaxConnections()))
	s.limitHandshakes(before, next)
	switch {
	case before == nil:
	case before.settings.protocol != next.settings.protocol:
		s.drain(s.drainTimeout())
	case before.PolicyKey != next.PolicyKey:
		s.frontend.spawn("clients were dismissed", func() { s.dismiss(next) })
	}
}

// end drains the slot, which gets no new connections any more.
func (s *slot) end() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.drain(s.drainTimeout())
}

func (s *slot) drainTimeout() time.Duration {
	return s.state.Load().Spec.GetTimeouts().GetDrain().AsDuration()
}

// add reports false when there is to be no new connection.
func (s *slot) add(c *clientConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.conns[c] = struct{}{}
	}
	return !s.ended
}

func (s *slot) forget(c *clientConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// connections are all that are open.
func (s *slot) connections() []*clientConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.conns))
}

// take serves an accepted connection.
func (s *slot) take(conn *net.TCPConn) {
	s.gate.enter()
	reckoned := false
	defer func() {
		if bug := recover(); bug != nil {
			s.panicked("an accepted connection", bug)
			if reckoned {
				s.frontend.memory.give(connectionBytes)
			}
			s.gate.leave()
			_ = conn.Close()
		}
	}()
	admitted := s.frontend.memory.take(connectionBytes, forConnection)
	if !admitted && (!s.state.Load().settings.http() || !s.frontend.memory.take(connectionBytes, forRefusal)) {
		s.counters.Error("memory_limit")
		s.gate.leave()
		_ = conn.Close()
		return
	}
	reckoned = true
	c := newClientConn(s, conn)
	c.refused = !admitted
	if !s.add(c) {
		_ = conn.Close() // the listener was removed a moment ago
		c.over(false)
		return
	}
	s.frontend.crew.do(func() {
		defer func() {
			if bug := recover(); bug != nil {
				s.panicked("a handshake", bug)
				_ = conn.Close()
				c.over(false)
			}
		}()
		s.serve(c)
	})
}

// panicked counts and logs a panic while serving what.
func (s *slot) panicked(what string, bug any) {
	s.counters.Error("internal")
	s.frontend.cfg.Logger.Error("panic while serving "+what, "listener", s.name, "panic", fmt.Sprint(bug), "stack", string(debug.Stack()))
}
