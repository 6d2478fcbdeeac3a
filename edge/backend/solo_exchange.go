package backend

import (
	"sync/atomic"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http1"
	"github.com/reseal/reseal/edge/loop"
)

// cheapRest is how much of an answer that nobody wants any more is read, to be thrown
// away, so that its connection lives.
const cheapRest = 64 << 10

// solo is the exchange under way on a soloConn. It belongs to the loop.
type solo struct {
	front   exchange.Front // nil: there is none
	event   http1.Event
	in      []byte // what came and was not understood yet
	died    error  // why the connection ended, though not during an exchange
	timer   *loop.Timer
	station *station

	before   int64 // bytes that had gone out when it began
	sent     bool  // the request has ended
	answered bool  // the head of the answer has come
	ended    bool  // the answer has ended
	raw      bool  // both directions carry the bytes of a tunnel
	full     bool  // the connection takes no more for now
	paused   bool
	left     int64 // bytes of the answer's body to come; -1 is unknown
	ahead    int   // bytes that the Front has and has not consumed
	unsent   int   // bytes of the request that the Front does not know to be sent
	drained  int   // bytes that were thrown away

	// waits is since when the connection waits for the client, to take the answer or to
	// send more of its body, in Unix ns; 0: it does not. Whoever looks for a connection
	// to take away reads it.
	waits atomic.Int64
}

