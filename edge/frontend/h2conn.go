package frontend

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// What an HTTP/2 client may do besides requests and their bodies. A frame that
// costs us work and brings nobody anything takes one from a client's credit; a
// client without credit is told ENHANCE_YOUR_CALM. Ordinary clients earn more
// than they use, so that they never notice.
const (
	// floodCredit is what a connection has at first and at most. A browser that
	// gives up a page resets up to maxConcurrentStreams at once.
	floodCredit = 500
	// floodRefill is earned per second.
	floodRefill = 100
	// dataCredit is earned by each DATA frame that we send: some clients (gRPC)
	// answer with a PING.
	dataCredit = 3
	// Window updates are free as far as we sent content: two, for stream and
	// connection, for each updatePart bytes or fewer of a DATA frame. Go's client
	// gives windows back for each 4 KiB that are read of it, maybe much later.
	updatePart = 1 << 10
	maxUpdates = 1 << 20
	// youngStream is how long a stream must live so that its reset is free. Ends
	// by a time limit, of either side, are not a flood.
	youngStream = time.Second
	// faultCost is what it costs to break the protocol on a stream: a backend
	// connection may be lost with it, and no client has reason to.
	faultCost = 10
)

// errFlood has the server send GOAWAY and end the connection (RFC 9113 section
// 7).
const errFlood = http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)

// h2Conn is a client's HTTP/2 connection as the server sees it. It reads along,
// frame by frame, and ends connections of clients that flood it (RFC 9113 section
// 10.5): with streams that they or, for a fault of theirs, we reset at once, with
// PING, SETTINGS, PRIORITY and window updates, with empty DATA and CONTINUATION.
type h2Conn struct {
	*tls.Conn
	client *clientConn
	out    frameScanner // used by Write alone

	// Used by Read alone.
	stream   settingsReader
	in       frameScanner
	inHeader bool // more frames of a header block, or the first frame of all, must come
	inBlock  bool // the last frame was one of a header block
	timed    bool // a deadline is set for it

	mu       sync.Mutex
	credit   float64
	updates  int // of windows, that are free
	refilled time.Time
	young    map[uint32]time.Time // when open streams began
	flooded  bool
}

func newH2Conn(conn *tls.Conn, client *clientConn) *h2Conn {
	c := &h2Conn{Conn: conn, client: client, credit: floodCredit, refilled: time.Now(), young: map[uint32]time.Time{}}
	c.in = frameScanner{skip: len(http2.ClientPreface), frame: c.received}
	c.inHeader = true
	c.stream = settingsReader{src: conn, skip: len(http2.ClientPreface)}
	c.out = frameScanner{frame: c.sent}
	client.h2 = c
	return c
}

// Read implements net.Conn. It fails with errFlood and errLeave.
func (c *h2Conn) Read(p []byte) (int, error) {
	c.boundHeader()
	if c.client.leaves(nil) {
		return 0, errLeave
	}
	n, err := c.stream.Read(p)
	if err != nil && c.client.leaves(err) {
		return 0, errLeave
	}
	c.in.scan(p[:n])
	if c.isFlooded() {
		return 0, errFlood
	}
	return n, err
}

// Write implements net.Conn.
func (c *h2Conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out.scan(p[:n])
	return n, err
}

// boundHeader gives the client the listener's header time for the preface with
// its first frame, and for a header block (RFC 9113 section 4.3), from its first
// frame to the end of its last.
func (c *h2Conn) boundHeader() {
	unfinished := c.inHeader || c.inBlock && c.in.skip > 0
	switch {
	case unfinished && !c.timed:
		_ = c.SetReadDeadline(time.Now().Add(c.client.slot.state.Load().settings().header)) // fails only on a closed connection
	case !unfinished && c.timed:
		_ = c.SetReadDeadline(time.Time{}) // likewise
	}
	c.timed = unfinished
}

func (c *h2Conn) isFlooded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flooded
}

// received accounts for a frame of the client.
func (c *h2Conn) received(f frame) {
	c.inBlock = f.kind == http2.FrameHeaders || f.kind == http2.FrameContinuation
	c.inHeader = c.inBlock && !f.has(http2.FlagHeadersEndHeaders) // the same bit for both
	c.mu.Lock()
	defer c.mu.Unlock()
	switch f.kind {
	case http2.FrameHeaders:
		if _, open := c.young[f.stream]; !open && f.stream%2 == 1 {
			c.young[f.stream] = time.Now()
		}
	case http2.FrameRSTStream:
		c.reset(f.stream)
	case http2.FrameData:
		if f.length == 0 && !f.has(http2.FlagDataEndStream) {
			c.pay(1)
		}
	case http2.FrameSettings, http2.FramePing:
		if !f.has(http2.FlagSettingsAck) { // the same bit for both
			c.pay(1)
		}
	case http2.FrameWindowUpdate:
		if c.updates--; c.updates < 0 {
			c.updates = 0
			c.pay(1)
		}
	default: // PRIORITY, CONTINUATION, GOAWAY and what we don't know
		c.pay(1)
	}
}

