package exchange

// An exchange under way has two ends that tell each other what happens: a Flow
// towards the backend and a Front towards the client. Both belong to one loop, the
// one of the client's connection: all calls are made on it, none blocks, and no
// state of an exchange needs a lock. A leg whose own connection lives on another
// loop sees to the crossing itself.
//
// A Flow never calls its Front from within a call of the Front's owner: what goes
// wrong in such a call is told later in the same round of the loop, or in the
// next. A Front may call its Flow at any time, also from within calls of its own.
//
// An exchange is over when both messages have ended, after Failed, or once Abort
// was called. Then, and not before, the request that it began with may be used for
// something else.

// Windows bound what one leg hands to the other before that has got rid of it, in
// bytes. They are what HTTP/2 offers to clients and backends per stream.
const (
	// UploadWindow is what Flow.Data may be ahead of Front.Sent.
	UploadWindow = 256 << 10
	// AnswerWindow is what Front.Data may be ahead of Flow.Consumed.
	AnswerWindow = 256 << 10
)

// Flow takes a request to a backend. The backend's leg implements it.
type Flow interface {
	// Data sends a part of the request's body, or of what the client sends through
	// a tunnel. With end nothing follows. p is not kept.
	Data(p []byte, end bool)
	// End ends the request with its trailers, or the client's direction of a
	// tunnel. It is called for each message that did not end otherwise: by a length
	// of 0, or by Data.
	End(trailers Fields)
	// Consumed says that the client's leg has got rid of n bytes of the answer.
	Consumed(n int)
	// Abort gives the exchange up, for the client's part. Nothing of the Front is
	// called afterwards. It has no effect on one that is over.
	Abort(cause error)
}

// Front takes the answer to a client. The frontend implements it.
type Front interface {
	// Informational brings a 1xx response other than 101. 100 says that the body is
	// wanted, by whomever: a client that waits for it, and no other, is told.
	Informational(r *Response)
	// Response brings the head of the answer; with end it has no body. 101 makes a
	// tunnel of the exchange: Data and End go both ways. r is good until Response
	// returns, its Fields are the Front's.
	Response(r *Response, end bool)
	// Data brings a part of the body, or of what the backend sends through a tunnel.
	// With end nothing follows. p is good until Data returns.
	Data(p []byte, end bool)
	// End ends the answer with its trailers, or the backend's direction of a tunnel.
	// It is called when neither Response nor Data has ended it.
	End(trailers Fields)
	// Failed ends the exchange, before or after Response. An error with a method
	// HTTPStatus() (code int, reason string) decides what the client is told; any
	// other is 502 upstream_error.
	Failed(err error)
	// Sent says that the backend's leg has got rid of n bytes of the request's body.
	Sent(n int)
}
