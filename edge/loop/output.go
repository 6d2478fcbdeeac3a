package loop

import (
	"encoding/binary"
	"time"
)

// Write sends p, later in the round, together with what else is written until
// then. It reports whether more is welcome: after false the handler should write
// nothing more until Writable. p is not kept, and should not exceed
// Config.HighWater. After CloseWrite or the end p goes nowhere.
func (c *Conn) Write(p []byte) (welcome bool) {
	if c.phase > open || c.mute || c.fin || c.writeErr != nil || c.moving != nil {
		return false
	}
	l := c.loop
	switch {
	case c.tls == nil:
		c.queue(p)
	case len(c.gather)+len(p) < maxPlaintext:
		c.gather = l.buffers.append(c.gather, p)
	default:
		c.writeRecords(p)
	}
	if c.phase == finished {
		return false
	}
	c.touch()
	l.account(c)
	if c.buffered() > 8*l.group.cfg.HighWater {
		c.finish(errFlooded, true)
		return false
	}
	c.full = c.full || c.buffered() >= c.mark() // until Writable is called
	return !c.full
}

// writeRecords encrypts full records and gathers the rest. What is full records itself
// goes as it is, after a shorter one with what was gathered, unless that is no more
// than what frames parts of a message: of a long message each further part would have
// to be gathered, too.
func (c *Conn) writeRecords(p []byte) {
	switch {
	case len(p)%maxPlaintext == 0 && len(c.gather) >= shortRecord:
		c.seal()
	case len(c.gather) > 0:
		n := min(maxPlaintext-len(c.gather), len(p))
		c.gather = c.loop.buffers.append(c.gather, p[:n])
		p = p[n:]
		c.seal()
	}
	whole := len(p) / maxPlaintext * maxPlaintext
	if whole > 0 && c.phase != finished {
		c.encrypt(p[:whole])
	}
	if len(p) > whole && c.phase != finished {
		c.gather = c.loop.buffers.append(c.gather, p[whole:])
	}
}

// mark is at how many bytes the handler is told to stop.
func (c *Conn) mark() int {
	cfg := &c.loop.group.cfg
	if c.loop.output > cfg.LoopOutput {
		return min(crowded, cfg.HighWater)
	}
	return cfg.HighWater
}

// Buffered is how many bytes of output the peer has not taken.
func (c *Conn) Buffered() int { return c.buffered() }

func (c *Conn) buffered() int { return len(c.gather) + c.pending }

// account tells the loop how much output the connection holds.
func (l *Loop) account(c *Conn) {
	now := c.buffered()
	l.output += now - c.counted
	c.counted = now
}

// touch has the connection flushed at the end of the round.
func (c *Conn) touch() {
	if !c.dirty && c.phase != finished {
		c.dirty = true
		c.loop.dirty = append(c.loop.dirty, c)
	}
}

// seal encrypts what was gathered.
func (c *Conn) seal() {
	if len(c.gather) == 0 {
		return
	}
	gathered := c.gather
	c.gather = nil
	c.encrypt(gathered)
	c.loop.buffers.take(gathered)
}

func (c *Conn) encrypt(p []byte) {
	if _, err := c.tls.Write(p); err != nil {
		c.finish(err, false) // crypto/tls has failed before, and said so when reading
	}
}

// sealed takes what TLS writes: records of the handler, and its own.
func (c *Conn) sealed(p []byte) (int, error) {
	if c.mute || c.writeErr != nil || c.phase == finished {
		return len(p), nil // nothing comes after close_notify, KeyUpdates included
	}
	c.queue(p)
	for rest := p; len(rest) >= recordHeader; c.stats.Records++ {
		rest = rest[min(recordHeader+int(binary.BigEndian.Uint16(rest[3:])), len(rest)):]
	}
	c.touch()
	return len(p), nil
}

// queue takes bytes for the source. Full chunks leave at once, if they can.
func (c *Conn) queue(p []byte) {
	b := &c.loop.buffers
	c.pending += len(p)
	for len(p) > 0 {
		tail := &c.out
		if last := len(c.backlog) - 1; last >= 0 {
			tail = &c.backlog[last]
		}
		n := min(len(p), writeSize-len(*tail))
		switch {
		case n == 0:
			c.backlog = append(c.backlog, nil)
			continue
		case *tail == nil && len(p) >= maxPlaintext:
			*tail = b.lend(writeSize) // there will be more
		}
		*tail = b.append(*tail, p[:n])
		p = p[n:]
	}
	for len(c.backlog) > 0 && !c.blocked && c.writeErr == nil {
		c.writeHead()
	}
}

const (
	recordHeader = 5
	// shortRecord is what is worth a record of its own.
	shortRecord = 64
)

// flush writes what there is.
func (c *Conn) flush() {
	if c.phase == finished {
		return
	}
	// What can't leave yet, or is surely followed by more, may become part of a larger
	// record.
	if !c.blocked && !(c.full && len(c.gather) <= c.mark()/4) {
		c.seal()
	}
	c.push()
	if c.phase == finished {
		return
	}
	c.loop.account(c)
	if c.full && c.buffered() <= c.mark()/4 {
		c.refill = true
		c.loop.enlist(c)
	}
	if c.buffered() == 0 && !c.source.busy() {
		c.flushed()
		return
	}
	c.reconsider()
}

