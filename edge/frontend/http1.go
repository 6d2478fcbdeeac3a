package frontend

import (
	"bytes"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http1"
)

// http1Driver speaks HTTP/1 with a client. It is the stream of all its requests,
// one after the other.
type http1Driver struct {
	serial
	machine *http1.Conn
	rest    []byte        // came, and not dealt with
	since   time.Duration // when the client began to be waited for, or an unfinished head came
	begun   bool          // an unfinished head has come
	parsing bool
	posted  bool // parse will be called by the loop
	toClose bool // the answer ends with the connection
}

func newHTTP1(c *clientConn) *http1Driver {
	bounds := c.settings()
	return &http1Driver{serial: serial{client: c}, machine: http1.NewServer(http1.Limits{HeadBytes: bounds.maxHeaderBytes, Fields: bounds.maxHeaderFields})}
}

// comingTime is how long a client that has to leave may take for a request that it has
// begun, or for the first one of its connection.
const comingTime = 2 * time.Second

// open implements driver.
func (h *http1Driver) open() {
	h.since = h.client.now()
	h.client.remind(h.client.settings().header)
}

// read implements driver.
func (h *http1Driver) read(p []byte) {
	if len(h.rest) > 0 {
		h.rest = append(h.rest, p...)
		h.parse(h.rest)
		return
	}
	h.parse(p)
}

// parse deals with what came, and keeps the rest.
func (h *http1Driver) parse(in []byte) {
	h.parsing = true
	n := 0
	for h.client.conn.Open() {
		view := in[n:]
		if h.request != nil {
			view = view[:min(len(view), exchange.UploadWindow-h.held)]
		}
		used, more := h.next(view)
		n += used
		if !more {
			break
		}
	}
	h.parsing = false
	h.keep(in[n:])
	switch {
	case h.request != nil:
		// What follows the request waits with the kernel. As long as there is nothing,
		// it is read, since the client's end would not be noticed otherwise.
		if len(h.rest) > 0 && h.request.ended || h.held >= exchange.UploadWindow {
			h.client.conn.Pause()
		}
	case h.finished():
		h.client.close()
	case len(h.rest) > 0 && !h.begun:
		h.begun, h.since = true, h.client.now()
		h.client.remind(h.client.settings().header)
	}
}

// keep keeps bytes of rest, or of what was read.
func (h *http1Driver) keep(left []byte) {
	switch {
	case len(left) == 0 || !h.client.conn.Open():
		h.rest = nil
	case len(h.rest) > 0:
		h.rest = h.rest[:copy(h.rest, left)]
	default:
		h.rest = slices.Clone(left)
	}
}

// next deals with one event, and reports whether there may be another.
func (h *http1Driver) next(in []byte) (n int, more bool) {
	event := &h.client.lane.event
	n, err := h.machine.Next(in, event)
	if err != nil {
		h.refuse(in, err)
		return n, false
	}
	switch event.Kind {
	case http1.None:
		return n, false
	case http1.Request:
		h.begin(event)
	case http1.Data, http1.Tunnel:
		if q := h.request; q != nil {
			h.held += len(event.Data)
			q.body(event.Data, false)
		}
	case http1.End:
		if q := h.request; q != nil {
			q.bodyEnd(event.Trailers)
		}
	}
	return n, true
}

// begin begins a request.
func (h *http1Driver) begin(event *http1.Event) {
	r := event.Request
	event.Request.Fields = nil // they are the request's
	h.begun, h.toClose = false, false
	h.client.setActive(true)
	h.request = h.client.newRequest(h)
	h.request.begin(&r, r.Length == 0)
}

// refuse answers what is no request, or not the rest of one.
func (h *http1Driver) refuse(in []byte, err error) {
	var why *http1.Error
	if !errors.As(err, &why) {
		return
	}
	switch q := h.request; {
	case q != nil:
		q.unwanted = true
		q.stop(why.Status, why.Reason, why)
	default:
		var head exchange.Request // nobody knows what it was to be
		if bytes.HasPrefix(in, []byte("HEAD ")) {
			head.Method = http.MethodHead
		}
		h.client.setActive(true)
		h.request = h.client.newRequest(h)
		h.request.refuse(&head, true, why.Status, why.Reason, why)
	}
}

// resume goes on with what was kept, soon.
func (h *http1Driver) resume() {
	if h.parsing || h.posted || !h.client.conn.Open() {
		return
	}
	if len(h.rest) == 0 {
		h.client.conn.Resume()
		return
	}
	h.posted = true
	h.client.lane.loop.Post(func() {
		defer h.client.caught()
		h.posted = false
		if !h.client.conn.Open() {
			return
		}
		h.client.conn.Resume()
		h.parse(h.rest)
	})
}

