package loop

import (
	"errors"
	"io"
	"syscall"
)

// Pause stops Data. What the peer sends stays with the kernel, which slows the peer
// down, up to one read that was made before. The peer's end is not noticed
// meanwhile.
func (c *Conn) Pause() { c.paused = true }

// Resume ends Pause. Data is called later, not from within Resume.
func (c *Conn) Resume() {
	c.paused = false
	c.reconsider()
}

// Paused reports whether Pause is in force.
func (c *Conn) Paused() bool { return c.paused }

// reconsider has the connection read if it may and there may be something.
func (c *Conn) reconsider() {
	if (c.more || c.readable) && c.mayRead() {
		c.loop.enlist(c)
	}
}

// mayRead reports whether something should be read.
func (c *Conn) mayRead() bool {
	switch {
	case c.phase == closing:
		return true // to be thrown away
	case c.phase != open || c.paused || c.moving != nil:
		return false
	case c.over:
		return c.watched && c.wire.end == nil
	}
	// Peers can cause output by what they send, as by KeyUpdate.
	return c.buffered() < 2*c.loop.group.cfg.HighWater
}

// read reads what there is, within the connection's share of the round.
func (c *Conn) read() {
	if c.more && c.mayRead() {
		c.deliver()
	}
	if c.readable && c.mayRead() {
		c.readOnce()
	}
	if c.phase == finished {
		return
	}
	if c.writeErr != nil && c.over {
		c.finish(c.writeErr, false) // what the peer had sent before is read
		return
	}
	c.reconsider()
}

// readOnce makes one system call and delivers what it brought.
func (c *Conn) readOnce() {
	l := c.loop
	n, err := c.source.read(l.in)
	c.stats.In += int64(n)
	l.share += n
	c.streams = c.streams || n > 0 && c.phase == closing
	if err != nil || n < len(l.in) {
		c.readable = false // a short read means that nothing is left
	}
	if err != nil {
		c.wire.end = err
		c.noteEnd(err)
	}
	if c.over { // only the end of TCP is waited for
		if err != nil {
			c.drained(err)
		}
		return
	}
	c.wire.input = l.in[:n]
	c.deliver()
}

// deliver decrypts what the Wire holds and hands it to the handler.
func (c *Conn) deliver() {
	c.more = true
	for c.more && c.mayRead() {
		p, err := c.decrypt()
		if len(p) > 0 && c.phase == open {
			c.handler.Data(c, p)
		}
		switch {
		case c.phase == finished:
			return
		case err == nil:
		case passing(err):
			c.more = false
		default:
			c.more = false
			c.inputEnded(err)
		}
	}
	c.keep()
}

// decrypt returns the next bytes, which stand in the loop's memory.
func (c *Conn) decrypt() ([]byte, error) {
	if c.tls != nil {
		n, err := c.tls.Read(c.loop.plain)
		return c.loop.plain[:n], err
	}
	n, err := c.wire.Read(c.loop.plain)
	return c.loop.plain[:n], err
}

// keep keeps what was not decrypted, if anything, since it stands in memory that is
// the loop's.
func (c *Conn) keep() {
	if c.phase == finished {
		return
	}
	l := c.loop
	switch {
	case len(c.wire.input) == 0 || c.over:
		l.buffers.take(c.stash)
		c.wire.input, c.stash = nil, nil
	case c.stash == nil:
		c.stash = append(l.buffers.lend(len(c.wire.input)), c.wire.input...)
		c.wire.input = c.stash
	}
}

// noteEnd notes how TCP ended.
func (c *Conn) noteEnd(err error) {
	switch {
	case err == io.EOF:
		c.ending.FIN = true
	case wasReset(err):
		c.ending.Reset = true
	}
}

func wasReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// inputEnded is what an error of decrypt that lasts means.
func (c *Conn) inputEnded(err error) {
	c.over = true
	notified := err == io.EOF && !c.wire.ended
	switch {
	case notified:
		c.ending.PeerNotified = true
	case c.wire.ended && c.wire.end == io.EOF: // also within a record
	case c.wire.ended:
		c.peerWasFirst()
		c.finish(c.wire.end, false)
		return
	default:
		c.broken(err)
		return
	}
	c.peerWasFirst()
	if c.phase == open {
		c.handler.PeerEnded(c, notified)
	}
	if c.phase == closing {
		c.touch() // this may have been what its end waited for
		if c.ending.FIN {
			return
		}
		c.loop.enlist(c)
	}
}

// peerWasFirst notes who began the end.
func (c *Conn) peerWasFirst() {
	if c.phase == open {
		c.ending.ByPeer = true
	}
}

// broken ends a connection whose TLS has failed. There may be an alert to send.
func (c *Conn) broken(err error) {
	c.mute = true
	if c.phase != open {
		return
	}
	c.ending.Err = err
	c.loop.buffers.take(c.gather)
	c.gather = nil
	c.ended() // there is nothing more that the handler could do
	c.Close(Farewell{Within: alertTime, FIN: true})
}

// Watch has the handler told by PeerEnded, once more and not notified, when FIN
// follows close_notify, as of a peer that has left and does not take more either. It
// reports whether FIN or RST has come already, which may have been read together with
// close_notify; then nothing more is told.
func (c *Conn) Watch() (left bool) {
	c.watched = true
	c.reconsider()
	return c.wire.end != nil
}

// drained ends the connection, the peer having ended TCP.
func (c *Conn) drained(err error) {
	if c.phase == open && err == io.EOF {
		c.handler.PeerEnded(c, false)
		return
	}
	if c.phase == closing && err == io.EOF {
		c.touch()
		return
	}
	c.finish(err, false)
}
