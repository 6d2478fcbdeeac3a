package h2

import (
	"errors"
	"slices"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http2"
)

// Stream is an exchange on a connection, its Flow.
type Stream struct {
	c       *Conn
	front   exchange.Front
	request *exchange.Request
	client  uint64
	id      uint32 // 0: it has not begun
	before  int64  // bytes of the connection that the kernel had when it began

	queue    []byte // of the request's body, that may not be sent yet
	ends     bool   // nothing follows the queue but trailers
	trailers exchange.Fields
	waits    bool // is in Conn.blocked

	requestOver, answerOver bool
	answered                bool
	freed                   bool // the stream is given back
	over                    bool // nothing is called any more

	listed  bool // is in Conn.news
	sent    int  // bytes that the Front has to be told of
	failure *Failure
}

// Begin sends a request on a stream, of which the caller has made sure that it is
// free. r is used until the exchange is over, and is what goes out then: the scheme
// is that of our own connection, and no other protocol is asked for. client is what
// Owner.Response gets.
func (c *Conn) Begin(client uint64, r *exchange.Request, front exchange.Front) exchange.Flow {
	r.Scheme, r.Protocol = "https", ""
	s := &Stream{c: c, front: front, request: r, client: client, requestOver: r.Length == 0}
	c.open(s)
	return s
}

// open begins a stream, or puts that off.
func (c *Conn) open(s *Stream) {
	switch {
	case s.over:
	case c.ended != nil:
		s.failLate(Failure{Kind: Lost, Err: c.ended})
	case c.full:
		c.starting = append(c.starting, s)
	default:
		s.start()
	}
}

func (s *Stream) start() {
	c := s.c
	b := buffers.Get().(*[]byte)
	before := c.wire.Written()
	out, id, err := c.machine.AppendRequest(*b, s.request, s.request.Length == 0)
	c.write(b, out)
	switch {
	case err == nil:
		s.id, s.before = id, before
		c.streams[id] = s
		c.pump(s)
	case errors.Is(err, http2.ErrNoStream):
		// The backend has just changed its mind, or the numbers are used up.
		if c.machine.Open() < c.machine.Limit() {
			c.cfg.Owner.Unwanted()
		}
		s.failLate(Failure{Kind: Lost, Err: err, Unread: true})
	case errors.Is(err, http2.ErrTooLarge):
		s.failLate(Failure{Kind: TooLarge, Err: err})
	case c.machine.Err() != nil:
		s.failLate(Failure{Kind: Lost, Err: err})
	default:
		s.failLate(Failure{Kind: Invalid, Err: err})
	}
}

// Data implements exchange.Flow.
func (s *Stream) Data(p []byte, end bool) {
	if s.over {
		return
	}
	s.ends = s.ends || end
	for len(s.queue) == 0 && s.mayWrite() {
		part := p[:min(len(p), turn)]
		n := s.send(part, end && len(part) == len(p))
		if p = p[n:]; len(p) == 0 || s.over {
			return
		}
		if n < len(part) {
			break
		}
	}
	s.queue = append(s.queue, p...)
	s.c.block(s)
}

// End implements exchange.Flow.
func (s *Stream) End(trailers exchange.Fields) {
	if s.over {
		return
	}
	s.ends, s.trailers = true, allowed(trailers)
	s.c.pump(s)
}

// Consumed implements exchange.Flow.
func (s *Stream) Consumed(n int) {
	if !s.over && s.id != 0 {
		s.c.machine.Consumed(s.id, n)
		s.c.flush()
	}
}

// Abort implements exchange.Flow.
func (s *Stream) Abort(error) {
	if s.over {
		return
	}
	s.over = true
	s.cancel(http2.Cancel)
}

// mayWrite reports whether something of the request can be sent at once.
func (s *Stream) mayWrite() bool { return s.freed || s.id != 0 && !s.c.full && s.c.ended == nil }