// flushed goes on with what waited until all output was the kernel's.
func (c *Conn) flushed() {
	c.ending.Notified = c.notified && c.writeErr == nil
	if c.fin {
		c.fin = false
		c.source.shutdown()
	}
	if c.phase == closing && c.ending.FIN && !c.more {
		c.finish(nil, false)
		return
	}
	c.reconsider()
}

// push writes as much as the source takes.
func (c *Conn) push() {
	for c.pending > 0 && !c.blocked && c.writeErr == nil {
		c.writeHead()
	}
}

// writeHead makes one system call.
func (c *Conn) writeHead() {
	part := c.out[c.sent:]
	n, err := c.source.write(part)
	c.sent += n
	c.pending -= n
	c.stats.Out += int64(n)
	switch {
	case err != nil:
		c.writeFailed(err)
	case n < len(part):
		c.blocked = true
		c.fit()
	default:
		c.nextChunk()
	}
}

// fit moves a small rest to a small buffer: the peer may not take it for long.
func (c *Conn) fit() {
	if rest := c.out[c.sent:]; len(rest) <= cap(c.out)/4 && cap(c.out) > smallest {
		smaller := append(c.loop.buffers.lend(len(rest)), rest...)
		c.loop.buffers.take(c.out)
		c.out, c.sent = smaller, 0
	}
}

func (c *Conn) nextChunk() {
	c.loop.buffers.take(c.out)
	c.out, c.sent = nil, 0
	if len(c.backlog) == 0 {
		return
	}
	c.out = c.backlog[0]
	if c.backlog = c.backlog[:copy(c.backlog, c.backlog[1:])]; len(c.backlog) == 0 {
		c.backlog = nil
	}
}

// drop throws output away that never will be sent.
func (c *Conn) drop() {
	b := &c.loop.buffers
	b.take(c.gather)
	b.take(c.out)
	for _, chunk := range c.backlog {
		b.take(chunk)
	}
	c.gather, c.out, c.backlog, c.sent, c.pending = nil, nil, nil, 0, 0
}

// writeFailed gives output up. What the peer has sent before is still read: there may
// be an answer in it.
func (c *Conn) writeFailed(err error) {
	c.writeErr = err
	if wasReset(err) {
		c.ending.Reset = true
		c.peerWasFirst()
	}
	c.drop()
	c.awaitAnswer()
}

// awaitAnswer reads for a while what the peer has sent before a write failed.
func (c *Conn) awaitAnswer() {
	c.readable = true
	c.loop.enlist(c)
	if c.linger == nil { // else its end is bounded already
		c.within(alertTime, func() { c.finish(c.writeErr, false) })
	}
}

// within has end called, if the connection has not ended before.
func (c *Conn) within(d time.Duration, end func()) {
	if c.linger != nil {
		c.linger.Stop()
	}
	c.linger = c.loop.Timer(end)
	c.linger.Set(d)
}

// writable notes that the source takes something again.
func (c *Conn) writable() {
	c.blocked = false
	if c.buffered() > 0 || c.fin || c.phase == closing {
		c.touch()
	}
}

// CloseWrite says that nothing more will be written: by close_notify, or FIN if
// there is no TLS. The peer's bytes still come (RFC 8446 section 6.1).
func (c *Conn) CloseWrite() {
	if c.phase > open || c.mute || c.fin || c.moving != nil {
		return
	}
	if c.tls == nil {
		c.fin = true
	} else {
		c.notify()
	}
	c.touch()
}

// notify sends close_notify.
func (c *Conn) notify() {
	c.seal()
	if c.phase == finished || c.mute {
		return
	}
	c.notified = c.tls.CloseWrite() == nil
	c.mute = true
}

// Farewell is how Close ends a connection.
type Farewell struct {
	// Within bounds the end: until then output that the peer has not taken is
	// written, and the peer's end is waited for, so that no RST overtakes what was
	// sent. 0: what the kernel takes at once is sent, and nobody waits.
	Within time.Duration
	// FIN has FIN follow close_notify. Without, TCP is closed only after the peer
	// has, and TIME_WAIT stays with the peer.
	FIN bool
}

// Close ends the connection in order: what was written is sent, then close_notify,
// what the peer still sends is read and thrown away until it ends TCP, and then
// the socket is closed. The handler is told by Closed, and by nothing before.
func (c *Conn) Close(how Farewell) {
	if c.phase >= closing || c.moving != nil {
		return
	}
	c.phase = closing
	if c.tls != nil {
		c.notify()
	}
	if c.phase == finished {
		return
	}
	c.fin = c.fin || how.FIN
	if how.Within <= 0 {
		c.push()
		if c.phase != finished {
			c.ending.Notified = c.notified && c.buffered() == 0 && c.writeErr == nil
			c.finish(nil, false)
		}
		return
	}
	c.within(how.Within, func() {
		c.ending.TimedOut = true
		c.finish(nil, false)
	})
	c.touch()
	c.loop.enlist(c)
}

// Abort ends the connection by RST, which nobody takes for an end in order.
func (c *Conn) Abort() {
	if c.moving == nil {
		c.finish(errAborted, true)
	}
}

// Move takes the connection to another loop, at the end of the round, where it gets
// a new handler, whose Open is called. What was read and not delivered, and what was
// written and not sent, goes with it. The old handler hears nothing more of it, and
// must use neither it nor its timers. If the connection ends on its way only Closed
// of the new handler is called.
func (c *Conn) Move(to *Loop, h Handler) {
	if c.phase > open || c.moving != nil {
		return
	}
	c.moving, c.heir = to, h
	to.population.Add(1)
	c.loop.moving = append(c.loop.moving, c)
}
