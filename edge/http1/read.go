package http1

import (
	"bytes"
	"errors"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// Kind says what Next has found.
type Kind int8

// Kinds of events. A message is a Request or a Response, any number of Data, and
// End, also when it has no body. Informational responses come before the final one.
const (
	// None: more bytes are needed, or the other direction has to go on first.
	None Kind = iota
	// Request has come, in the role of the server.
	Request
	// Response has come, the final one, in the role of the client.
	Response
	// Informational is a 1xx response, other than 101.
	Informational
	// Data is a part of the body.
	Data
	// End is the end of a message, or of what comes through a tunnel.
	End
	// Tunnel is a part of what comes through a tunnel, after 101.
	Tunnel
)

// Event is what Next has found. The caller keeps one and passes it again: heads
// are read into it, and their fields into the array behind Fields, which the
// caller takes over by setting Fields to nil.
type Event struct {
	Kind    Kind
	Request exchange.Request
	// Response is an informational response, too.
	Response exchange.Response
	// Data lies in what Next was called with.
	Data []byte
	// Trailers come with End: those that may stand in a trailer section.
	Trailers exchange.Fields
}

var (
	errUnsolicited = errors.New("the backend sent data that answers no request")
	errNotHTTP     = errors.New("the backend's answer is not HTTP/1")
	errEndless1xx  = errors.New("more than 100 informational responses")
	errBlank       = errors.New("more than one empty line before a request (RFC 9112 section 2.2)")
	errHeadSize    = errors.New("the head is larger than the limit")
	errFields      = errors.New("the head has more fields than the limit")
	errCutHead     = errors.New("the connection ended inside a head")
	errCutBody     = errors.New("the connection ended inside a body")
	errNoAnswer    = errors.New("the connection ended before the response")
	errCutTunnel   = errors.New("the connection of a tunnel ended without close_notify")
)

// Next consumes n bytes of in and reports one event. It is called until the event
// is None; then bytes from n on are kept and passed again once there are more, or
// once the answer was written. Errors are *Error and stay.
func (c *Conn) Next(in []byte, event *Event) (n int, err error) {
	event.Kind, event.Data, event.Trailers = None, nil, nil
	switch c.reading {
	case readHead:
		return c.nextHead(in, event)
	case readBody:
		return c.nextBody(in, event)
	case readRaw:
		if len(in) > 0 {
			event.Kind, event.Data = Tunnel, in
		}
		return len(in), nil
	}
	return 0, c.err
}

func (c *Conn) nextHead(in []byte, event *Event) (n int, err error) {
	if c.client && len(in) > 0 {
		switch {
		case c.writing == writeNone:
			return 0, c.fail(refused(errUnsolicited))
		case !bytes.HasPrefix(in, []byte("HTTP/1")[:min(len(in), 6)]):
			return 0, c.fail(refused(errNotHTTP))
		}
	}
	for {
		view := in[n:min(len(in), n+c.limits.HeadBytes)]
		end, err := exchange.EndOfHead(view, c.seen)
		switch {
		case err != nil:
			return n, c.fail(refused(err))
		case end == 0 && len(view) == c.limits.HeadBytes:
			return n, c.fail(&Error{431, "header_too_large", errHeadSize})
		case end == 0:
			c.seen = len(view)
			return n, nil
		case end == len("\r\n") && c.blank:
			return n, c.fail(refused(errBlank))
		case end == len("\r\n"):
			c.blank, c.seen = true, 0
			n += end
			continue
		}
		fields := bytes.Count(view[:end], newline) - 2
		if fields > c.limits.Fields {
			// Before they are parsed: parsed fields cost many times their bytes.
			return n, c.fail(&Error{431, "too_many_fields", errFields})
		}
		c.seen = 0
		text := string(view[:end])
		if c.client {
			event.Response.Fields = withRoom(event.Response.Fields, fields)
			err = c.response(text, event)
		} else {
			event.Request.Fields = withRoom(event.Request.Fields, fields)
			err = c.request(text, event)
		}
		return n + end, err
	}
}

var newline = []byte{'\n'}

// spare is room for the fields that a proxy adds, which spares it a larger copy.
const spare = 6

// withRoom empties fields and makes room for so many.
func withRoom(fields exchange.Fields, most int) exchange.Fields {
	if cap(fields) < most {
		return make(exchange.Fields, 0, most+spare)
	}
	return fields[:0]
}

func (c *Conn) nextBody(in []byte, event *Event) (n int, err error) {
	n, part, err := c.body.Next(in)
	switch {
	case err != nil:
		return n, c.fail(refused(err))
	case len(part) > 0:
		event.Kind, event.Data = Data, part
		c.expects = false
		return n, nil
	case c.body.AtTrailer():
		used, trailers, err := c.body.Trailer(in[n:], c.limits.TrailerBytes, c.limits.Fields)
		n += used
		switch {
		case err != nil:
			return n, c.fail(refused(err))
		case used == 0:
			return n, nil
		}
		for name := range strings.SplitSeq(c.hops, ",") {
			if name = exchange.TrimSpace(name); exchange.Removable(name) {
				trailers.Del(name)
			}
		}
		event.Trailers = trailers
	case !c.body.Over():
		return n, nil
	}
	c.end(event)
	return n, nil
}

// end is the end of a message.
func (c *Conn) end(event *Event) {
	event.Kind = End
	c.reading = readEnd
	c.turn()
}

// PeerClosed takes the end of what the peer sends, after Next has had all of it:
// clean after a close_notify, otherwise cut off. It reports End in event when that
// ends a message or a tunnel in order, and an *Error when it cuts one. In the role
// of the server an answer may still be written to a request that has come whole.
func (c *Conn) PeerClosed(clean bool, event *Event) error {
	event.Kind, event.Data, event.Trailers = None, nil, nil
	c.closing = true
	switch {
	case c.reading == readStopped:
		return c.err
	case c.reading == readEnd:
	case c.reading == readRaw && !clean:
		return c.cut(errCutTunnel)
	case c.reading == readRaw, c.reading == readBody && c.body.Over(), clean && c.reading == readBody && c.body.ToClose():
		c.end(event)
	case c.reading == readBody:
		return c.cut(errCutBody)
	case c.seen > 0:
		return c.cut(errCutHead)
	case c.client && c.writing != writeNone:
		return c.cut(errNoAnswer)
	default:
		c.reading = readStopped
	}
	c.unread = false
	return nil
}

// cut is the end of a connection inside a message.
func (c *Conn) cut(err error) error {
	cut := &Error{499, "client_abort", err}
	if c.client {
		cut = &Error{502, "reset", err}
	}
	c.stop(cut)
	c.unread = false
	return cut
}
