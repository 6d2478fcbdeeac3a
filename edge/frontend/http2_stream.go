package frontend

import (
	"net/http"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http2"
)

// http2Stream is a stream of HTTP/2 whose request is under way.
type http2Stream struct {
	driver  *http2Driver
	id      uint32
	request *request
	head    exchange.Request
	whole   bool // all of the request has come
	tunnel  http2Tunnel

	priority    http2.Priority
	prioritized bool // the client has said what it is

	// The answer, as far as the client does not take it for now.
	left     int64 // of what Content-Length says, or exchange.UnknownLength
	kept     []byte
	at       int // of kept, what is next
	ended    bool
	trailers exchange.Fields
	turn     uint64 // of http2Output, when it had some of kept sent last

	held int // bytes of memory that both bodies are reckoned to hold
}

// errMemory ends an exchange for whose content there is no memory.
var errMemory = memoryError{}

type memoryError struct{}

// Error implements error.
func (memoryError) Error() string {
	return "what connections and requests hold is near the limit of memory"
}

// HTTPStatus says what the client is told.
func (memoryError) HTTPStatus() (code int, reason string) {
	return http.StatusServiceUnavailable, "memory_limit"
}

// hold reckons n bytes of a body, and reports whether there is memory for them.
func (s *http2Stream) hold(n int) bool {
	if !s.driver.client.slot.frontend.memory.take(int64(n), forRequest) {
		return false
	}
	s.held += n
	return true
}

func (s *http2Stream) give(n int) {
	n = min(n, s.held)
	s.held -= n
	s.driver.client.slot.frontend.memory.give(int64(n))
}

// received takes a part of the request's body, or of a tunnel.
func (s *http2Stream) received(p []byte, end bool) {
	s.whole = s.whole || end
	if !s.hold(len(p)) {
		s.request.unwanted = true
		s.request.misfit(errMemory)
		return
	}
	if s.tunnel.waits() {
		s.tunnel.early = append(s.tunnel.early, p...)
		return
	}
	s.request.body(p, end)
}

// receivedEnd takes the request's trailers.
func (s *http2Stream) receivedEnd(trailers exchange.Fields) {
	s.whole = true
	s.request.bodyEnd(trailers) // a tunnel has none
}

// look has the request end if the client is waited for too long. It is not the
// client who is waited for as long as it has no window, if for others' sake, and
// while the connection moves, if slowly.
func (s *http2Stream) look(now time.Duration) (next time.Duration) {
	d, q := s.driver, s.request
	moves := d.output.full && d.client.moved == now
	if moves && s.waits() {
		q.took = now
	}
	if !q.tunnel && !s.whole && (moves || d.machine.Granted(s.id) == 0) {
		q.came = now
	}
	return q.look(now)
}

// informational implements stream.
func (s *http2Stream) informational(r *exchange.Response) {
	d := s.driver
	out, _ := d.machine.AppendInformational(d.client.lane.out[:0], s.id, r) // one that the client would not take is left out
	d.write(out)
}

// respond implements stream.
func (s *http2Stream) respond(r *exchange.Response, end bool) error {
	d := s.driver
	if err := s.tunnel.check(r); err != nil {
		return err
	}
	out, err := d.machine.AppendResponse(d.client.lane.out[:0], s.id, r, end)
	d.write(out)
	if err != nil {
		return err
	}
	s.left = r.Length
	if s.head.Method == http.MethodHead || r.Status == http.StatusNoContent || r.Status == http.StatusNotModified {
		s.left = exchange.UnknownLength // whatever it says, there is no body
	}
	if r.Status == http.StatusSwitchingProtocols {
		s.left = exchange.UnknownLength
		s.opened()
	}
	if d.client.leaves() {
		d.leave()
	}
	return nil
}

// data implements stream.
func (s *http2Stream) data(p []byte, end bool) error {
	if len(p) == 0 {
		if end {
			return s.end(nil)
		}
		return nil
	}
	if err := s.account(len(p), end); err != nil {
		return err
	}
	d, n := s.driver, 0
	if !s.waits() && !d.output.full {
		var out []byte
		var err error
		out, n, err = d.machine.AppendData(d.client.lane.out[:0], s.id, p, end)
		d.write(out)
		if err != nil {
			return err
		}
	}
	if n < len(p) {
		if !s.hold(len(p) - n) {
			return errMemory
		}
		s.keep(p[n:])
		s.ended = end
	}
	if n > 0 {
		s.request.taken(n) // may be the end of it
	}
	return nil
}

// keep keeps a part of the answer until the client takes it. What was sent of kept
// makes room for it.
func (s *http2Stream) keep(p []byte) {
	if s.at > len(s.kept)/2 {
		s.kept = s.kept[:copy(s.kept, s.kept[s.at:])]
		s.at = 0
	}
	s.kept = append(s.kept, p...)
	s.driver.output.add(s)
}

// end implements stream.
func (s *http2Stream) end(trailers exchange.Fields) error {
	if err := s.account(0, true); err != nil {
		return err
	}
	if s.waits() {
		s.ended, s.trailers = true, trailers
		return nil
	}
	d := s.driver
	out, err := s.appendEnd(d.client.lane.out[:0], trailers)
	d.write(out)
	return err
}

func (s *http2Stream) appendEnd(out []byte, trailers exchange.Fields) ([]byte, error) {
	if len(trailers) > 0 {
		return s.driver.machine.AppendTrailers(out, s.id, trailers)
	}
	out, _, err := s.driver.machine.AppendData(out, s.id, nil, true)
	return out, err
}

// account checks the answer's body against its length, since some of it may be
// sent much later.
func (s *http2Stream) account(n int, end bool) error {
	switch {
	case s.left == exchange.UnknownLength:
	case int64(n) > s.left, end && int64(n) < s.left:
		return http2.ErrLength
	default:
		s.left -= int64(n)
	}
	return nil
}

// waits reports whether a part of the answer waits for the client.
func (s *http2Stream) waits() bool { return s.at < len(s.kept) }

// accept implements stream.
func (s *http2Stream) accept(n int) {
	d := s.driver
	s.give(n)
	d.machine.Consumed(s.id, n)
	if d.machine.Pending() && !d.busy {
		d.write(d.machine.AppendPending(d.client.lane.out[:0]))
	}
}

// cut implements stream.
func (s *http2Stream) cut() {
	code := http2.InternalError
	if s.tunnel.asked {
		code = http2.Cancel // RFC 8441 section 5
	}
	s.driver.machine.Reset(s.id, code)
}

// over implements stream. After a whole answer the client is told that the rest of
// its request is not wanted (RFC 9113 section 8.1).
func (s *http2Stream) over() {
	d := s.driver
	d.machine.Reset(s.id, http2.NoError)
	s.leave()
	s.head.Fields = s.request.head.Fields // the memory has grown
	d.client.lane.h2.recycle(s)
	d.settle()
}

// abandon ends the request of a stream that has ended.
func (s *http2Stream) abandon(err error) {
	d := s.driver
	s.leave()
	s.request.gone(err)
	d.client.lane.h2.recycle(s)
}

// leave takes the stream out of what the driver knows.
func (s *http2Stream) leave() {
	d := s.driver
	s.give(s.held)
	d.output.remove(s)
	if at, ok := d.place(s.id); ok {
		copy(d.streams[at:], d.streams[at+1:])
		d.streams[len(d.streams)-1] = nil
		d.streams = d.streams[:len(d.streams)-1]
	}
}
