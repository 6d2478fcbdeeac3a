// Package http2 is the protocol machine of HTTP/2 (RFC 9113), for both roles:
// server towards clients, client towards backends. It has no I/O, no clock and no
// goroutine. Bytes that came go in by Next, which tells what they mean, an Event
// at a time; what is to be sent is appended to buffers of the caller.
//
// The machine rejects and never repairs: what breaks a rule ends the stream, or
// the connection, and it sends nothing that it would not take. It keeps no bytes
// that come, but for header blocks and small frames that are not whole yet, and
// none of what it sends, but for frames that it owes the peer (AppendPending).
package http2

import "slices"

// Config bounds a connection. Zero values stand for the defaults.
type Config struct {
	// MaxStreams is how many streams may be open at once: as a server, those of
	// the client (SETTINGS_MAX_CONCURRENT_STREAMS); as a client, those that
	// Available lets the caller open, if the server allows as many. Default 100.
	MaxStreams int
	// MaxHeaderBytes bounds a header or trailer section, counted as in RFC 9113
	// section 10.5.1: 32 bytes for each field come on top. Default 65536. The
	// bytes of a block as it is sent may be twice that; beyond, the connection
	// ends.
	MaxHeaderBytes int
	// MaxHeaderFields bounds the fields of a section, pseudo-header fields not
	// counted and all cookies counted as one. Default 100.
	MaxHeaderFields int
	// MaxFrame is the largest payload of a frame that is taken, 16384 (default)
	// to 16777215.
	MaxFrame int
	// StreamWindow is how many bytes of a stream may come before the caller has
	// consumed them (SETTINGS_INITIAL_WINDOW_SIZE). Default 65535.
	StreamWindow int
	// ConnWindow is the same for all streams together. Default, and at least,
	// 65535; by default also MaxStreams × StreamWindow: with less, streams whose
	// bytes nobody consumes hold back the others.
	ConnWindow int
	// MaxPending bounds what is owed to a peer that doesn't read. Default 16384.
	MaxPending int
	// FloodCredit is what a peer's credit is at first and at most; see Refill.
	// Default 500.
	FloodCredit int
	// ExtendedConnect lets clients open tunnels (RFC 8441). Server only.
	ExtendedConnect bool
}

func (cfg Config) withDefaults() Config {
	for _, set := range []struct {
		value  *int
		preset int
	}{
		{&cfg.MaxStreams, 100},
		{&cfg.MaxHeaderBytes, 65536},
		{&cfg.MaxHeaderFields, 100},
		{&cfg.MaxFrame, minFrame},
		{&cfg.StreamWindow, firstWindow},
		{&cfg.MaxPending, 16384},
		{&cfg.FloodCredit, 500},
	} {
		if *set.value == 0 {
			*set.value = set.preset
		}
	}
	if cfg.ConnWindow == 0 {
		cfg.ConnWindow = cfg.MaxStreams * cfg.StreamWindow
	}
	cfg.MaxFrame = min(max(cfg.MaxFrame, minFrame), maxFrame)
	cfg.StreamWindow = min(cfg.StreamWindow, maxWindow)
	cfg.ConnWindow = min(max(cfg.ConnWindow, firstWindow), maxWindow)
	return cfg
}

// Conn is the state of a connection. It is used by one goroutine at a time.
type Conn struct {
	cfg    Config
	client bool
	failed *Error

	// What comes.
	greeted  int // bytes of the preface that came (server)
	settled  bool
	data     dataFrame
	skip     int    // bytes of a frame that nobody wants
	partial  []byte // a frame that is not whole yet
	block    block
	decoder  decoder
	window   int // bytes that the peer may send on the connection
	owed     int // consumed, not given back to the peer yet
	slack    int // bytes beyond a stream's window that may come before our SETTINGS are acked
	unacked  []int
	credit   int
	epoch    uint32
	promised []promised

	// Streams.
	streams table
	graves  graves
	open    int
	highest uint32 // stream of the peer
	served  uint32 // the highest that the caller was told of
	next    uint32 // stream of ours

	// What goes.
	pending    []byte
	encoder    encoder
	sendWindow int
	peer       settings
	pinged     int // pings that are not answered yet
	returnable int // window updates for so many bytes are due

	// Ends.
	leaving   bool   // GOAWAY was sent, its last stream is final
	leaveAt   uint32 // that stream
	shutdown  bool   // the final GOAWAY is sent when its PING is answered
	peerLeft  bool   // GOAWAY came
	peerLast  uint32
	abandoned bool // streams above peerLast have to be ended
}

// NewServer makes the machine of a server's connection. It owes the peer its
// SETTINGS.
func NewServer(cfg Config) *Conn { return newConn(cfg, false) }

// NewClient makes the machine of a client's connection. It owes the peer preface
// and SETTINGS.
func NewClient(cfg Config) *Conn { return newConn(cfg, true) }

