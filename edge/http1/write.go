package http1

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

var (
	errNothingOwed = errors.New("no response is owed")
	errNotFree     = errors.New("the connection is not free for a request")
	errNotSending  = errors.New("no body can be written now")
)

// AppendRequest appends the head of a request to dst. It fails, and appends
// nothing, when the connection is not free or the request can't be written as it
// is. A body of unknown length, and one whose Trailer field announces
// trailers, goes in chunks.
func (c *Conn) AppendRequest(dst []byte, r *exchange.Request) ([]byte, error) {
	if !c.client || !c.free() {
		return dst, errNotFree
	}
	if err := checkRequest(r); err != nil {
		return dst, err
	}
	out := append(dst, r.Method...)
	out = append(out, ' ')
	out = append(out, r.Target...)
	out = append(out, " HTTP/1.1\r\nHost: "...)
	out = append(out, r.Authority...)
	out = append(out, "\r\n"...)
	out, announced, err := appendFields(out, r.Fields, true, r.Length != 0)
	if err != nil {
		return dst, err
	}
	out = c.appendOptions(out, r)
	c.writing, c.left = writeLength, r.Length
	switch {
	case r.Length < 0 || announced:
		c.writing = writeChunks
		out = append(out, "Transfer-Encoding: chunked\r\n"...)
	case r.Length > 0 || r.Method == "POST" || r.Method == "PUT" || r.Method == "PATCH":
		out = appendLength(out, r.Length)
	}
	c.protocol, c.head, c.persist = r.Protocol, r.Method == "HEAD", true
	return append(out, "\r\n"...), nil
}

// checkRequest refuses what would be another request on the wire, or none (RFC
// 9112 section 11.1).
func checkRequest(r *exchange.Request) error {
	host, ok := exchange.HostName(r.Authority)
	switch {
	case !exchange.ValidToken(r.Method) || r.Method == "CONNECT":
		return fmt.Errorf("method %q can't be sent", r.Method)
	case !ok || host == "":
		return fmt.Errorf("authority %q is not valid", r.Authority)
	case !exchange.ValidOrigin(r.Target) && (r.Target != "*" || r.Method != "OPTIONS"):
		path, _, _ := strings.Cut(r.Target, "?") // a query may hold secrets
		return fmt.Errorf("target %q is not valid", path)
	case r.Length < exchange.UnknownLength:
		return fmt.Errorf("%d is no length", r.Length)
	case r.Protocol != "" && (r.Length != 0 || !exchange.ValidUpgrade(r.Protocol)):
		return fmt.Errorf("a request can't ask for protocol %q", r.Protocol)
	}
	return nil
}

// appendOptions appends what a request says of the connection.
func (c *Conn) appendOptions(out []byte, r *exchange.Request) []byte {
	if r.Continue && r.Length != 0 {
		out = append(out, "Expect: 100-continue\r\n"...)
	}
	if r.Trailers {
		out = append(out, "TE: trailers\r\n"...)
	}
	if r.Protocol != "" {
		out = append(out, "Upgrade: "...)
		out = append(out, r.Protocol...)
		out = append(out, "\r\n"...)
	}
	separator := "Connection: "
	for _, option := range [...]struct {
		name  string
		apply bool
	}{{"close", c.closing}, {"TE", r.Trailers}, {"Upgrade", r.Protocol != ""}} {
		if option.apply {
			out = append(append(out, separator...), option.name...)
			separator = ", "
		}
	}
	if separator == ", " {
		out = append(out, "\r\n"...)
	}
	return out
}

// AppendInformational appends a 1xx response other than 101. A client of HTTP/1.0
// gets none (RFC 9110 section 15.2).
func (c *Conn) AppendInformational(dst []byte, status int, fields exchange.Fields) ([]byte, error) {
	switch {
	case c.client || c.writing != writeHead || c.reading == readStopped:
		return dst, errNothingOwed
	case status < 100 || status > 199 || status == 101:
		return dst, fmt.Errorf("status %d is not informational", status)
	case c.http10:
		return dst, nil
	}
	out, _, err := appendFields(appendStatus(dst, status), fields, false, false)
	if err != nil {
		return dst, err
	}
	if status == 100 {
		c.expects = false
	}
	return append(out, "\r\n"...), nil
}

// AppendResponse appends the head of the final response. It fails, and appends
// nothing, when none is owed or the response can't be written as it is. A body of
// unknown length, and one whose Trailer field announces trailers, goes in chunks;
// to a client of HTTP/1.0 such a body ends with the connection, and it gets no
// trailers. The caller sees to Date.
//
// The head says that the connection ends when the client wants it, after
// CloseAfter, after an error, and when the client may wait for 100 and not send
// the body that it announced.
func (c *Conn) AppendResponse(dst []byte, r *exchange.Response) ([]byte, error) {
	switch {
	case c.client || c.writing != writeHead:
		return dst, errNothingOwed
	case r.Status == 101:
		return c.appendSwitch(dst, r)
	case r.Status < 200 || r.Status > 999:
		return dst, fmt.Errorf("status %d is not final", r.Status)
	case r.Length < exchange.UnknownLength:
		return dst, fmt.Errorf("%d is no length", r.Length)
	}
	bodiless := c.head || r.Status == 204 || r.Status == 304
	out, announced, err := appendFields(appendStatus(dst, r.Status), r.Fields, false, !bodiless && !c.http10)
	if err != nil {
		return dst, err
	}
	last := c.closing || !c.persist || c.expects
	c.writing, c.left = writeLength, r.Length
	switch {
	case bodiless:
		if c.left = 0; r.Length >= 0 && r.Status != 204 {
			out = appendLength(out, r.Length)
		}
	case r.Length >= 0 && !announced:
		out = appendLength(out, r.Length)
	case c.http10:
		c.writing, last = writeToClose, true
	default:
		c.writing = writeChunks
		out = append(out, "Transfer-Encoding: chunked\r\n"...)
	}
	switch {
	case last:
		c.closing = true
		out = append(out, "Connection: close\r\n"...)
	case c.http10:
		out = append(out, "Connection: keep-alive\r\n"...)
	}
	return append(out, "\r\n"...), nil
}