// sent accounts for a frame of ours.
func (c *h2Conn) sent(f frame) {
	if f.kind != http2.FrameHeaders && f.kind != http2.FrameData && f.kind != http2.FrameRSTStream {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case f.kind == http2.FrameRSTStream && (f.code == http2.ErrCodeProtocol || f.code == http2.ErrCodeFlowControl):
		delete(c.young, f.stream)
		c.pay(faultCost)
	case f.kind == http2.FrameRSTStream && f.code != http2.ErrCodeNo:
		c.reset(f.stream)
	case f.kind == http2.FrameRSTStream:
		delete(c.young, f.stream) // the answer was complete before the request was
	case f.has(http2.FlagDataEndStream): // the same bit for HEADERS
		delete(c.young, f.stream)
		c.earn(1)
	}
	if f.kind == http2.FrameData {
		c.earn(dataCredit)
		c.updates = min(c.updates+2*int(1+f.length/updatePart), maxUpdates)
	}
}

// fault accounts for a body that breaks off, of which no frame of ours tells.
func (c *h2Conn) fault() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pay(faultCost)
}

// reset accounts for the reset of a stream. c.mu is held, as for all below.
func (c *h2Conn) reset(stream uint32) {
	began, open := c.young[stream]
	delete(c.young, stream)
	if !open || time.Since(began) < youngStream {
		c.pay(1)
	}
}

func (c *h2Conn) earn(credit float64) { c.credit = min(c.credit+credit, floodCredit) }

func (c *h2Conn) pay(credit float64) {
	c.credit -= credit
	if c.credit >= 0 || c.flooded {
		return
	}
	now := time.Now()
	c.earn(floodRefill * now.Sub(c.refilled).Seconds())
	c.refilled = now
	if c.credit < 0 {
		c.flooded = true
		c.client.flooded()
	}
}

// flooded counts a connection that is ended for a flood.
func (c *clientConn) flooded() {
	c.slot.counters.Error("http2_flood")
	c.slot.frontend.cfg.Logger.Debug("a client floods its HTTP/2 connection with frames that are not requests; it is closed",
		"listener", c.slot.name, "peer", c.source.String())
}

// frame is the head of an HTTP/2 frame (RFC 9113 section 4.1).
type frame struct {
	kind   http2.FrameType
	flags  http2.Flags
	length uint32
	stream uint32
	code   http2.ErrCode // of RST_STREAM
}

func (f frame) has(flag http2.Flags) bool { return f.flags.Has(flag) }

const frameHead = 9

// frameScanner finds the frames in a stream of bytes.
type frameScanner struct {
	skip  int         // bytes up to the next head
	frame func(frame) // called with each

	head [frameHead + 4]byte // and the error code of RST_STREAM
	have int                 // of head
	want int                 // of head, 0: frameHead
}

func (s *frameScanner) scan(data []byte) {
	for len(data) > 0 {
		if s.skip > 0 {
			n := min(s.skip, len(data))
			s.skip -= n
			data = data[n:]
			continue
		}
		want := max(s.want, frameHead)
		n := copy(s.head[s.have:want], data)
		s.have += n
		data = data[n:]
		if s.have < want {
			return
		}
		f := frame{
			length: uint32(s.head[0])<<16 | uint32(s.head[1])<<8 | uint32(s.head[2]),
			kind:   http2.FrameType(s.head[3]),
			flags:  http2.Flags(s.head[4]),
			stream: binary.BigEndian.Uint32(s.head[5:]) &^ (1 << 31),
		}
		if f.kind == http2.FrameRSTStream && f.length == 4 && want == frameHead {
			s.want = len(s.head) // the code, too
			continue
		}
		s.skip = int(f.length)
		if want > frameHead {
			s.skip = 0
			f.code = http2.ErrCode(binary.BigEndian.Uint32(s.head[frameHead:]))
		}
		s.have, s.want = 0, 0
		s.frame(f)
	}
}

// serveHTTP2 has server serve HTTP/2 on connections that read along.
func serveHTTP2(server *http.Server) {
	h2 := &http2.Server{}
	_ = http2.ConfigureServer(server, h2) // fails for a TLSConfig alone, and there is none
	server.TLSNextProto[http2.NextProtoTLS] = func(_ *http.Server, conn *tls.Conn, handler http.Handler) {
		options := &http2.ServeConnOpts{BaseConfig: server, Handler: handler}
		if base, ok := handler.(interface{ BaseContext() context.Context }); ok {
			options.Context = base.BaseContext() // with ConnContext's values
		}
		h2.ServeConn(newH2Conn(conn, clientOf(conn)), options)
	}
}
