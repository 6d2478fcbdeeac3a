package frontend

import (
	"crypto/tls"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
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

	mu      sync.Mutex
	current *generation              // gets new connections, nil after end
	retired map[*generation]struct{} // serve connections that they have
}

func newSlot(f *Frontend, name string) *slot {
	s := &slot{
		name:     name,
		frontend: f,
		counters: f.cfg.Counters(name),
		gate:     newGate(),
		retired:  map[*generation]struct{}{},
	}
	s.hello = &tls.Config{SessionTicketsDisabled: true, GetConfigForClient: s.configForClient}
	return s
}

// settings are what a running server can't change.
type settings struct {
	protocol             resealv1.Listener_Protocol
	maxHeaderBytes       int
	maxHeaderFields      int
	maxConcurrentStreams int
	header, idle         time.Duration
}

func (s settings) http() bool { return s.protocol != resealv1.Listener_PROTOCOL_TLS }

func (s *state) settings() settings {
	return settings{
		protocol:             s.Spec.GetProtocol(),
		maxHeaderBytes:       int(s.Spec.GetLimits().GetMaxHeaderBytes()),
		maxHeaderFields:      int(s.Spec.GetLimits().GetMaxHeaderFields()),
		maxConcurrentStreams: int(s.Spec.GetLimits().GetMaxConcurrentStreams()),
		header:               s.Spec.GetTimeouts().GetHeader().AsDuration(),
		idle:                 s.Spec.GetTimeouts().GetIdle().AsDuration(),
	}
}

// update puts next in force. It returns a generation that must drain, or nil.
func (s *slot) update(next *state) (drain *generation) {
	if before := s.state.Swap(next); before != nil && before.PolicyKey != next.PolicyKey {
		s.frontend.work.Go(func() { s.dismiss(next) })
	}
	s.gate.limit(int64(next.Spec.GetLimits().GetMaxConnections()))
	s.mu.Lock()
	old, want := s.current, next.settings()
	same := old != nil && old.settings == want
	s.mu.Unlock()
	switch {
	case same:
		return nil
	case old == nil:
		s.renew()
		return nil
	}
	s.renew()
	if old.settings.protocol != want.protocol {
		return old
	}
	old.retire()
	return nil
}

// renew gives new connections a new generation and returns the one before,
// which the caller must retire or drain.
func (s *slot) renew() *generation {
	next := newGeneration(s, s.state.Load().settings(), s.frontend.draining.Load())
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.current
	s.current = next
	if old != nil {
		s.retired[old] = struct{}{}
	}
	return old
}

// renewAll is renew, but returns all generations before the new one, which the
// caller must drain.
func (s *slot) renewAll() []*generation {
	s.renew()
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.retired))
}

// end returns all generations, which the caller must drain. There will be no
// new one.
func (s *slot) end() []*generation {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := slices.Collect(maps.Keys(s.retired))
	if s.current != nil {
		all = append(all, s.current)
		s.retired[s.current] = struct{}{}
		s.current = nil
	}
	return all
}

// emptied forgets a retired generation.
func (s *slot) emptied(g *generation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.retired, g)
}

func (s *slot) drainTimeout() time.Duration {
	return s.state.Load().Spec.GetTimeouts().GetDrain().AsDuration()
}

// join adds a connection to the newest generation, or reports that there is
// none any more.
func (s *slot) join(c *clientConn) (*generation, bool) {
	for {
		s.mu.Lock()
		current := s.current
		s.mu.Unlock()
		if current == nil {
			return nil, false
		}
		if current.add(c) {
			return current, true
		}
	}
}

// answered counts a finished request, or a finished connection of protocol tls.
func (s *slot) answered(code int, reused bool, d time.Duration) {
	s.counters.Add(exchange.Answers.At(code), 1)
	s.counters.Request(reused, d)
}

// take serves an accepted connection.
func (s *slot) take(conn *net.TCPConn) {
	admitted := s.frontend.memory.take(connectionBytes, forConnection)
	if !admitted && (!s.state.Load().settings().http() || !s.frontend.memory.take(connectionBytes, forRefusal)) {
		s.counters.Error("memory_limit")
		_ = conn.Close()
		return
	}
	s.gate.enter()
	client := newClientConn(s, conn)
	client.refused = !admitted
	if _, ok := s.join(client); !ok {
		_ = client.Close() // the listener was removed a moment ago
		return
	}
	s.frontend.work.Go(func() {
		defer func() {
			if bug := recover(); bug != nil {
				s.panicked("a connection", bug)
				_ = client.Close()
			}
		}()
		s.serve(client)
	})
}
