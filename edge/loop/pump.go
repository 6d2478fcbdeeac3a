package loop

import (
	"net"
	"sync"
	"time"
)

const (
	// pumpSmall and pumpLarge are how much a pump reads at once, the latter while
	// much comes.
	pumpSmall = 4 << 10
	pumpLarge = 64 << 10
)

// pump makes a source of any net.Conn, by a goroutine that reads, one buffer
// ahead, and one for each write.
type pump struct {
	conn  net.Conn
	group *Group
	once  sync.Once
	want  chan struct{} // holds a token when the reader may read on
	done  chan struct{}

	mu       sync.Mutex
	loop     *Loop // that is told; nil while detached
	owner    *Conn
	came     []byte // read, not taken
	readErr  error
	reading  bool   // the reader has came
	out      []byte // being written
	writing  bool
	writeErr error
	fin      bool // send FIN when nothing is being written
	last     bool // close when nothing is being written
}

func newPump(g *Group, conn net.Conn) *pump {
	return &pump{conn: conn, group: g, want: make(chan struct{}, 1), done: make(chan struct{})}
}

func (p *pump) attach(c *Conn) error {
	p.mu.Lock()
	p.loop, p.owner = c.loop, c
	p.mu.Unlock()
	p.once.Do(func() {
		p.order()
		p.group.work.Go(p.run)
	})
	c.readable = true
	c.writable()
	c.loop.enlist(c)
	return nil
}

func (p *pump) detach() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.loop, p.owner = nil, nil
}

// deliver tells the connection what the goroutines have done, unless it has left
// the loop.
func (p *pump) deliver(l *Loop) {
	p.mu.Lock()
	c := p.owner
	if p.loop != l || c == nil {
		p.mu.Unlock()
		return
	}
	readable := len(p.came) > 0 || p.readErr != nil
	writable, failed := !p.writing, p.writeErr
	p.mu.Unlock()
	if readable {
		c.readable = true
	}
	if failed != nil && c.writeErr == nil {
		c.writeFailed(failed) // of what was taken before
	}
	if writable {
		c.writable()
	}
	l.enlist(c)
}

// tell has the loop look. mu is held.
func (p *pump) tell() {
	if p.loop != nil {
		p.loop.news(p)
	}
}

// order has the reader read on.
func (p *pump) order() {
	p.reading = true
	p.want <- struct{}{}
}

// run reads, each time that the loop has taken what came.
func (p *pump) run() {
	buffer := make([]byte, pumpSmall)
	for {
		select {
		case <-p.want:
		case <-p.done:
			return
		}
		n, err := p.conn.Read(buffer)
		p.mu.Lock()
		p.came, p.readErr, p.reading = buffer[:n], err, false
		p.tell()
		p.mu.Unlock()
		if err != nil {
			return
		}
		switch {
		case n == len(buffer) && n < pumpLarge:
			buffer = make([]byte, pumpLarge) // the other is the loop's for now
		case n < pumpSmall && len(buffer) > pumpSmall:
			buffer = make([]byte, pumpSmall)
		}
	}
}

func (p *pump) read(into []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reading {
		return 0, nil
	}
	n := copy(into, p.came)
	p.came = p.came[n:]
	switch {
	case len(p.came) > 0:
		return n, nil
	case p.readErr != nil:
		return n, p.readErr
	}
	p.came = nil
	p.order()
	return n, nil
}

func (p *pump) write(from []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.writeErr != nil || p.writing {
		return 0, p.writeErr
	}
	p.out = append(p.out[:0], from...)
	p.writing = true
	p.group.work.Go(p.flush)
	return len(from), nil
}

// flush writes what write took, and sends FIN when that is due.
func (p *pump) flush() {
	var err error
	if len(p.out) > 0 {
		_, err = p.conn.Write(p.out)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.fin && err == nil {
		p.fin = false
		p.mu.Unlock()
		if h, ok := p.conn.(half); ok {
			err = h.CloseWrite()
		}
		p.mu.Lock()
	}
	p.out = nil // an idle connection holds none
	p.writeErr, p.writing = err, false
	if p.last {
		_ = p.conn.Close()
	}
	p.tell()
}

func (p *pump) busy() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.writing
}

func (p *pump) shutdown() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fin = true
	if !p.writing && p.writeErr == nil {
		p.writing = true
		p.group.work.Go(p.flush)
	}
}

func (p *pump) close(reset bool) {
	close(p.done)
	if tcp, ok := p.conn.(*net.TCPConn); ok && reset {
		_ = tcp.SetLinger(0) // fails only on a closed connection
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.loop, p.owner = nil, nil
	if p.writing && !reset {
		// The kernel may take it without waiting, as it would have from a socket.
		p.last = true
		_ = p.conn.SetWriteDeadline(time.Now().Add(alertTime)) // fails only on a closed connection
		return
	}
	p.group.work.Go(func() { _ = p.conn.Close() }) // which may wait, if it speaks TLS itself
}
