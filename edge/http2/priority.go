package http2

import (
	"strings"
)

// defaultUrgency is that of requests that say nothing (RFC 9218 section 4.1).
const defaultUrgency = 3

// Priority is how a client wants a response (RFC 9218 section 4).
type Priority struct {
	// Urgency is 0, the most urgent, to 7; 3 when a client says nothing.
	Urgency uint8
	// Incremental is set when parts of the response are of use, so that it may
	// share the connection with others of the same urgency.
	Incremental bool
}

// ParsePriority reads the value of a priority field. What it doesn't know, or
// what is out of range, counts as not said (RFC 9218 section 4).
func ParsePriority(value string) Priority {
	p := Priority{Urgency: defaultUrgency}
	for value != "" {
		var item string
		item, value, _ = strings.Cut(value, ",")
		item, _, _ = strings.Cut(strings.Trim(item, " \t"), ";")
		key, given, hasValue := strings.Cut(item, "=")
		switch {
		case key == "u":
			p.Urgency = defaultUrgency
			if len(given) == 1 && '0' <= given[0] && given[0] <= '7' {
				p.Urgency = given[0] - '0'
			}
		case key == "i":
			p.Incremental = !hasValue || given == "?1"
		}
	}
	return p
}

// promised is the priority of a stream that the client has yet to open.
type promised struct {
	stream   uint32
	priority Priority
}

// priorityUpdate takes PRIORITY_UPDATE (RFC 9218 section 7.1).
func (c *Conn) priorityUpdate(f frame, p []byte, ev *Event) error {
	switch {
	case c.client:
		return c.fail(ProtocolError, "PRIORITY_UPDATE from a server (RFC 9218 section 7.1)")
	case f.stream != 0:
		return c.fail(ProtocolError, "PRIORITY_UPDATE on a stream (RFC 9218 section 7.1)")
	case f.length < 4:
		return c.fail(FrameSizeError, "PRIORITY_UPDATE without a stream (RFC 9218 section 7.1)")
	}
	id := streamIn(p)
	if id%2 == 0 {
		return c.fail(ProtocolError, "PRIORITY_UPDATE for a stream that no client opens (RFC 9218 section 7.1)")
	}
	if err := c.pay(); err != nil {
		return err
	}
	priority := ParsePriority(string(p[4:]))
	if id <= c.highest {
		if s := c.streams.get(id); s != nil {
			ev.Kind, ev.Stream, ev.Priority = Reprioritized, id, priority
		}
		return nil
	}
	for i := range c.promised {
		if c.promised[i].stream == id {
			c.promised[i].priority = priority
			return nil
		}
	}
	if len(c.promised)+c.open >= c.cfg.MaxStreams {
		return c.fail(ProtocolError, "PRIORITY_UPDATE for more streams than may be open (RFC 9218 section 7.1)")
	}
	c.promised = append(c.promised, promised{id, priority})
	return nil
}

// priorityOf returns the priority of a stream that opens: what PRIORITY_UPDATE
// said before, or else what the priority field says.
func (c *Conn) priorityOf(stream uint32, value string) Priority {
	priority, kept := ParsePriority(value), c.promised[:0]
	for _, p := range c.promised {
		switch {
		case p.stream == stream:
			priority = p.priority
		case p.stream > stream:
			kept = append(kept, p)
		}
	}
	if c.promised = kept; len(kept) == 0 {
		c.promised = nil
	}
	return priority
}
