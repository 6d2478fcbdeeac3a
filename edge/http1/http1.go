// Package http1 is HTTP/1 without input, output, clocks and goroutines: bytes go
// in, events and bytes come out. A Conn is one connection, in the role of the
// server towards a client or of the client towards a backend. It is what the data
// path is moving to: whoever owns a connection reads it, calls Next with what came,
// and writes what the Append methods made.
//
// It rejects and never repairs: what two parsers could take for two different
// messages is an Error, and so is a message that can't be written as it was
// announced. It owns the boundaries of messages, and it alone says whether a
// connection is Reusable: when both directions provably stand at a boundary and
// nobody said that the connection ends.
//
// A Conn holds no buffer. What Next has not consumed stays with the caller, who
// passes it again with more behind it; Next remembers how far it has searched, so
// that a head which comes byte by byte costs as much as one that comes at once.
// Nothing here is safe for use by two goroutines at a time.
package http1

import (
	"errors"

	"github.com/reseal/reseal/edge/exchange"
)

// Limits bound what a peer may send. A zero stands for the default.
type Limits struct {
	// HeadBytes bounds a head, from its first line to its empty line. Default 64 KiB.
	HeadBytes int
	// Fields bounds the field lines of a head, and those of a trailer section.
	// Default 100.
	Fields int
	// TrailerBytes bounds a trailer section. Default 16 KiB.
	TrailerBytes int
}

// maxInformational bounds the informational responses to one request.
const maxInformational = 100

// maxOptions bounds what a message may name in Connection.
const maxOptions = 64

// Conn is the state of a connection.
type Conn struct {
	limits Limits
	client bool

	reading reading
	writing writing
	body    exchange.Body // of the message that is read
	seen    int           // bytes of an unfinished head that were searched
	left    int64         // of the announced length of the message that is written
	err     error         // why reading stopped

	// The exchange under way.
	protocol      string // that the request asked for
	hops          string // fields that must not go on, if trailers may follow
	head          bool   // its method is HEAD
	http10        bool   // the client speaks HTTP/1.0
	persist       bool   // both heads, as far as they are known, let the connection live
	expects       bool   // the client waits for 100, as far as we know
	blank         bool   // an empty line came before the request
	informational uint8

	closing bool // the exchange is the last one
	unread  bool // reading stopped before the end of a message
}

type reading int8

const (
	readHead reading = iota
	readBody
	readEnd // of a message; the next begins when the other direction has ended, too
	readRaw
	readStopped
)

type writing int8

const (
	writeNone   writing = iota // nothing to answer, or no request under way
	writeHead                  // an answer is owed
	writeLength                // a body of known length
	writeChunks
	writeToClose
	writeRaw
	writeEnd
)

// NewServer returns the edge's side of a client's connection.
func NewServer(limits Limits) *Conn { return &Conn{limits: limits.orDefault()} }

// NewClient returns the edge's side of a backend's connection.
func NewClient(limits Limits) *Conn { return &Conn{limits: limits.orDefault(), client: true} }

func (l Limits) orDefault() Limits {
	if l.HeadBytes == 0 {
		l.HeadBytes = 64 << 10
	}
	if l.Fields == 0 {
		l.Fields = 100
	}
	if l.TrailerBytes == 0 {
		l.TrailerBytes = 16 << 10
	}
	return l
}

// Reusable reports whether the connection stands between two exchanges and may
// carry another one. In the role of the client the caller must not hold bytes that
// Next has not consumed: Next tells that they answer nothing. An answer that has
// ended before its request leaves the choice to the caller, in both roles: to go on
// to the end of the request, or to close.
func (c *Conn) Reusable() bool { return c.free() && !c.closing }

// Last reports whether the exchange under way is the connection's last one, as far
// as is known.
func (c *Conn) Last() bool { return c.closing || !c.persist }

// free reports whether an exchange may begin, if only the last one.
func (c *Conn) free() bool { return c.reading == readHead && c.writing == writeNone && c.seen == 0 }

// Over reports whether the connection has nothing more to do and is to be closed.
func (c *Conn) Over() bool {
	return c.reading == readStopped && (c.client || c.writing == writeNone || c.writing == writeEnd)
}

// Lingers reports whether the client may still be sending what nobody reads. Then
// the connection is closed for writing first, and read for a while, or the client
// may lose the answer to a reset (RFC 9112 section 9.6). The same holds when the
// caller has bytes that Next has not consumed.
func (c *Conn) Lingers() bool { return c.unread }

// CloseAfter makes the exchange under way, or the next one, the last one. A head
// that is written from now on says so.
func (c *Conn) CloseAfter() { c.closing = true }

// StopReading gives up on what the client has still to send: it takes too long, or
// is not wanted. An answer may be written yet, also to a request that has not come
// as a whole, and is the last one.
func (c *Conn) StopReading() {
	if c.reading == readHead || c.reading == readBody {
		c.stop(nil)
	}
	c.closing = true
}

// stop ends reading before the end of a message.
func (c *Conn) stop(err error) {
	c.reading, c.err = readStopped, err
	c.closing, c.unread = true, true
	if !c.client && c.writing == writeNone {
		c.writing = writeHead
	}
}

// turn ends the exchange once both directions have ended.
func (c *Conn) turn() {
	switch {
	case c.reading != readEnd || c.writing != writeEnd:
	case c.closing || !c.persist:
		c.reading = readStopped
	default:
		*c = Conn{limits: c.limits, client: c.client}
	}
}

// Error is why a message is refused. Nothing is read after it; in the role of the
// server an answer may be written, if none has begun, and is the last one.
type Error struct {
	// Status is what answers the client: 4xx or 5xx, 499 when it is gone.
	Status int
	// Reason is the word of logs and counters.
	Reason string
	// Err says what is wrong, and where.
	Err error
}

// Error implements error.
func (e *Error) Error() string { return e.Reason + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// HTTPStatus returns the status and the reason.
func (e *Error) HTTPStatus() (code int, reason string) { return e.Status, e.Reason }

// fail refuses what came. A backend that breaks HTTP has one reason.
func (c *Conn) fail(err *Error) error {
	if c.client {
		err.Status, err.Reason = 502, "protocol_error"
	}
	c.stop(err)
	return err
}

// refused is a request that nobody can tell the meaning of, or a response.
func refused(err error) *Error {
	status := 400
	if errors.Is(err, exchange.ErrCoding) {
		status = 501
	}
	return &Error{status, "bad_request", err}
}
