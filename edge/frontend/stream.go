package frontend

import (
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// What speaks a protocol with a client (a driver), and what serves requests, meet
// here. All calls are made on the loop of the client's connection, and none blocks.

// driver speaks a protocol with one client: HTTP/1, HTTP/2, or none at all. It
// reads and writes by client.conn.
type driver interface {
	// open begins, when the connection has come to its loop.
	open()
	// read takes what the client has sent. p is good until read returns.
	read(p []byte)
	// peerEnded says that the client sends nothing more: notified by close_notify,
	// else by FIN alone, which means that it has left.
	peerEnded(notified bool)
	// writable says, after a Write that was not welcome, that there is room again.
	writable()
	// look ends what has waited for the client for too long, the requests that are
	// under way included (request.look), and returns when to look again at the
	// latest, from now.
	look(now time.Duration) (next time.Duration)
	// leave asks the client to leave: the requests under way may end. A connection
	// without any is closed. It may be called more than once.
	leave()
	// closed says that the connection has ended. Requests that are under way are told
	// (request.gone).
	closed(err error)
}

// stream is where a request came from, and where its answer goes: an HTTP/1
// connection, a stream of HTTP/2, or a connection of protocol tls. Nothing of it is
// called before request.begin and after over.
type stream interface {
	// informational sends a 1xx response. 100 comes only for a client that waits for it.
	informational(r *exchange.Response)
	// respond sends the head of the answer; with end it has no body. With 101 the
	// stream becomes a tunnel. An error says that it can't be written as it is, and
	// nothing has been.
	respond(r *exchange.Response, end bool) error
	// data sends a part of the body, or of a tunnel. The stream keeps what the client
	// does not take for now and says by request.taken what it has got rid of. An error
	// says that the body is not as it was announced; cut follows.
	data(p []byte, end bool) error
	// end ends the answer, or the backend's direction of a tunnel. Errors are as for
	// data.
	end(trailers exchange.Fields) error
	// accept lets n more bytes of the request's body come: the backend's leg has got
	// rid of as many.
	accept(n int)
	// cut ends the answer before its end, in a way that no client takes for its end;
	// without an answer it ends the stream. over follows.
	cut()
	// over is the last call: the request has been counted and logged. If its body has
	// not come to its end, nothing more of it is wanted, and request must not be
	// called again in any case. The answer was complete, unless it was cut.
	over()
}

// What drivers call:
//
//	q := client.newRequest(stream)  // when a head has come
//	q.begin(head, end)              // serves it; answers may come from within
//	q.refuse(head, status, reason, err) // instead of begin: answers a head that the machine refused
//	q.body(p, end), q.bodyEnd(trailers)
//	q.taken(n)                      // so many bytes of data are off our hands
//	q.gone(err)                     // the client reset the stream, or left; over does not follow
//	q.look(now) (next)              // ends the request if the client is waited for too long
//
// and of the connection:
//
//	client.conn       // *loop.Conn
//	client.lane       // what the connections of a loop share: memory for a call
//	client.settings   // of the listener, as of now
//	client.remind(d)  // driver.look is called after d at the latest
//	client.setActive(bool)
//	client.leaves()   // answers have to say goodbye (HTTP/2: Shutdown, after this one)
//	client.close()    // in order: what was written is sent, close_notify, then the end
//	client.flooded()  // counts and logs ENHANCE_YOUR_CALM
