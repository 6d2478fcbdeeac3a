package loop

import "sync"

// places are what events of an epoll name, with the generation of the place: an event
// of a socket that was closed in the same round is not its successor's.
type places struct {
	mu   sync.Mutex // sockets come from any goroutine
	all  []place
	free []int32
}

type place struct {
	generation int32
	socket     *socket // nil: free
}

func (p *places) enter(s *socket) (at, generation int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.free) == 0 {
		p.all = append(p.all, place{})
		p.free = append(p.free, int32(len(p.all)-1))
	}
	last := len(p.free) - 1
	at = p.free[last]
	p.free = p.free[:last]
	p.all[at].socket = s
	return at, p.all[at].generation
}

// find returns nil for an event that came too late.
func (p *places) find(at, generation int32) *socket {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all[at].generation != generation {
		return nil
	}
	return p.all[at].socket
}

func (p *places) leave(at int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all[at].generation++
	p.all[at].socket = nil
	p.free = append(p.free, at)
}

// fresh are the sockets that have not joined the loop.
func (p *places) fresh() (all []*fresh) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, at := range p.all {
		if at.socket != nil && at.socket.fresh != nil {
			all = append(all, at.socket.fresh)
		}
	}
	return all
}
