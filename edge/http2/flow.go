package http2

import "encoding/binary"

// Consumed gives the peer back the right to send n bytes that came as Data on a
// stream: the caller holds them no more. Bytes of a stream that was reset are
// given back by the reset.
func (c *Conn) Consumed(id uint32, n int) {
	s := c.streams.get(id)
	if s == nil {
		return
	}
	n = min(n, s.unconsumed)
	s.unconsumed -= n
	c.giveBack(n)
	switch {
	case s.over():
		if s.unconsumed == 0 {
			c.streams.remove(id)
		}
	case !s.received:
		c.grant(s, n)
	}
}

// grant gives bytes back to the window of a stream, like giveBack.
func (c *Conn) grant(s *stream, n int) {
	if s.owed += n; s.owed > 0 && (2*s.owed >= c.cfg.StreamWindow || s.owed >= s.window) {
		c.sendWindowUpdate(s.id, s.owed)
		s.window += s.owed
		s.owed = 0
	}
}

// giveBack gives bytes back to the window of the connection. It does so by
// halves of the window, since each update costs both sides a frame, or when the
// peer would have to wait before: most of the window may be held by others.
func (c *Conn) giveBack(n int) {
	if c.owed += n; c.owed > 0 && (2*c.owed >= c.cfg.ConnWindow || c.owed >= c.window) {
		c.sendWindowUpdate(0, c.owed)
		c.window += c.owed
		c.owed = 0
	}
}

// Unconsumed returns how many bytes of a stream the caller holds.
func (c *Conn) Unconsumed(id uint32) int {
	if s := c.streams.get(id); s != nil {
		return s.unconsumed
	}
	return 0
}

// Granted returns how many bytes of content the peer may send on a stream now. 0:
// it waits for the caller, on this stream or on others.
func (c *Conn) Granted(id uint32) int {
	s := c.live(id)
	if s == nil || s.received {
		return 0
	}
	return max(0, min(s.window, c.window))
}

// Writable returns how many bytes AppendData would send on a stream now, as far
// as flow control goes.
func (c *Conn) Writable(id uint32) int {
	s := c.live(id)
	if s == nil || s.sent {
		return 0
	}
	return max(0, min(s.sendWindow, c.sendWindow))
}

func (c *Conn) sendWindowUpdate(id uint32, n int) {
	c.pending = binary.BigEndian.AppendUint32(appendFrame(c.pending, frameWindowUpdate, 0, id, 4), uint32(n))
}