func newConn(cfg Config, client bool) *Conn {
	cfg = cfg.withDefaults()
	c := &Conn{
		cfg: cfg, client: client, window: firstWindow, sendWindow: firstWindow, credit: cfg.FloodCredit,
		peer: defaultSettings, next: 1, leaveAt: maxStream, peerLast: maxStream,
		encoder: newEncoder(), decoder: newDecoder(),
	}
	c.streams.keep = keepServer
	if client {
		c.streams.keep = keepClient
		c.greeted = len(preface)
		c.pending = append(c.pending, preface...)
	}
	c.announce()
	return c
}

// Next reads on in what came from the peer. It returns how many bytes of in it
// has used, and in ev what they mean. With ev.Kind None it has used all and needs
// more; otherwise the caller goes on with the rest of in at once, also when there
// is none. A frame that is not whole yet is kept, but for the content of DATA,
// which is passed on as it comes.
//
// ev.Data is good until the next call or change of in; strings in ev are the
// caller's. An error ends the connection: the caller sends what is pending, and
// closes. It is an *Error and comes again with each call.
func (c *Conn) Next(in []byte, ev *Event) (int, error) {
	ev.clear()
	n := 0
	for c.failed == nil {
		if c.abandoned && c.abandon(ev) {
			return n, nil
		}
		used, err := c.advance(in[n:], ev)
		n += used
		if err != nil {
			break
		}
		if ev.Kind != None || used == 0 {
			return n, nil
		}
	}
	ev.clear()
	return n, c.failed
}

// advance makes a step, with the frame that was kept if there is one.
func (c *Conn) advance(in []byte, ev *Event) (int, error) {
	if len(c.partial) == 0 {
		used, err := c.step(in, ev)
		if used == 0 && err == nil {
			used = len(in)
			c.partial = append(c.partial, in...)
		}
		return used, err
	}
	n := min(len(in), c.missing())
	c.partial = append(c.partial, in[:n]...)
	used, err := c.step(c.partial, ev)
	if used > 0 {
		c.partial = nil
	}
	return n, err
}

// missing returns how many bytes the next step needs behind those that are kept.
func (c *Conn) missing() int {
	if len(c.partial) < frameHeadLen {
		return frameHeadLen - len(c.partial)
	}
	f := parseFrame(c.partial)
	if f.kind == frameData {
		return 1 // the length of the padding
	}
	return frameHeadLen + f.length - len(c.partial)
}

// step uses a frame, or the part of it that is there; 0 bytes: it needs more.
func (c *Conn) step(in []byte, ev *Event) (int, error) {
	switch {
	case c.greeted < len(preface):
		return c.greet(in)
	case c.data.left+c.data.pad > 0:
		return c.payload(in, ev), nil
	case c.skip > 0:
		n := min(c.skip, len(in))
		c.skip -= n
		return n, nil
	case len(in) < frameHeadLen:
		return 0, nil
	}
	f := parseFrame(in)
	if err := c.admit(f); err != nil {
		return 0, err
	}
	switch f.kind {
	case frameData:
		return c.beginData(f, in[frameHeadLen:], ev)
	case frameHeaders, framePriority, frameReset, frameSettings, framePing, frameGoAway, frameWindowUpdate, frameContinuation, framePriorityUpdate:
		if len(in) < frameHeadLen+f.length {
			return 0, nil
		}
		return frameHeadLen + f.length, c.handle(f, in[frameHeadLen:frameHeadLen+f.length], ev)
	}
	c.skip = f.length // an extension (RFC 9113 section 5.5)
	return frameHeadLen, c.pay()
}

func (c *Conn) handle(f frame, p []byte, ev *Event) error {
	switch f.kind {
	case frameHeaders:
		return c.headers(f, p, ev)
	case frameContinuation:
		return c.continuation(f, p, ev)
	case framePriority:
		return c.priority(f, p, ev)
	case frameReset:
		return c.reset(f, p, ev)
	case frameSettings:
		return c.settings(f, p, ev)
	case framePing:
		return c.ping(f, p, ev)
	case frameGoAway:
		return c.goAway(f, p, ev)
	case frameWindowUpdate:
		return c.windowUpdate(f, p, ev)
	}
	return c.priorityUpdate(f, p, ev)
}

// greet reads the client's preface (RFC 9113 section 3.4).
func (c *Conn) greet(in []byte) (int, error) {
	n := min(len(in), len(preface)-c.greeted)
	if string(in[:n]) != preface[c.greeted:c.greeted+n] {
		return 0, c.fail(ProtocolError, "the connection doesn't begin with the preface (RFC 9113 section 3.4)")
	}
	c.greeted += n
	return n, nil
}

