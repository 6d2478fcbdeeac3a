package http2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// Errors of what appends. Nothing but what was pending is appended with them, and
// the state is as before.
var (
	// ErrClosed: the stream is closed, has been ended by this side, or was never
	// open.
	ErrClosed = errors.New("the stream is closed")
	// ErrState: the message is not where this may follow (RFC 9113 section 8.1):
	// content before the head, a second head, trailers of a tunnel.
	ErrState = errors.New("not at this point of the message (RFC 9113 section 8.1)")
	// ErrNoStream: no stream can be opened now; see Available.
	ErrNoStream = errors.New("no stream can be opened")
	// ErrNoTunnel: the server has not offered extended CONNECT (RFC 8441).
	ErrNoTunnel = errors.New("the server takes no extended CONNECT (RFC 8441 section 3)")
	// ErrLength: the content is not as long as the head said, or there must be none.
	ErrLength = errors.New("the content has not the length that the head says (RFC 9113 section 8.1.1)")
	// ErrTooLarge: the peer has said that it takes no header section as large as this.
	ErrTooLarge = errors.New("the header section is larger than SETTINGS_MAX_HEADER_LIST_SIZE (RFC 9113 section 10.5.1)")
	// ErrMalformed: the message breaks a rule for requests or responses.
	ErrMalformed = errors.New("a malformed message")
)

// Available returns how many streams a client may open now.
func (c *Conn) Available() int {
	if !c.client || c.failed != nil || c.leaving || c.peerLeft || c.next > maxStream {
		return 0
	}
	return min(max(c.Limit()-c.open, 0), int(maxStream-c.next)/2+1)
}

// Limit returns how many streams a client may have open at once.
func (c *Conn) Limit() int {
	return min(c.cfg.MaxStreams, int(min(c.peer.maxStreams, maxStream)))
}

// ExtendedConnect reports whether the server takes requests with a Protocol.
func (c *Conn) ExtendedConnect() bool { return c.client && c.peer.extendedConnect }

// AppendRequest opens a stream with a request; end: it has no content. A request
// with a Protocol becomes an extended CONNECT, whatever its method (RFC 8441).
// Names of fields are written in lower case. Errors: ErrNoStream, ErrNoTunnel,
// ErrTooLarge, ErrLength, ErrMalformed, Err.
func (c *Conn) AppendRequest(dst []byte, r *exchange.Request, end bool) ([]byte, uint32, error) {
	dst = c.AppendPending(dst)
	switch {
	case c.failed != nil:
		return dst, 0, c.failed
	case c.Available() == 0:
		return dst, 0, ErrNoStream
	case r.Protocol != "" && !c.peer.extendedConnect:
		return dst, 0, ErrNoTunnel
	case end && r.Length > 0:
		return dst, 0, ErrLength
	}
	if err := checkRequest(r); err != nil {
		return dst, 0, err
	}
	if err := c.checkFields(r.Fields, len(r.Method)+len(r.Authority)+len(r.Target)); err != nil {
		return dst, 0, err
	}
	id := c.next
	c.next += 2
	s := c.newStream(id)
	s.sendLeft, s.sent = r.Length, end
	s.toHead, s.tunnel, s.protocol = r.Method == "HEAD", r.Protocol != "", r.Protocol
	if s.tunnel {
		s.toHead, s.sendLeft = false, exchange.UnknownLength
	}
	start, dst := len(dst), c.encoder.begin(append(dst, make([]byte, frameHeadLen)...))
	dst = c.appendRequestHead(dst, r, s.tunnel)
	return c.endHead(dst, start, id, end), id, nil
}

func (c *Conn) appendRequestHead(dst []byte, r *exchange.Request, tunnel bool) []byte {
	e, method := &c.encoder, r.Method
	if tunnel {
		method = "CONNECT"
	}
	switch method { // indexes of the static table
	case "GET":
		dst = append(dst, 0x80|2)
	case "POST":
		dst = append(dst, 0x80|3)
	default:
		dst = e.append(dst, e.knowLower(":method"), method, false)
	}
	if r.Scheme == "https" {
		dst = append(dst, 0x80|7)
	} else {
		dst = append(dst, 0x80|6)
	}
	dst = e.append(dst, e.knowLower(":authority"), r.Authority, false)
	dst = e.append(dst, e.knowLower(":path"), r.Target, false)
	if tunnel {
		dst = e.append(dst, e.knowLower(":protocol"), r.Protocol, false)
	}
	dst = c.appendFields(dst, r.Fields)
	if !tunnel && (r.Length > 0 || r.Length == 0 && expectsContent(method)) {
		dst = c.appendLength(dst, r.Length)
	}
	if r.Trailers {
		dst = e.append(dst, e.knowLower("te"), "trailers", false)
	}
	if r.Continue {
		dst = e.append(dst, e.knowLower("expect"), "100-continue", false)
	}
	return dst
}

// expectsContent reports whether a request without content should say so (RFC
// 9110 section 8.6).
func expectsContent(method string) bool {
	return method == "POST" || method == "PUT" || method == "PATCH"
}