// peerEnded implements driver. A client that has only said that it sends no more
// waits for its answer.
func (h *http1Driver) peerEnded(notified bool) {
	event := &h.client.lane.event
	err := h.machine.PeerClosed(notified, event)
	q := h.request
	switch {
	case q == nil:
		h.client.close()
	case err != nil:
		h.lost(err)
	case event.Kind == http1.End:
		q.bodyEnd(event.Trailers)
	case q.tunnel:
	case !notified || h.client.conn.Watch():
		h.lost(errLeft)
	}
}

// look implements driver.
func (h *http1Driver) look(now time.Duration) time.Duration {
	bounds := h.client.settings()
	if h.request != nil {
		return h.lookAt(now)
	}
	limit := bounds.idle
	if h.coming() {
		limit = bounds.header
		if h.client.out.Load() {
			limit = min(limit, comingTime)
		}
	}
	if left := h.since + limit - now; left > 0 {
		return left
	}
	h.client.close()
	return never
}

// coming reports whether a request is to be expected: a part of one has come, or the
// connection is new.
func (h *http1Driver) coming() bool { return h.begun || h.client.requests == 0 }

// leave implements driver. A client that has just connected did so for a request, and
// could not know that it should not: it gets an answer if the request comes soon.
func (h *http1Driver) leave() {
	h.machine.CloseAfter()
	if h.request != nil {
		return
	}
	if left := h.since + comingTime - h.client.now(); h.coming() && left > 0 && !h.client.dismissed.Load() {
		h.client.remind(left)
		return
	}
	h.client.close()
}

// informational implements stream.
func (h *http1Driver) informational(r *exchange.Response) {
	if out, err := h.machine.AppendInformational(h.client.lane.out[:0], r.Status, r.Fields); err == nil {
		h.write(out)
	}
}

// respond implements stream.
func (h *http1Driver) respond(r *exchange.Response, end bool) error {
	if h.request != nil && h.request.unwanted {
		h.machine.StopReading()
	}
	if h.client.leaves() {
		h.machine.CloseAfter()
	}
	out, err := h.machine.AppendResponse(h.client.lane.out[:0], r)
	if err == nil && end {
		out, err = h.machine.AppendEnd(out, nil)
	}
	if err != nil {
		return err
	}
	h.toClose = r.Status == 101 || r.Length < 0 && !end && h.request.version == exchange.HTTP10
	h.write(out)
	if r.Status == 101 {
		h.resume() // what came behind the request belongs to the tunnel
	}
	return nil
}

// data implements stream.
func (h *http1Driver) data(p []byte, end bool) error {
	out, behind, err := h.machine.Frame(h.client.lane.out[:0], len(p))
	if err != nil {
		return err
	}
	h.write(out)
	h.client.conn.Write(p)
	out = append(out[:0], behind...)
	if end {
		if out, err = h.machine.AppendEnd(out, nil); err != nil {
			return err
		}
	}
	h.wrote(len(p), h.write(out))
	h.halfClose(end)
	return nil
}

// end implements stream.
func (h *http1Driver) end(trailers exchange.Fields) error {
	out, err := h.machine.AppendEnd(h.client.lane.out[:0], trailers)
	if err != nil {
		return err
	}
	h.write(out)
	h.halfClose(true)
	return nil
}

// halfClose tells the client of the end of the backend's direction of a tunnel.
func (h *http1Driver) halfClose(end bool) {
	if end && h.request.tunnel {
		h.client.conn.CloseWrite()
	}
}

func (h *http1Driver) write(out []byte) (welcome bool) {
	welcome = h.client.conn.Write(out)
	h.client.lane.written(out)
	return welcome
}

// accept implements stream.
func (h *http1Driver) accept(n int) {
	full := h.held >= exchange.UploadWindow
	if h.held -= n; full && n > 0 {
		h.resume()
	}
}

// cut implements stream. What frames the answer tells the client that there is
// more, if anything does.
func (h *http1Driver) cut() {
	if h.toClose && h.request.reason != "timeout_idle" || h.client.stalled {
		h.client.conn.Abort()
		return
	}
	h.client.close()
}

// over implements stream.
func (h *http1Driver) over() {
	q := h.request
	if q == nil {
		return
	}
	h.request, h.held, h.unsaid = nil, 0, 0
	h.since = h.client.now()
	if !h.client.conn.Open() {
		return
	}
	if q.unwanted {
		h.machine.StopReading()
	}
	h.client.setActive(false)
	switch {
	case h.parsing: // and goes on
	case h.finished():
		h.client.close()
	case len(h.rest) > 0 || h.client.conn.Paused():
		h.resume()
	}
}

// finished reports whether the connection is to be closed, which has no request.
func (h *http1Driver) finished() bool { return h.machine.Over() || h.client.out.Load() }
