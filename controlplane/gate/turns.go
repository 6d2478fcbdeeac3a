package gate

import "runtime"

// turns let as many handshakes compute at once as there are processors, each in its
// turn. So a fleet that comes back all at once is served at the rate at which that is
// possible, and the connections that there are, whose goroutines would stand in line
// behind thousands, hardly notice. Nobody holds a turn while it waits for a peer: those
// who say nothing hold up nobody.
type turns chan struct{}

func newTurns() turns { return make(turns, runtime.GOMAXPROCS(0)) }

func (t turns) take() { t <- struct{}{} }

func (t turns) give() { <-t }

// await waits for those who came before: connections that nobody could serve yet
// stay with the kernel.
func (t turns) await() {
	t.take()
	t.give()
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	if c.shaking {
		c.gate.turns.give()
		defer c.gate.turns.take()
	}
	return c.Conn.Write(p)
}

// handshake does a handshake in turns with others.
func (c *conn) handshake(do func()) {
	c.gate.turns.take()
	c.shaking = true
	defer func() {
		c.shaking = false
		c.gate.turns.give()
	}()
	do()
}