// appendSwitch begins a tunnel.
func (c *Conn) appendSwitch(dst []byte, r *exchange.Response) ([]byte, error) {
	if c.protocol == "" || !strings.EqualFold(c.protocol, r.Protocol) || c.reading != readEnd {
		return dst, fmt.Errorf("the client has not asked for protocol %q", r.Protocol)
	}
	out, _, err := appendFields(appendStatus(dst, r.Status), r.Fields, false, false)
	if err != nil {
		return dst, err
	}
	out = append(out, "Connection: Upgrade\r\nUpgrade: "...)
	out = append(out, r.Protocol...)
	c.reading, c.writing, c.closing = readRaw, writeRaw, true
	return append(out, "\r\n\r\n"...), nil
}

// appendFields appends field lines. Trailer goes along if trailers can follow,
// and is then announced.
func appendFields(out []byte, fields exchange.Fields, request, trailers bool) (_ []byte, announced bool, err error) {
	for i := range fields {
		field := &fields[i]
		switch name := exchange.NameOf(field.Name); {
		case name == exchange.OtherName:
		case name == exchange.Trailer:
			goes, err := announces(field.Value)
			if err != nil {
				return nil, false, err
			}
			if !trailers || !goes {
				continue
			}
			announced = true
		case name.HopByHop() || name == exchange.ContentLength || request:
			return nil, false, fmt.Errorf("%s is not the caller's to send", field.Name)
		}
		if out, err = appendField(out, field); err != nil {
			return nil, false, err
		}
	}
	return out, announced, nil
}

func appendField(out []byte, field *exchange.Field) ([]byte, error) {
	if !exchange.ValidToken(field.Name) || !exchange.ValidValue(field.Value) {
		return nil, fmt.Errorf("field %q is not valid", field.Name)
	}
	out = append(out, field.Name...)
	out = append(out, ": "...)
	out = append(out, field.Value...)
	return append(out, "\r\n"...), nil
}

func appendLength(out []byte, length int64) []byte {
	out = append(out, "Content-Length: "...)
	out = strconv.AppendInt(out, length, 10)
	return append(out, "\r\n"...)
}

// AppendData appends a part of the body, as a chunk if need be, or of what goes
// through a tunnel. It fails, and appends nothing, when the body gets longer than
// its head has announced, or when there can be none.
func (c *Conn) AppendData(dst, data []byte) ([]byte, error) {
	out, behind, err := c.Frame(dst, len(data))
	if err != nil {
		return dst, err
	}
	return append(append(out, data...), behind...), nil
}

// Frame is AppendData for content that need not be copied: it appends what goes
// before the next n bytes and returns what goes behind them, which is not the
// caller's to change. The caller sends all three.
func (c *Conn) Frame(dst []byte, n int) (before, behind []byte, err error) {
	switch {
	case c.writing == writeLength && int64(n) > c.left:
		return dst, nil, fmt.Errorf("the body is longer than announced, by %d bytes", int64(n)-c.left)
	case c.writing < writeLength || c.writing == writeEnd:
		return dst, nil, errNotSending
	case n == 0:
	case c.writing == writeChunks:
		return append(strconv.AppendUint(dst, uint64(n), 16), "\r\n"...), chunkEnd, nil
	case c.writing == writeLength:
		c.left -= int64(n)
	}
	return dst, nil, nil
}

var chunkEnd = []byte("\r\n")

// AppendEnd ends a message, or what goes through a tunnel. Every message is ended,
// also one without body. Trailers go along that may stand in a trailer section, if
// the body goes in chunks. It fails, and appends nothing, when the body is shorter
// than its head has announced: then the connection is to be cut.
func (c *Conn) AppendEnd(dst []byte, trailers exchange.Fields) ([]byte, error) {
	out := dst
	switch {
	case c.writing == writeLength && c.left > 0:
		return dst, fmt.Errorf("the body is shorter than announced, by %d bytes", c.left)
	case c.writing < writeLength || c.writing == writeEnd:
		return dst, errNotSending
	case c.writing == writeChunks:
		out = append(out, "0\r\n"...)
		for i := range trailers {
			if !exchange.TrailerAllowed(trailers[i].Name) {
				continue
			}
			var err error
			if out, err = appendField(out, &trailers[i]); err != nil {
				return dst, err
			}
		}
		out = append(out, "\r\n"...)
	}
	c.writing = writeEnd
	c.turn()
	return out, nil
}
