package fleet

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// stalled is how long ports may wait while all workers do: these wait for slow
	// edges then, and another one comes.
	stalled = 5 * time.Millisecond
	// turn is how many messages a port sends before others have theirs.
	turn = 32
)

// sender sends what conversations have to say. Its few workers do that for all edges,
// so that none needs a goroutine, and a message to ten thousand no more memory than
// one to a few. An edge that does not read holds up one worker, which is replaced.
type sender struct {
	limit int

	mu      sync.Mutex
	queue   []*port
	workers int
	watched bool // a timer runs
	taken   int  // ports that were taken from the queue
}

func newSender() *sender { return &sender{limit: 8 * runtime.GOMAXPROCS(0)} }

func (s *sender) enqueue(p *port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue = append(s.queue, p)
	switch {
	case s.workers < s.limit:
		s.workers++
		go s.work()
	case !s.watched:
		s.watchLocked()
	}
}

// watchLocked adds a worker if nothing is taken from the queue for a while.
func (s *sender) watchLocked() {
	s.watched = true
	before := s.taken
	time.AfterFunc(stalled, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watched = false
		if len(s.queue) == 0 {
			return
		}
		if s.taken == before {
			s.workers++
			go s.work()
		}
		s.watchLocked()
	})
}

func (s *sender) work() {
	for p := s.take(); p != nil; p = s.take() {
		p.pump()
	}
}

// take returns the port that waits longest. Without any the worker ends.
func (s *sender) take() *port {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		s.queue = nil
		s.workers--
		return nil
	}
	p := s.queue[0]
	s.queue[0] = nil
	s.queue = s.queue[1:]
	s.taken++
	return p
}

// States of a port.
const (
	idle    int32 = iota
	queued        // a worker will look
	looking       // a worker looks
	again         // a worker looks, and must once more
)

// port is what lines share to send: a stream of gRPC. It sends one message at a time.
type port struct {
	sender *sender
	// send sends a message, or a piece of it: when there is more, the next call goes
	// on with that.
	send func(l *Line, message any) (more bool, err error)
	// ended does what the end of a line needs at once, without waiting. A worker calls
	// finish for it, unless that is nil.
	ended  func()
	finish func(l *Line)

	state atomic.Int32

	mu    sync.Mutex
	lines []*Line
}

func (p *port) schedule() {
	for {
		switch state := p.state.Load(); state {
		case idle:
			if p.state.CompareAndSwap(idle, queued) {
				p.sender.enqueue(p)
				return
			}
		case looking:
			if p.state.CompareAndSwap(looking, again) {
				return
			}
		default:
			return
		}
	}
}

// pump sends what the lines have to say, in turn.
func (p *port) pump() {
	p.state.Store(looking)
	for sent := 0; ; {
		n := p.round()
		if sent += n; n > 0 && sent < turn {
			continue
		}
		if n == 0 && p.state.CompareAndSwap(looking, idle) {
			return
		}
		if sent >= turn {
			p.state.Store(queued)
			p.sender.enqueue(p)
			return
		}
		p.state.Store(looking)
	}
}

// round sends at most one message of each line and returns how many it sent.
func (p *port) round() (sent int) {
	p.mu.Lock()
	lines := p.lines
	p.mu.Unlock()
	for _, l := range lines {
		if l.ended.Load() != nil {
			if p.finish != nil {
				p.finish(l)
			}
			continue
		}
		if !l.woken.Swap(false) {
			continue
		}
		if some, err := p.sendOf(l); err != nil {
			l.End(err)
		} else if some {
			l.woken.Store(true) // there may be more
			sent++
		}
	}
	return sent
}

// sendOf sends what comes next on a line. some is false when nothing does.
func (p *port) sendOf(l *Line) (some bool, err error) {
	if l.sending.Message == nil {
		if l.sending, err = l.next(); l.sending.Message == nil || err != nil {
			return false, err
		}
	}
	more, err := p.send(l, l.sending.Message)
	if more && err == nil {
		return true, nil
	}
	if l.sending.Sent != nil {
		l.sending.Sent(err == nil)
	}
	l.sending, l.rest = Outgoing{}, nil
	return true, err
}

// add and remove replace the list, so that a round needs no copy.
func (p *port) add(l *Line) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines = append(p.lines[:len(p.lines):len(p.lines)], l)
}

func (p *port) remove(l *Line) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var rest []*Line
	for _, other := range p.lines {
		if other != l {
			rest = append(rest, other)
		}
	}
	p.lines = rest
}