// send sends as much of p as may go, and returns how much that is. What a stream has
// left that has ended is thrown away.
func (s *Stream) send(p []byte, end bool) int {
	c := s.c
	n, last := len(p), end && s.trailers == nil
	if !s.freed {
		b := buffers.Get().(*[]byte)
		out, sent, err := c.machine.AppendData(*b, s.id, p, last)
		c.write(b, out)
		if err != nil {
			s.broken(err)
			return 0
		}
		n = sent
	}
	s.tellSent(n)
	if last && n == len(p) {
		s.requestEnded()
	}
	return n
}

// broken ends an exchange whose request breaks a rule on its way.
func (s *Stream) broken(err error) {
	kind := Invalid
	if errors.Is(err, http2.ErrTooLarge) {
		kind = TooLarge
	}
	s.failLate(Failure{Kind: kind, Err: err, Written: true, Uploading: true})
	s.cancel(http2.Cancel)
}

// requestEnded notes that the request was sent to its end.
func (s *Stream) requestEnded() {
	s.requestOver = true
	if s.answerOver {
		s.finish()
		s.over = true
	}
}

// finish gives the stream back that has ended in order, with what its Front has not
// consumed.
func (s *Stream) finish() {
	if s.freed {
		return
	}
	s.freed = true
	c := s.c
	c.forget(s)
	delete(c.streams, s.id)
	c.machine.Consumed(s.id, c.machine.Unconsumed(s.id))
	c.flush()
	c.cfg.Owner.Free(1, 1, s.answered)
}

// cancel resets the stream, if it has begun, and gives it back.
func (s *Stream) cancel(code http2.Code) {
	if s.freed {
		return
	}
	s.freed, s.queue = true, nil
	c := s.c
	c.forget(s)
	if s.id == 0 || c.ended != nil {
		c.cfg.Owner.Free(1, 1, s.answered)
		return
	}
	delete(c.streams, s.id)
	c.machine.Reset(s.id, code)
	c.flush()
	c.cool(s.answered)
}

// take takes what comes on the stream.
func (s *Stream) take(ev *http2.Event) {
	c := s.c
	c.mayPing = c.mayPing || ev.Kind != http2.Reset
	switch ev.Kind {
	case http2.Informational:
		s.front.Informational(&ev.Response)
		ev.Response.Fields = nil
	case http2.Response:
		s.answered = true
		c.cfg.Owner.Response(s.client, &ev.Response)
		end := s.answerEnds(ev.End)
		s.front.Response(&ev.Response, end)
		ev.Response.Fields = nil
	case http2.Data:
		s.front.Data(ev.Data, s.answerEnds(ev.End))
	case http2.Trailers:
		s.answerEnds(true)
		s.front.End(allowed(ev.Trailers))
		ev.Trailers = nil
	case http2.Reset:
		s.resetBy(ev)
	}
}

// answerEnds notes the end of the answer, if it is that.
func (s *Stream) answerEnds(end bool) bool {
	if end {
		s.answerOver = true
		if s.requestOver {
			s.over = true
			s.finish()
		}
	}
	return end
}

// resetBy takes a reset: by the backend, or by us, because of what it did.
func (s *Stream) resetBy(ev *http2.Event) {
	c := s.c
	delete(c.streams, s.id)
	if ev.Code == http2.ProtocolError && ev.Err == nil {
		c.cfg.Owner.Unwanted() // it finds us wrong, and would go on like that
	}
	if s.answerOver {
		// The rest of the request is of no use to it any more.
		s.free()
		s.discard()
		return
	}
	f := Failure{Kind: Reset, Err: &http2.Error{Code: ev.Code, Stream: s.id, Reason: "the backend has reset the stream"}, Written: true}
	switch {
	case ev.Unprocessed:
		f.Kind, f.Written, f.Unread = Lost, false, true
	case ev.Err != nil:
		f.Kind, f.Err = Broken, ev.Err
	}
	s.fail(f)
}

// discard throws away what waits to be sent.
func (s *Stream) discard() {
	n := len(s.queue)
	s.queue = nil
	s.tellSent(n)
	if s.ends {
		s.requestOver, s.over = true, true
	}
}

// fail ends the exchange. It is not called from within a call of the Front.
func (s *Stream) fail(f Failure) {
	switch {
	case s.over:
		return
	case s.answerOver:
		s.free()
		s.discard()
		return
	}
	s.over = true
	f.Uploading = !s.requestOver
	s.free()
	s.queue = nil
	s.c.forget(s)
	s.front.Failed(s.c.cfg.Owner.Failed(f))
}

