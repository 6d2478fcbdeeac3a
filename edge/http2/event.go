package http2

import "github.com/reseal/reseal/edge/exchange"

// Kind says what an Event tells.
type Kind int8

// Kinds of events. In brackets: the fields of Event that are set beside Stream.
const (
	// None: more bytes are needed.
	None Kind = iota
	// Request has come (Request, End, Priority). Server only.
	Request
	// Refused is a request that is well-formed and not to be served (Request as
	// far as it is known; End, Status, Reason). The caller answers it, with Status
	// or another; its body is thrown away here. Server only.
	Refused
	// Informational response, 1xx (Response). Client only.
	Informational
	// Response, the final one (Response, End). Client only.
	Response
	// Data of a body (Data, End). Data may be empty, with End. The caller owes
	// Consumed for all of it, or Reset.
	Data
	// Trailers end a message (Trailers).
	Trailers
	// Reset: the stream has ended before its time (Code, Unprocessed; Err, if it
	// was this side that reset it). The caller may never have heard of the stream,
	// when its request was malformed.
	Reset
	// Window: AppendData may send again on the stream, or, with Stream 0, on any.
	Window
	// Settings of the peer have changed: Available, Writable and
	// ExtendedConnect may say otherwise.
	Settings
	// GoAway: the peer takes no more streams (Code, Last, Data: its debug data).
	// A Reset follows for each stream that it won't process.
	GoAway
	// Pong answers Ping.
	Pong
	// Reprioritized: the client has changed its mind about a stream (Priority).
	Reprioritized
)

var kindNames = [...]string{
	"None", "Request", "Refused", "Informational", "Response", "Data", "Trailers", "Reset", "Window", "Settings", "GoAway",
	"Pong", "Reprioritized",
}

// String returns the kind's name.
func (k Kind) String() string { return kindNames[k] }

// Event is what Next tells. It belongs to the caller, who can use one for all
// connections: what Next needs to decode a head stays in it. Whatever is not set
// by an event is zero, but for the memory of Request.Fields, Response.Fields and
// Trailers: Next uses it again, unless the caller keeps them and leaves nil, or
// other memory, in their place.
type Event struct {
	Kind   Kind
	Stream uint32
	// End is set on the last event of a message.
	End bool
	// Unprocessed is set when the peer has not acted on the request, so that it
	// can be sent again (RFC 9113 section 8.7).
	Unprocessed bool
	// Status is the status with which to answer a refused request, Reason says why
	// in the words of the statistics, like header_too_large.
	Status int
	Reason string
	Code   Code
	// Last is the last stream that the peer of a GoAway may process.
	Last     uint32
	Priority Priority
	// Data is a part of the bytes that were given to Next.
	Data     []byte
	Request  exchange.Request
	Response exchange.Response
	Trailers exchange.Fields
	Err      *Error

	heads scratch
}

// clear forgets the last event.
func (e *Event) clear() {
	e.Kind, e.Stream, e.End, e.Unprocessed, e.Code, e.Last = None, 0, false, false, NoError, 0
	e.Status, e.Reason = 0, ""
	e.Priority, e.Data, e.Err = Priority{Urgency: defaultUrgency}, nil, nil
	e.Request = exchange.Request{Fields: e.Request.Fields[:0]}
	e.Response = exchange.Response{Fields: e.Response.Fields[:0]}
	e.Trailers = e.Trailers[:0]
}