// admit checks what can be told by the head of a frame, before its payload has
// come.
func (c *Conn) admit(f frame) error {
	switch {
	case len(c.pending) > c.cfg.MaxPending:
		return c.fail(EnhanceYourCalm, "the peer has us answer and doesn't read the answers")
	case f.length > c.cfg.MaxFrame:
		return c.fail(FrameSizeError, "a frame is larger than SETTINGS_MAX_FRAME_SIZE (RFC 9113 section 4.2)")
	case f.kind == frameHeaders && f.length > 2*c.cfg.MaxHeaderBytes:
		return c.fail(EnhanceYourCalm, errLongBlock)
	case !c.settled && (f.kind != frameSettings || f.has(flagAck)):
		return c.fail(ProtocolError, "the first frame is not SETTINGS (RFC 9113 section 3.4)")
	case c.block.open && (f.kind != frameContinuation || f.stream != c.block.stream):
		return c.fail(ProtocolError, "a frame in the middle of a header block (RFC 9113 section 4.3)")
	case !c.block.open && f.kind == frameContinuation:
		return c.fail(ProtocolError, "CONTINUATION without a header block (RFC 9113 section 6.10)")
	case f.kind == framePushPromise:
		return c.fail(ProtocolError, "PUSH_PROMISE though push is not allowed (RFC 9113 section 8.4)")
	}
	switch f.kind {
	case frameData, frameHeaders, framePriority, frameReset:
		if f.stream == 0 {
			return c.fail(ProtocolError, "a frame of a stream on stream 0 (RFC 9113 section 6)")
		}
	case frameSettings, framePing, frameGoAway:
		if f.stream != 0 {
			return c.fail(ProtocolError, "a frame of the connection on a stream (RFC 9113 section 6)")
		}
	}
	if !lengthFits(f) {
		return c.fail(FrameSizeError, "a frame has not the length that its type asks for (RFC 9113 section 4.2)")
	}
	return nil
}

func lengthFits(f frame) bool {
	switch f.kind {
	case frameReset, frameWindowUpdate:
		return f.length == 4
	case framePing:
		return f.length == 8
	case frameGoAway:
		return f.length >= 8
	case frameSettings:
		return f.length%6 == 0 && (f.length == 0 || !f.has(flagAck))
	}
	return true
}

// fail ends the connection by GOAWAY and returns the error, for good.
func (c *Conn) fail(code Code, reason string) error {
	if c.failed == nil {
		c.failed = &Error{Code: code, Reason: reason}
		c.sendGoAway(min(c.served, c.leaveAt), code, reason)
	}
	return c.failed
}

// reject ends a stream by RST_STREAM for a fault of the peer. s is nil if the
// caller hasn't heard of the stream.
func (c *Conn) reject(id uint32, s *stream, code Code, reason string, ev *Event) error {
	c.sendReset(id, code)
	young := true
	if s != nil {
		young = s.began == c.epoch
		c.close(s, byUs)
	} else if c.graves.find(id) == unknown {
		c.graves.bury(id, byUs)
	}
	ev.clear()
	ev.Kind, ev.Stream, ev.Code, ev.Err = Reset, id, code, &Error{Code: code, Stream: id, Reason: reason}
	if young && !c.client {
		return c.pay()
	}
	return nil
}

// close takes a stream that has ended out of the table. While the caller holds
// bytes of one that ended in order, it stays there.
func (c *Conn) close(s *stream, how ending) {
	c.open--
	c.graves.bury(s.id, how)
	if how == byEnd && s.unconsumed > 0 {
		return
	}
	c.giveBack(s.unconsumed)
	c.streams.remove(s.id)
}

// idle reports whether a stream has never been opened.
func (c *Conn) idle(id uint32) bool {
	if id%2 == 0 {
		return true // nobody pushes
	}
	if c.client {
		return id >= c.next
	}
	return id > c.highest
}

// live returns a stream that is not closed.
func (c *Conn) live(id uint32) *stream {
	if s := c.streams.get(id); s != nil && !s.over() {
		return s
	}
	return nil
}

// Open returns how many streams are open.
func (c *Conn) Open() int { return c.open }

// MidHead reports whether the peer has yet to send its preface or its first
// SETTINGS, or the rest of a header block or of a frame other than DATA: states
// that a caller bounds in time.
func (c *Conn) MidHead() bool { return !c.settled || c.block.open || len(c.partial) > 0 }

// Held returns how many bytes of what came, and of what is to go, are kept. They
// are at most 2 × MaxHeaderBytes, MaxFrame and little more than MaxPending.
func (c *Conn) Held() int { return len(c.partial) + len(c.block.bytes) + len(c.pending) }

// Err returns the error that has ended the connection, or nil.
func (c *Conn) Err() error {
	if c.failed == nil {
		return nil
	}
	return c.failed
}

// AppendPending appends the frames that are owed to the peer. So does everything
// that appends, first, so that all frames go in the order in which they were
// decided.
func (c *Conn) AppendPending(dst []byte) []byte {
	if len(c.pending) == 0 {
		return dst
	}
	dst = append(dst, c.pending...)
	if c.pending = c.pending[:0]; cap(c.pending) > 64 {
		c.pending = nil
	}
	return dst
}

// Pending reports whether there is something for AppendPending.
func (c *Conn) Pending() bool { return len(c.pending) > 0 }

// abandon ends one of the streams that a GOAWAY of the server left out.
func (c *Conn) abandon(ev *Event) bool {
	for _, s := range slices.Backward(c.streams.all) {
		if s.id <= c.peerLast {
			break
		}
		if s.over() {
			continue
		}
		ev.Kind, ev.Stream, ev.Code, ev.Unprocessed = Reset, s.id, RefusedStream, s.unanswered()
		c.close(s, byPeer)
		return true
	}
	c.abandoned = false
	return false
}