// carry implements carrier.
func (c *soloConn) carry(_ *loop.Loop, _ *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow {
	c.front, c.before, c.left, c.raw = front, c.Written(), -1, c.http == nil
	switch {
	case c.Closing():
		if c.died == nil {
			c.died = errClosed
		}
		c.soon(func() { c.lose(c.died) })
	case c.raw:
		c.soon(c.opened)
	default:
		c.request(r)
	}
	c.mark()
	return (*soloFlow)(c)
}

// request sends the head of a request.
func (c *soloConn) request(r *exchange.Request) {
	out, err := c.http.AppendRequest(c.station.scratch[:0], r)
	if err != nil {
		c.soon(func() {
			front := c.front
			c.release()
			c.e.put(c, false)
			front.Failed(fail(ReasonBadRequest, err))
		})
		return
	}
	if r.Length == 0 {
		out, _ = c.http.AppendEnd(out, nil) // fails only when something is missing
		c.sent = true
	}
	c.write(out)
}

// opened tells the Front that a tunnel is open, first of all.
func (c *soloConn) opened() {
	if !c.answered {
		c.answered = true
		c.front.Response(&exchange.Response{Status: 101, Length: exchange.UnknownLength, Version: exchange.HTTP11}, false)
	}
}

// soon tells the Front something that must not be told from within a call of its
// owner's, unless the exchange is over by then.
func (c *soloConn) soon(f func()) {
	front := c.front
	c.Do(func() {
		if c.front == front {
			f()
		}
	})
}

// write sends bytes, which stand in the loop's scratch.
func (c *soloConn) write(out []byte) {
	c.full = !c.Write(out)
	c.station.keep(out)
}

// soloFlow is a soloConn as its exchange's Flow.
type soloFlow soloConn

// Data implements exchange.Flow.
func (f *soloFlow) Data(p []byte, end bool) {
	c := (*soloConn)(f)
	before, behind := c.station.scratch[:0], []byte(nil)
	if c.http != nil {
		var err error
		if before, behind, err = c.http.Frame(before, len(p)); err != nil {
			c.soon(func() { c.fail(clientError{err}) })
			return
		}
	}
	c.write(before)
	c.Write(p)
	c.full = !c.Write(behind)
	c.unsent += len(p)
	c.tellSent()
	if end {
		f.End(nil)
	}
}

// End implements exchange.Flow.
func (f *soloFlow) End(trailers exchange.Fields) {
	c := (*soloConn)(f)
	if c.http != nil {
		out, err := c.http.AppendEnd(c.station.scratch[:0], trailers)
		if err != nil {
			c.soon(func() { c.fail(clientError{err}) })
			return
		}
		c.write(out)
	}
	if c.raw && !c.Closing() {
		c.CloseWrite()
	}
	c.sent = true
	c.mark()
	if c.ended {
		c.finish()
	}
}

// Consumed implements exchange.Flow.
func (f *soloFlow) Consumed(n int) { (*soloConn)(f).consumed(n) }

func (c *soloConn) consumed(n int) {
	c.ahead -= min(n, c.ahead)
	c.mark()
	if c.paused && c.ahead <= exchange.AnswerWindow/2 {
		c.resume()
	}
}

func (c *soloConn) resume() {
	if c.paused {
		c.paused = false
		c.Resume()
	}
}

// Abort implements exchange.Flow. It costs the connection, unless little is left of
// the answer: the rest is read, if it comes within closeTimeout.
func (f *soloFlow) Abort(error) {
	c := (*soloConn)(f)
	if !c.answered || !c.sent || c.raw || c.http.Last() || c.left > cheapRest || c.Closing() {
		c.release()
		c.end()
		return
	}
	c.front = (*soloRest)(c)
	c.consumed(c.ahead)
	if c.timer == nil {
		c.timer = c.Timer(func() {
			c.release()
			c.end()
		})
	}
	c.timer.Set(c.CloseTimeout())
}

// soloRest throws the rest of an answer away.
type soloRest soloConn

// Informational implements exchange.Front.
func (*soloRest) Informational(*exchange.Response) {}

// Response implements exchange.Front.
func (*soloRest) Response(*exchange.Response, bool) {}

// Data implements exchange.Front.
func (f *soloRest) Data(p []byte, end bool) {
	c := (*soloConn)(f)
	if end {
		return
	}
	if c.drained += len(p); c.drained > cheapRest {
		c.release()
		c.end()
		return
	}
	c.consumed(len(p))
}

// End implements exchange.Front.
func (*soloRest) End(exchange.Fields) {}

// Failed implements exchange.Front.
func (*soloRest) Failed(error) {}

// Sent implements exchange.Front.
func (*soloRest) Sent(int) {}

// Writable implements conn.Handler.
func (c *soloConn) Writable() {
	c.full = false
	c.tellSent()
}

// tellSent tells the Front what the connection has taken.
func (c *soloConn) tellSent() {
	if c.full || c.unsent == 0 || c.front == nil {
		return
	}
	n := c.unsent
	c.unsent = 0
	c.mark()
	c.front.Sent(n)
}

// mark notes whether the connection waits for the client from now on.
func (c *soloConn) mark() {
	if c.front != nil && !c.raw && (!c.sent && c.unsent == 0 || c.ahead > 0) {
		c.waits.Store(time.Now().UnixNano())
	} else {
		c.waits.Store(0)
	}
}

// Data implements conn.Handler.
func (c *soloConn) Data(p []byte) {
	switch {
	case c.front == nil:
		c.died = errUnsolicited
		c.end()
	case c.http == nil:
		c.opened()
		c.tell(false, p)
	case len(c.in) > 0:
		c.in = append(c.in, p...)
		c.parse(c.in)
	default:
		c.parse(p)
	}
}

// parse tells the Front what p says. The last is told when it is known whether
// anything follows.
func (c *soloConn) parse(p []byte) {
	head, data := false, []byte(nil)
	for {
		n, err := c.http.Next(p, &c.event)
		p = p[n:]
		kind := c.event.Kind
		if kind == http1.End {
			c.answerEnded(head, data, p)
			return
		}
		if c.tell(head, data); c.front == nil {
			return
		}
		head, data = false, nil
		switch {
		case err != nil && c.answered:
			c.lose(err)
			return
		case err != nil:
			c.fail(fail(ReasonProtocolError, err))
			return
		case kind == http1.None:
			c.keep(p)
			return
		case kind == http1.Informational:
			c.front.Informational(&c.event.Response)
			c.event.Response.Fields = nil
			if c.front == nil {
				return
			}
		case kind == http1.Response:
			c.begun()
			head = true
		default:
			data = c.event.Data
		}
	}
}

// keep keeps what was not understood, for when more comes.
func (c *soloConn) keep(rest []byte) {
	if len(rest) == 0 {
		c.in = nil
		return
	}
	c.in = append(c.in[:0], rest...)
}

// begun notes that an answer has begun.
func (c *soloConn) begun() {
	r := &c.event.Response
	c.answered, c.left = true, r.Length
	if r.Status == 101 {
		c.raw, c.sent = true, false
	}
	if challengesConnection(r.Fields) {
		c.becomePrivate()
	}
}

// tell tells the Front what more follows.
func (c *soloConn) tell(head bool, data []byte) {
	if head {
		c.front.Response(&c.event.Response, false)
		c.event.Response.Fields = nil
	}
	if len(data) > 0 && c.front != nil { // which may have given up
		c.account(data)
		c.front.Data(data, false)
	}
}

// account counts bytes of the answer against the window.
func (c *soloConn) account(data []byte) {
	if c.left > 0 {
		c.left -= int64(len(data))
	}
	if c.ahead += len(data); c.ahead == len(data) {
		c.mark()
	}
	// The connection brings up to 16 KiB at a time.
	if c.ahead+16<<10 > exchange.AnswerWindow && !c.paused {
		c.paused = true
		c.Pause()
	}
}

// answerEnded tells the Front the last of the answer. rest came behind it.
func (c *soloConn) answerEnded(head bool, data, rest []byte) {
	front, r, trailers := c.front, &c.event.Response, c.event.Trailers
	c.keep(rest)
	c.ended = true
	if c.sent {
		c.finish()
	}
	switch {
	case len(trailers) == 0 && len(data) > 0:
		front.Data(data, true)
	case len(trailers) == 0 && head:
		front.Response(r, true)
	default:
		if head {
			front.Response(r, false)
		}
		if len(data) > 0 {
			front.Data(data, false)
		}
		front.End(trailers)
	}
	r.Fields = nil
}

// PeerEnded implements conn.Handler. An end without close_notify is an end, too:
// servers that don't send one are many, and a body whose length is known can't be
// cut by it.
func (c *soloConn) PeerEnded(bool) {
	switch {
	case c.front == nil:
		c.died = errPeerEnded
		c.end()
		return
	case c.http == nil:
		if c.opened(); c.front != nil {
			c.answerEnded(false, nil, nil)
		}
		return
	}
	inHead := !c.answered && len(c.in) > 0
	switch err := c.http.PeerClosed(true, &c.event); {
	case err != nil && inHead:
		c.fail(fail(ReasonReset, err))
	case err != nil:
		c.lose(err)
	case c.event.Kind == http1.End:
		c.answerEnded(false, nil, nil)
	}
}

// finish gives the connection back, both messages having ended.
func (c *soloConn) finish() {
	clean := len(c.in) == 0 && !c.raw
	c.release()
	if clean && c.http.Reusable() && !c.Renegotiated() {
		c.e.put(c, true)
	} else {
		c.end()
	}
}

// lose ends an exchange whose connection is lost.
func (c *soloConn) lose(err error) {
	// What is buffered goes out before the connection is closed.
	c.fail(&lostError{err: err, written: c.Written() > c.before || c.Buffered() > 0})
}

// fail ends the connection, and the exchange on it if there is one.
func (c *soloConn) fail(err error) {
	front := c.front
	c.release()
	c.end()
	if front != nil {
		front.Failed(err)
	}
}

// release forgets the exchange.
func (c *soloConn) release() {
	if c.timer != nil {
		c.timer.Stop()
	}
	c.resume()
	c.front, c.in = nil, nil
	c.sent, c.answered, c.ended, c.raw = false, false, false, false
	c.ahead, c.unsent, c.drained = 0, 0, 0
	c.waits.Store(0)
}
