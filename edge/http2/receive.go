package http2

import (
	"encoding/binary"

	"github.com/reseal/reseal/edge/exchange"
)

// dataFrame is the DATA frame that is under way.
type dataFrame struct {
	stream uint32
	left   int // content that has yet to come
	pad    int // padding behind it
	end    bool
	drop   bool
}

func streamIn(p []byte) uint32 { return binary.BigEndian.Uint32(p) & maxStream }

// beginData takes the head of a DATA frame (RFC 9113 section 6.1). in is what has
// come behind the head. The whole frame counts for flow control, its content
// until it is consumed.
func (c *Conn) beginData(f frame, in []byte, ev *Event) (int, error) {
	used, pad := frameHeadLen, 0
	if f.has(flagPadded) {
		if f.length == 0 {
			return 0, c.fail(FrameSizeError, "padded DATA without the length of its padding (RFC 9113 section 6.1)")
		}
		if len(in) == 0 {
			return 0, nil
		}
		used, pad = used+1, int(in[0])
		if pad >= f.length {
			return 0, c.fail(ProtocolError, "DATA holds more padding than the frame is long (RFC 9113 section 6.1)")
		}
	}
	content := frameHeadLen + f.length - used - pad
	if f.length > c.window {
		return 0, c.fail(FlowControlError, "DATA goes beyond the window of the connection (RFC 9113 section 6.9.1)")
	}
	c.window -= f.length
	c.data = dataFrame{stream: f.stream, left: content, pad: pad, end: f.has(flagEndStream)}
	overhead := f.length - content
	c.giveBack(overhead)
	if content == 0 && !c.data.end {
		if err := c.pay(); err != nil {
			return used, err
		}
	}
	s := c.live(f.stream)
	if s == nil {
		c.data.drop = true
		return used, c.strayFrame(f, ev)
	}
	if err := c.bookData(f, s, content, ev); err != nil || ev.Kind != None {
		c.data.drop = true
		return used, err
	}
	c.grant(s, overhead)
	if content == 0 && c.data.end {
		if !s.refused {
			ev.Kind, ev.Stream, ev.End = Data, f.stream, true
		}
		c.endOf(s)
	}
	return used, nil
}

// bookData checks DATA against the state, the window and the Content-Length of
// its stream.
func (c *Conn) bookData(f frame, s *stream, content int, ev *Event) error {
	switch {
	case s.received:
		return c.reject(f.stream, s, StreamClosed, "DATA after the end of the message (RFC 9113 section 5.1)", ev)
	case c.client && !s.headed:
		return c.reject(f.stream, s, ProtocolError, "DATA before the head of the response (RFC 9113 section 8.1)", ev)
	case f.length > s.window+c.slack:
		return c.reject(f.stream, s, FlowControlError, "DATA goes beyond the window of the stream (RFC 9113 section 6.9.1)", ev)
	case s.bodiless && content > 0:
		return c.reject(f.stream, s, ProtocolError, "DATA in a response that has no content (RFC 9110 section 6.4.1)", ev)
	}
	s.window -= f.length
	if s.left == exchange.UnknownLength || s.bodiless {
		return nil
	}
	s.left -= int64(content)
	if s.left < 0 || s.left > 0 && c.data.end {
		return c.reject(f.stream, s, ProtocolError, "the content has not the length that Content-Length says (RFC 9113 section 8.1.1)", ev)
	}
	return nil
}

// payload passes on what has come of a DATA frame.
func (c *Conn) payload(in []byte, ev *Event) int {
	if c.data.left == 0 {
		n := min(len(in), c.data.pad)
		c.data.pad -= n
		return n
	}
	n := min(len(in), c.data.left)
	if n == 0 {
		return 0
	}
	c.data.left -= n
	s := c.live(c.data.stream)
	if s == nil || c.data.drop || s.refused {
		c.giveBack(n)
	} else {
		s.unconsumed += n
		ev.Kind, ev.Stream, ev.Data, ev.End = Data, s.id, in[:n], c.data.left == 0 && c.data.end
	}
	if s != nil && !c.data.drop && c.data.left == 0 && c.data.end {
		c.endOf(s)
	}
	return n
}

// endOf notes the peer's END_STREAM.
func (c *Conn) endOf(s *stream) {
	s.received = true
	c.finish(s)
}

// finish closes a stream that both sides have ended.
func (c *Conn) finish(s *stream) {
	if s.over() {
		c.close(s, byEnd)
		c.earn(1)
	}
}