// free gives a stream back that has ended by itself.
func (s *Stream) free() {
	if !s.freed {
		s.freed = true
		s.c.cfg.Owner.Free(1, 1, s.answered)
	}
}

// failLate has the exchange fail later in the round.
func (s *Stream) failLate(f Failure) {
	s.failure = &f
	s.list()
}

// tellSent has the Front told later in the round.
func (s *Stream) tellSent(n int) {
	if n > 0 {
		s.sent += n
		s.list()
	}
}

func (s *Stream) list() {
	c := s.c
	if !s.listed {
		s.listed = true
		c.news = append(c.news, s)
	}
	if !c.telling {
		c.telling = true
		c.loop.Post(c.tellLate)
	}
}

// tell tells Fronts what was put off. What is written for a backend that is stuck
// does not count as sent: whoever waits has to know for whom.
func (c *Conn) tell() {
	news := c.news
	c.news, c.telling = nil, false
	for _, s := range news {
		s.listed = false
		if n := s.sent; n > 0 && !s.over {
			if c.stuck && !s.freed && s.failure == nil {
				s.listed = true
				c.news = append(c.news, s)
				continue
			}
			s.sent = 0
			s.front.Sent(n)
		}
		if f := s.failure; f != nil {
			s.failure = nil
			s.fail(*f)
		}
	}
	clear(news)
	if c.news == nil {
		c.news = news[:0]
	}
}

// block has a stream wait for its turn to send.
func (c *Conn) block(s *Stream) {
	if !s.waits {
		s.waits = true
		c.blocked = append(c.blocked, s)
	}
}

// forget has a stream that is over wait no longer.
func (c *Conn) forget(s *Stream) {
	if s.waits {
		s.waits = false
		c.blocked = slices.DeleteFunc(c.blocked, func(other *Stream) bool { return other == s })
	}
	if s.id == 0 {
		c.starting = slices.DeleteFunc(c.starting, func(other *Stream) bool { return other == s })
	}
}

// pump sends what one stream has.
func (c *Conn) pump(s *Stream) {
	for s.owes() && s.mayWrite() && s.step() {
	}
	if s.owes() {
		c.block(s)
	}
}

// pumpAll sends what streams have that wait, in turns.
func (c *Conn) pumpAll() {
	for moved := true; moved; {
		moved = false
		blocked := c.blocked
		c.blocked = nil
		for _, s := range blocked {
			s.waits = false
			moved = s.owes() && s.mayWrite() && s.step() || moved
			if s.owes() {
				c.block(s)
			}
		}
	}
}

// owes reports whether there is something of the request to be sent.
func (s *Stream) owes() bool {
	return !s.over && !s.requestOver && (len(s.queue) > 0 || s.ends)
}

// step sends a part of what the stream has, and reports whether something went.
func (s *Stream) step() bool {
	if len(s.queue) == 0 {
		if s.ends {
			s.sendEnd()
		}
		return false
	}
	part := s.queue[:min(len(s.queue), turn)]
	n := s.send(part, s.ends && len(part) == len(s.queue))
	if s.over {
		return false
	}
	if s.queue = s.queue[n:]; len(s.queue) == 0 {
		s.queue = nil
	}
	return n > 0
}

// sendEnd ends the request behind its body.
func (s *Stream) sendEnd() {
	if s.trailers == nil {
		s.send(nil, true)
		return
	}
	if !s.freed {
		b := buffers.Get().(*[]byte)
		out, err := s.c.machine.AppendTrailers(*b, s.id, s.trailers)
		s.c.write(b, out)
		if err != nil {
			s.broken(err)
			return
		}
	}
	s.requestEnded()
}

// allowed are the trailers that may be passed on, nil if there are none.
func allowed(trailers exchange.Fields) exchange.Fields {
	var kept exchange.Fields
	for i := range trailers {
		if exchange.TrailerAllowed(trailers[i].Name) {
			kept = append(kept, trailers[i])
		}
	}
	return kept
}
