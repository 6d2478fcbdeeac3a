package http2

import "encoding/binary"

// Payloads of our PINGs.
const (
	keepalivePing = "reseal:k"
	shutdownPing  = "reseal:s"
)

// Shutdown tells the peer to open no more streams on this connection. A client's
// are still served that it opened before it knew (RFC 9113 section 6.8): the
// final GOAWAY follows when the client has answered a PING. A caller that doesn't
// want to wait for that calls GoAway.
func (c *Conn) Shutdown() {
	switch {
	case c.shutdown || c.leaving || c.failed != nil:
	case c.client:
		c.GoAway(NoError)
	default:
		c.shutdown = true
		c.sendGoAway(maxStream, NoError, "")
		c.pending = append(appendFrame(c.pending, framePing, 0, 0, len(shutdownPing)), shutdownPing...)
	}
}

// GoAway tells the peer that no stream is served but those that the caller knows.
// Those go on; the caller closes the connection when Open is 0.
func (c *Conn) GoAway(code Code) {
	if c.failed != nil {
		return
	}
	c.leaving, c.leaveAt = true, min(c.leaveAt, c.served)
	c.sendGoAway(c.leaveAt, code, "")
}

// Leaving reports whether this side has told the peer for good that it takes no
// more streams.
func (c *Conn) Leaving() bool { return c.leaving }

// Ping asks the peer to answer; a Pong event tells that it has.
func (c *Conn) Ping() {
	c.pinged++
	c.pending = append(appendFrame(c.pending, framePing, 0, 0, len(keepalivePing)), keepalivePing...)
}

func (c *Conn) sendGoAway(last uint32, code Code, debug string) {
	p := appendFrame(c.pending, frameGoAway, 0, 0, 8+len(debug))
	p = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(p, last), uint32(code))
	c.pending = append(p, debug...)
}