func checkRequest(r *exchange.Request) error {
	switch {
	case !exchange.ValidToken(r.Method) || r.Method == "CONNECT" && r.Protocol == "":
		return fmt.Errorf("%w: method %q", ErrMalformed, r.Method)
	case r.Scheme != "https" && r.Scheme != "http":
		return fmt.Errorf("%w: scheme %q", ErrMalformed, r.Scheme)
	case !validAuthority(r.Authority) || !isHost(r.Authority):
		return fmt.Errorf("%w: authority %q", ErrMalformed, r.Authority)
	case !validTarget(r.Target, r.Method):
		path, _, _ := strings.Cut(r.Target, "?") // a query may hold secrets
		return fmt.Errorf("%w: target %q", ErrMalformed, path)
	case r.Protocol != "" && !exchange.ValidToken(r.Protocol):
		return fmt.Errorf("%w: protocol %q", ErrMalformed, r.Protocol)
	}
	return nil
}

// AppendInformational sends an informational response, 100 or 102 to 199. Errors:
// ErrClosed, ErrState, ErrTooLarge, ErrMalformed, Err.
func (c *Conn) AppendInformational(dst []byte, id uint32, r *exchange.Response) ([]byte, error) {
	dst = c.AppendPending(dst)
	if r.Status < 100 || r.Status > 199 || r.Status == 101 {
		return dst, fmt.Errorf("%w: informational status %d", ErrMalformed, r.Status)
	}
	_, err := c.responding(id, r)
	if err != nil {
		return dst, err
	}
	return c.appendResponseHead(dst, id, r.Status, r.Fields, exchange.UnknownLength, false), nil
}

// AppendResponse sends the head of the final response; end: it has no content, or
// by its nature can't have any. 101 with a Protocol, as HTTP/1.1 has it, is sent
// as 200 to an extended CONNECT. Errors: ErrClosed, ErrState, ErrTooLarge,
// ErrLength, ErrMalformed, Err.
func (c *Conn) AppendResponse(dst []byte, id uint32, r *exchange.Response, end bool) ([]byte, error) {
	dst = c.AppendPending(dst)
	s, err := c.responding(id, r)
	if err != nil {
		return dst, err
	}
	status, length := r.Status, r.Length
	if status == 101 && s.tunnel && r.Protocol != "" {
		status = 200
	}
	if status < 200 || status > 999 {
		return dst, fmt.Errorf("%w: final status %d", ErrMalformed, status)
	}
	mute := hasNoBody(s.toHead, status)
	if status == 204 || s.tunnel && status < 300 {
		length = exchange.UnknownLength // RFC 9110 section 8.6
	}
	if end && length > 0 && !mute {
		return dst, ErrLength
	}
	s.headed, s.mute, s.sendLeft, s.sent = true, mute, length, end
	dst = c.appendResponseHead(dst, id, status, r.Fields, length, end)
	c.sentAll(s)
	return dst, nil
}

// responding returns the stream on which a head of a response may be sent.
func (c *Conn) responding(id uint32, r *exchange.Response) (*stream, error) {
	s, err := c.sending(id)
	if err != nil {
		return nil, err
	}
	if c.client || s.headed {
		return nil, ErrState
	}
	return s, c.checkFields(r.Fields, len("200"))
}

// sending returns a stream on which this side may still send.
func (c *Conn) sending(id uint32) (*stream, error) {
	if c.failed != nil {
		return nil, c.failed
	}
	if s := c.live(id); s != nil && !s.sent {
		return s, nil
	}
	return nil, ErrClosed
}

func (c *Conn) appendResponseHead(dst []byte, id uint32, status int, fields exchange.Fields, length int64, end bool) []byte {
	start := len(dst)
	dst = c.encoder.begin(append(dst, make([]byte, frameHeadLen)...))
	dst = c.encoder.appendStatus(dst, status)
	dst = c.appendFields(dst, fields)
	if length >= 0 {
		dst = c.appendLength(dst, length)
	}
	return c.endHead(dst, start, id, end)
}

// AppendTrailers ends a message with trailers. Errors: ErrClosed, ErrState,
// ErrTooLarge, ErrLength, ErrMalformed, Err.
func (c *Conn) AppendTrailers(dst []byte, id uint32, trailers exchange.Fields) ([]byte, error) {
	dst = c.AppendPending(dst)
	s, err := c.sending(id)
	switch {
	case err != nil:
		return dst, err
	case !c.client && !s.headed || s.tunnel:
		return dst, ErrState
	case s.sendLeft > 0 && !s.mute:
		return dst, ErrLength
	}
	if err := c.checkFields(trailers, 0); err != nil {
		return dst, err
	}
	start := len(dst)
	dst = c.encoder.begin(append(dst, make([]byte, frameHeadLen)...))
	dst = c.endHead(c.appendFields(dst, trailers), start, id, true)
	s.sent = true
	c.sentAll(s)
	return dst, nil
}

