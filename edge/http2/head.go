package http2

import (
	"github.com/reseal/reseal/edge/exchange"
)

// block is a header block that comes in several frames.
type block struct {
	open   bool
	stream uint32
	end    bool // END_STREAM
	loop   bool // the stream depends on itself
	bytes  []byte
}

// headers takes HEADERS (RFC 9113 section 6.2).
func (c *Conn) headers(f frame, p []byte, ev *Event) error {
	if f.stream%2 == 0 {
		return c.fail(ProtocolError, "HEADERS on a stream that its sender can't open (RFC 9113 section 5.1.1)")
	}
	b := block{stream: f.stream, end: f.has(flagEndStream)}
	pad := 0
	if f.has(flagPadded) {
		if len(p) == 0 {
			return c.fail(FrameSizeError, "padded HEADERS without the length of its padding (RFC 9113 section 6.2)")
		}
		pad, p = int(p[0]), p[1:]
	}
	if f.has(flagPriority) {
		if len(p) < 5 {
			return c.fail(FrameSizeError, "HEADERS is too short for its priority (RFC 9113 section 6.2)")
		}
		b.loop = streamIn(p) == f.stream
		p = p[5:]
	}
	if pad > len(p) {
		return c.fail(ProtocolError, "HEADERS holds more padding than the frame is long (RFC 9113 section 6.2)")
	}
	p = p[:len(p)-pad]
	if f.has(flagEndHeaders) {
		return c.head(b, p, ev)
	}
	b.open, b.bytes = true, append([]byte(nil), p...)
	c.block = b
	return nil
}

// errLongBlock is the reason of a connection that ends for a header block that
// is too long to be decoded.
const errLongBlock = "a header block is too long (RFC 9113 section 10.5.1)"

// continuation takes CONTINUATION (RFC 9113 section 6.10). A block that takes so
// many frames that it costs all credit, or that is longer than any header that
// would be taken, ends the connection.
func (c *Conn) continuation(f frame, p []byte, ev *Event) error {
	if err := c.pay(); err != nil {
		return err
	}
	c.block.bytes = append(c.block.bytes, p...)
	if len(c.block.bytes) > 2*c.cfg.MaxHeaderBytes {
		return c.fail(EnhanceYourCalm, errLongBlock)
	}
	if !f.has(flagEndHeaders) {
		return nil
	}
	b := c.block
	c.block = block{}
	return c.head(b, b.bytes, ev)
}

// head takes a whole header block. It is decoded whatever becomes of it, since
// the table is the connection's.
func (c *Conn) head(b block, p []byte, ev *Event) error {
	if err := c.decoder.decode(p, &ev.heads, c.cfg.MaxHeaderBytes, c.cfg.MaxHeaderFields); err != nil {
		return c.fail(CompressionError, err.Error())
	}
	fresh := !c.client && b.stream > c.highest
	if fresh {
		c.highest = b.stream
	}
	s := c.live(b.stream)
	switch {
	case fresh && b.stream > c.leaveAt:
		c.graves.bury(b.stream, byUs) // the peer hasn't seen our GOAWAY yet
		return c.pay()
	case b.loop:
		return c.reject(b.stream, s, ProtocolError, "a stream that depends on itself (RFC 7540 section 5.3.1)", ev)
	case fresh:
		return c.newRequest(b, ev)
	case s == nil:
		return c.strayFrame(frame{kind: frameHeaders, stream: b.stream}, ev)
	case s.received:
		return c.reject(b.stream, s, StreamClosed, "HEADERS after the end of the message (RFC 9113 section 5.1)", ev)
	case c.client && !s.headed:
		return c.newResponse(b, s, ev)
	}
	return c.newTrailers(b, s, ev)
}

// newRequest opens a stream for a request.
func (c *Conn) newRequest(b block, ev *Event) error {
	if c.open >= c.cfg.MaxStreams {
		return c.reject(b.stream, nil, RefusedStream, "more streams than SETTINGS_MAX_CONCURRENT_STREAMS (RFC 9113 section 5.1.2)", ev)
	}
	if wrong := c.readRequest(b.end, ev); wrong != "" {
		return c.reject(b.stream, nil, ProtocolError, wrong, ev)
	}
	r := &ev.Request
	ev.Stream, ev.End = b.stream, b.end
	ev.Priority = c.priorityOf(b.stream, r.Fields.Get("priority"))
	s := c.newStream(b.stream)
	s.received, s.left = b.end, r.Length
	s.toHead, s.tunnel, s.refused = r.Method == "HEAD", r.Method == "CONNECT", ev.Kind == Refused
	c.served = b.stream
	return nil
}

func (c *Conn) newStream(id uint32) *stream {
	s := c.streams.add(id)
	s.window, s.sendWindow, s.began = c.cfg.StreamWindow, c.peer.window, c.epoch
	s.left, s.sendLeft = exchange.UnknownLength, exchange.UnknownLength
	c.open++
	return s
}

// maxInformational bounds the informational responses to a request.
const maxInformational = 100

// newResponse takes the head of a response.
func (c *Conn) newResponse(b block, s *stream, ev *Event) error {
	wrong := c.readResponse(b.end, s, ev)
	switch r := &ev.Response; {
	case wrong != "":
		return c.reject(b.stream, s, ProtocolError, wrong, ev)
	case r.Status >= 200:
		ev.Kind = Response
		s.headed, s.left, s.bodiless = true, r.Length, hasNoBody(s.toHead, r.Status)
		s.tunnel = s.tunnel && r.Status < 300
	case s.early == maxInformational:
		return c.reject(b.stream, s, EnhanceYourCalm, "more than 100 informational responses", ev)
	default:
		ev.Kind = Informational
		s.early++
	}
	if ev.Stream, ev.End = b.stream, b.end; b.end {
		c.endOf(s)
	}
	return nil
}

// hasNoBody reports whether a response has no content by its nature (RFC 9110
// section 6.4.1).
func hasNoBody(toHead bool, status int) bool {
	return toHead || status == 204 || status == 304 || status < 200
}

// newTrailers takes trailers (RFC 9113 section 8.1).
func (c *Conn) newTrailers(b block, s *stream, ev *Event) error {
	wrong := ""
	switch {
	case !b.end:
		wrong = "a second header section without the end of the message (RFC 9113 section 8.1)"
	case ev.heads.overflow != fits:
		wrong = "trailers are too large (RFC 9113 section 10.5.1)"
	case s.left > 0 && !s.bodiless:
		wrong = "the content has not the length that Content-Length says (RFC 9113 section 8.1.1)"
	case s.tunnel:
		wrong = "trailers in a tunnel (RFC 9113 section 8.5)"
	default:
		wrong = readTrailers(ev)
	}
	if wrong != "" {
		return c.reject(b.stream, s, ProtocolError, wrong, ev)
	}
	ev.Stream, ev.End = b.stream, true
	if ev.Kind = Trailers; s.refused {
		ev.clear()
	}
	c.endOf(s)
	return nil
}