// strayFrame judges DATA or HEADERS on a stream that is not open (RFC 9113
// section 5.1).
func (c *Conn) strayFrame(f frame, ev *Event) error {
	if c.idle(f.stream) {
		return c.fail(ProtocolError, "a frame on a stream that is not open (RFC 9113 section 5.1)")
	}
	switch c.graves.find(f.stream) {
	case byUs:
		if f.kind == frameHeaders {
			return c.pay()
		}
		return nil // the peer didn't know
	case byEnd:
		return c.fail(StreamClosed, "a frame on a stream that has ended (RFC 9113 section 5.1)")
	case byPeer:
		return c.reject(f.stream, nil, StreamClosed, "a frame on a stream that the peer has reset (RFC 9113 section 5.1)", ev)
	}
	if f.stream > c.graves.forgotten {
		return c.fail(ProtocolError, "a frame on a stream that was passed over (RFC 9113 section 5.1.1)")
	}
	return c.pay()
}

// priority takes PRIORITY, which means nothing any more (RFC 9113 section 5.3.2).
func (c *Conn) priority(f frame, p []byte, ev *Event) error {
	if err := c.pay(); err != nil {
		return err
	}
	s, reason, code := c.live(f.stream), "a stream that depends on itself (RFC 7540 section 5.3.1)", ProtocolError
	switch {
	case f.length != 5:
		reason, code = "PRIORITY is not 5 bytes long (RFC 9113 section 6.3)", FrameSizeError
	case streamIn(p) != f.stream:
		return nil
	}
	if s == nil {
		return c.fail(code, reason) // RST_STREAM is not for streams that are not open
	}
	return c.reject(f.stream, s, code, reason, ev)
}

// reset takes RST_STREAM (RFC 9113 section 6.4).
func (c *Conn) reset(f frame, p []byte, ev *Event) error {
	if c.idle(f.stream) {
		return c.fail(ProtocolError, "RST_STREAM on a stream that is not open (RFC 9113 section 6.4)")
	}
	s := c.live(f.stream)
	if s == nil {
		return c.pay()
	}
	ev.Kind, ev.Stream, ev.Code = Reset, s.id, Code(binary.BigEndian.Uint32(p))
	ev.Unprocessed = c.client && ev.Code == RefusedStream && s.unanswered()
	young := s.began == c.epoch
	c.close(s, byPeer)
	if young && !c.client {
		return c.pay()
	}
	return nil
}

// ping takes PING (RFC 9113 section 6.7).
func (c *Conn) ping(f frame, p []byte, ev *Event) error {
	if !f.has(flagAck) {
		if err := c.pay(); err != nil {
			return err
		}
		c.pending = append(appendFrame(c.pending, framePing, flagAck, 0, len(p)), p...)
		return nil
	}
	switch {
	case c.shutdown && string(p) == shutdownPing:
		if !c.leaving {
			c.GoAway(NoError)
		}
	case c.pinged > 0 && string(p) == keepalivePing:
		c.pinged--
		ev.Kind = Pong
	default:
		return c.pay()
	}
	return nil
}

// goAway takes GOAWAY (RFC 9113 section 6.8).
func (c *Conn) goAway(_ frame, p []byte, ev *Event) error {
	if err := c.pay(); err != nil {
		return err
	}
	last := streamIn(p)
	if last > c.peerLast {
		return c.fail(ProtocolError, "GOAWAY takes more streams than the one before (RFC 9113 section 6.8)")
	}
	c.peerLeft, c.peerLast, c.abandoned = true, last, c.client
	ev.Kind, ev.Last, ev.Code, ev.Data = GoAway, last, Code(binary.BigEndian.Uint32(p[4:])), p[8:]
	return nil
}

// windowUpdate takes WINDOW_UPDATE (RFC 9113 section 6.9).
func (c *Conn) windowUpdate(f frame, p []byte, ev *Event) error {
	if c.idle(f.stream) && f.stream != 0 {
		return c.fail(ProtocolError, "WINDOW_UPDATE on a stream that is not open (RFC 9113 section 5.1)")
	}
	n := int(streamIn(p)) // of the same form
	if err := c.payReturn(n); err != nil {
		return err
	}
	s, window := c.live(f.stream), &c.sendWindow
	if f.stream != 0 {
		if s == nil {
			return nil
		}
		window = &s.sendWindow
	}
	code, reason := NoError, ""
	switch {
	case n == 0:
		code, reason = ProtocolError, "WINDOW_UPDATE by nothing (RFC 9113 section 6.9)"
	case *window+n > maxWindow:
		code, reason = FlowControlError, "WINDOW_UPDATE takes a window beyond 2^31-1 (RFC 9113 section 6.9.1)"
	}
	switch {
	case reason != "" && s != nil:
		return c.reject(f.stream, s, code, reason, ev)
	case reason != "":
		return c.fail(code, reason)
	}
	if *window <= 0 && *window+n > 0 {
		ev.Kind, ev.Stream = Window, f.stream
	}
	*window += n
	return nil
}