// AppendData sends as much of p as flow control lets go, and returns how much
// that is; end: p is the last of the content. When less than p went, the caller
// comes again with the rest once a Window event says so. Errors: ErrClosed,
// ErrState, ErrLength, Err.
func (c *Conn) AppendData(dst []byte, id uint32, p []byte, end bool) ([]byte, int, error) {
	dst = c.AppendPending(dst)
	s, err := c.sending(id)
	switch {
	case err != nil:
		return dst, 0, err
	case !c.client && !s.headed:
		return dst, 0, ErrState
	case s.mute && len(p) > 0:
		return dst, 0, ErrLength
	case s.sendLeft >= 0 && !s.mute && (int64(len(p)) > s.sendLeft || end && int64(len(p)) < s.sendLeft):
		return dst, 0, ErrLength
	}
	n := min(len(p), max(0, min(s.sendWindow, c.sendWindow)))
	last := end && n == len(p)
	for rest := p[:n]; len(rest) > 0 || last; {
		size, flags := min(len(rest), c.peer.maxFrame), uint8(0)
		if last && size == len(rest) {
			flags, last = flagEndStream, false
			s.sent = true
		}
		dst = append(appendFrame(dst, frameData, flags, id, size), rest[:size]...)
		rest = rest[size:]
		if n == len(p) || size >= fairReturn {
			c.earn(dataCredit)
		}
	}
	s.sendWindow -= n
	c.sendWindow -= n
	c.returnable += 2 * n
	if s.sendLeft > 0 {
		s.sendLeft -= int64(n)
	}
	c.sentAll(s)
	return dst, n, nil
}

// sentAll ends a stream on which this side has sent everything, if that is so. A
// client that goes on with a request that was refused is told to stop.
func (c *Conn) sentAll(s *stream) {
	switch {
	case s.over():
		c.finish(s)
	case s.sent && s.refused:
		c.Reset(s.id, NoError)
	}
}

// Reset ends a stream, and gives back what the caller holds of it. NoError tells
// a client, after a whole response, that the rest of its request is not needed
// (RFC 9113 section 8.1). A stream that has ended stays as it is.
func (c *Conn) Reset(id uint32, code Code) {
	s := c.streams.get(id)
	switch {
	case s == nil || c.failed != nil:
	case s.over():
		c.Consumed(id, s.unconsumed)
	default:
		c.sendReset(id, code)
		c.close(s, byUs)
	}
}

func (c *Conn) sendReset(id uint32, code Code) {
	c.pending = binary.BigEndian.AppendUint32(appendFrame(c.pending, frameReset, 0, id, 4), uint32(code))
}

// endHead completes the frame of a header block that begins at start, or makes
// several of it.
func (c *Conn) endHead(dst []byte, start int, id uint32, end bool) []byte {
	length, most := len(dst)-start-frameHeadLen, c.peer.maxFrame
	flags := uint8(0)
	if end {
		flags = flagEndStream
	}
	if length <= most {
		appendFrame(dst[:start], frameHeaders, flags|flagEndHeaders, id, length)
		return dst
	}
	block := append([]byte(nil), dst[start+frameHeadLen:]...)
	dst = append(appendFrame(dst[:start], frameHeaders, flags, id, most), block[:most]...)
	for block = block[most:]; len(block) > most; block = block[most:] {
		dst = append(appendFrame(dst, frameContinuation, 0, id, most), block[:most]...)
	}
	return append(appendFrame(dst, frameContinuation, flagEndHeaders, id, len(block)), block...)
}

func (c *Conn) appendFields(dst []byte, fields exchange.Fields) []byte {
	for i := range fields {
		f := &fields[i]
		dst = c.encoder.append(dst, c.encoder.know(f.Name), f.Value, f.Secret)
	}
	return dst
}

// appendLength appends Content-Length, index 28 of the static table.
func (c *Conn) appendLength(dst []byte, n int64) []byte {
	var digits [20]byte
	text := strconv.AppendInt(digits[:0], n, 10)
	dst = appendInteger(dst, 0, 4, 28)
	return append(append(dst, byte(len(text))), text...)
}

// checkFields checks fields before any of them changes the state of the encoder:
// what would be refused when it came is not sent. base is the size of the
// pseudo-header fields' values.
func (c *Conn) checkFields(fields exchange.Fields, base int) error {
	size := base + 4*(32+len(":authority"))
	for i := range fields {
		f := &fields[i]
		size += len(f.Name) + len(f.Value) + 32
		switch {
		case !exchange.ValidToken(f.Name):
			return fmt.Errorf("%w: the field's name %q", ErrMalformed, f.Name)
		case !validValue(f.Value):
			return fmt.Errorf("%w: the value of field %s", ErrMalformed, f.Name)
		case c.ofOneConnection(f.Name):
			return fmt.Errorf("%w: field %s belongs to one connection", ErrMalformed, f.Name)
		}
	}
	if uint64(size) > uint64(c.peer.maxHeaderList) {
		return ErrTooLarge
	}
	return nil
}

// ofOneConnection reports whether a field is no part of exchange.Fields.
func (c *Conn) ofOneConnection(name string) bool {
	switch exchange.NameOf(name) {
	case exchange.OtherName, exchange.Trailer:
		return false
	case exchange.Host, exchange.Expect:
		return c.client // in a response they mean nothing
	}
	return true
}
