package frontend

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http2"
)

// What an HTTP/2 client may do besides requests and their bodies: see the credit
// of edge/http2.
const (
	// floodCredit is what a connection has at first and at most. A browser that
	// gives up a page resets up to maxConcurrentStreams at once.
	floodCredit = 500
	// floodRefill is earned per second.
	floodRefill = 100
	// youngStream is how often credit is earned, and by that how long a stream must
	// live at most so that its reset is free.
	youngStream = time.Second
)

const (
	// connectionStreams bounds what a client may send on one connection before a
	// backend takes it, in whole windows of streams (exchange.UploadWindow): as many
	// requests may stand still before they hold up the others.
	connectionStreams = 16
	// partingTime bounds the wait for a client that was told to leave and may have
	// sent a request before it knew.
	partingTime = 500 * time.Millisecond
	// pongTime bounds the wait for an answer to PING.
	pongTime = 15 * time.Second
)

var (
	// errReset is the end of a request whose stream the client has reset.
	errReset    = errors.New("the client has reset the stream")
	errLeft     = errors.New("the client has left")
	errHeadTime = errors.New("the client did not complete a header in time")
)

// http2Driver speaks HTTP/2 with a client (RFC 9113).
type http2Driver struct {
	client  *clientConn
	machine *http2.Conn
	streams []*http2Stream // whose requests are under way, by their numbers
	output  http2Output
	busy    bool // something is under way that settles at its end
	leaving bool
	over    bool // nothing more is read

	// Times of the loop.
	refilled  time.Duration // credit
	headSince time.Duration // a head is waited for, if inHead
	idleSince time.Duration // without requests
	readAt    time.Duration // the client sent something
	pingedAt  time.Duration // 0: no PING is under way
	leftAt    time.Duration // the client was told to leave
	inHead    bool
}

func newHTTP2(c *clientConn) driver {
	settings, now := c.settings(), c.now()
	streams := settings.maxConcurrentStreams
	d := &http2Driver{client: c, inHead: true, refilled: now, headSince: now, idleSince: now, readAt: now}
	d.machine = http2.NewServer(http2.Config{
		MaxStreams:      streams,
		MaxHeaderBytes:  settings.maxHeaderBytes,
		MaxHeaderFields: settings.maxHeaderFields - 1, // the authority is one, as Host is
		StreamWindow:    exchange.UploadWindow,
		ConnWindow:      min(streams, connectionStreams) * exchange.UploadWindow,
		FloodCredit:     floodCredit,
		ExtendedConnect: true,
	})
	return d
}

// http2Lane is what the HTTP/2 connections of a loop share.
type http2Lane struct {
	event   http2.Event
	streams spares[http2Stream]
}

// open implements driver.
func (d *http2Driver) open() {
	d.write(d.machine.AppendPending(d.client.lane.out[:0]))
	d.client.remind(d.client.settings().header)
}

// write sends what was appended to the lane's memory.
func (d *http2Driver) write(out []byte) {
	if len(out) > 0 {
		d.output.full = !d.client.conn.Write(out)
	}
	d.client.lane.written(out)
}

// read implements driver.
func (d *http2Driver) read(p []byte) {
	if d.over {
		return
	}
	d.readAt, d.pingedAt = d.client.now(), 0
	d.refill()
	d.busy = true
	ev := &d.client.lane.h2.event
	for !d.over {
		used, err := d.machine.Next(p, ev)
		p = p[used:]
		if err != nil {
			d.failed(err)
			break
		}
		if ev.Kind == http2.None {
			break
		}
		d.inHead = d.inHead && d.machine.MidHead()
		d.handle(ev)
	}
	d.busy = false
	d.boundHead()
	d.settle()
}

// refill gives the client credit for the time that has passed.
func (d *http2Driver) refill() {
	seconds := (d.client.now() - d.refilled) / youngStream
	if seconds > 0 {
		d.machine.Refill(int(min(seconds*floodRefill, floodCredit)))
		d.refilled = d.client.now()
	}
}

// boundHead gives the client the listener's header time for the preface with its
// first frame, and for a header block (RFC 9113 section 4.3).
func (d *http2Driver) boundHead() {
	if !d.machine.MidHead() {
		d.inHead = false
	} else if !d.inHead {
		d.inHead, d.headSince = true, d.client.now()
		d.client.remind(d.client.settings().header)
	}
}

// handle does what an event asks for.
func (d *http2Driver) handle(ev *http2.Event) {
	s := d.find(ev.Stream)
	switch ev.Kind {
	case http2.Request, http2.Refused:
		d.begin(ev)
	case http2.Data:
		if s != nil {
			s.received(ev.Data, ev.End)
		} else {
			d.machine.Consumed(ev.Stream, len(ev.Data))
		}
	case http2.Trailers:
		if s != nil {
			trailers := ev.Trailers
			ev.Trailers = nil
			s.receivedEnd(trailers)
		}
	case http2.Reset:
		switch {
		case s == nil:
		case ev.Err != nil:
			s.abandon(ev.Err)
		default:
			s.abandon(fmt.Errorf("%w: %v", errReset, ev.Code))
		}
	case http2.Window, http2.Settings:
		d.output.stuck = false
	case http2.Reprioritized:
		if s != nil {
			s.priority, s.prioritized = ev.Priority, true
		}
	case http2.GoAway:
		d.leave()
	}
}

// begin serves the request of an event.
func (d *http2Driver) begin(ev *http2.Event) {
	s := d.client.lane.h2.streams.take()
	spare := s.head.Fields
	s.driver, s.id, s.head = d, ev.Stream, ev.Request
	ev.Request.Fields = spare
	s.priority = ev.Priority
	s.prioritized = ev.Priority != http2.ParsePriority("") || s.head.Fields.Has("priority")
	s.left = exchange.UnknownLength
	s.whole = ev.End
	d.streams = append(d.streams, s)
	d.client.setActive(true)
	s.request = d.client.newRequest(s)
	if ev.Kind == http2.Refused {
		s.request.refuse(&s.head, ev.End, ev.Status, ev.Reason, nil)
		return
	}
	end := ev.End
	if s.head.Protocol != "" {
		s.upgrade()
		end = true
	}
	s.request.begin(&s.head, end)
}

// find returns the stream of a request that is under way, or nil.
func (d *http2Driver) find(id uint32) *http2Stream {
	if at, ok := d.place(id); ok {
		return d.streams[at]
	}
	return nil
}

func (d *http2Driver) place(id uint32) (int, bool) {
	if last := len(d.streams) - 1; last >= 0 && d.streams[last].id == id {
		return last, true
	}
	return slices.BinarySearchFunc(d.streams, id, func(s *http2Stream, id uint32) int { return int(s.id) - int(id) })
}

// settle sends what is due and sees whether the connection has become idle, or is
// to end.
func (d *http2Driver) settle() {
	if d.busy || d.over {
		return
	}
	d.busy = true
	d.push()
	d.busy = false
	if d.machine.Pending() {
		d.write(d.machine.AppendPending(d.client.lane.out[:0]))
	}
	if len(d.streams) > 0 {
		return
	}
	if d.client.active {
		d.client.setActive(false)
		d.idleSince = d.client.now()
		d.client.remind(d.client.settings().idle)
		if d.leaving {
			d.client.remind(partingTime)
		}
	}
	if d.leaving && d.machine.Leaving() && d.machine.Open() == 0 {
		d.part()
	}
}

// writable implements driver.
func (d *http2Driver) writable() {
	d.output.full = false
	d.settle()
}

// leave implements driver. Requests that the client sends before it knows are
// served (RFC 9113 section 6.8).
func (d *http2Driver) leave() {
	if d.leaving || d.over {
		return
	}
	d.leaving, d.leftAt = true, d.client.now()
	d.machine.Shutdown()
	d.client.remind(partingTime)
	d.settle()
}

// part ends the connection in order.
func (d *http2Driver) part() {
	if d.over {
		return
	}
	d.over = true
	if !d.machine.Leaving() {
		d.machine.GoAway(http2.NoError)
	}
	d.write(d.machine.AppendPending(d.client.lane.out[:0]))
	d.client.close()
}

// failed ends the connection for what the client did wrong. The machine has told
// it.
func (d *http2Driver) failed(err error) {
	if d.machine.Flooded() {
		d.client.flooded()
	}
	d.part()
	d.forsake(err)
}

// forsake tells the requests that their client has gone.
func (d *http2Driver) forsake(err error) {
	for len(d.streams) > 0 {
		d.streams[len(d.streams)-1].abandon(err)
	}
	d.client.setActive(false)
}

// peerEnded implements driver. A client that sends nothing more has left.
func (d *http2Driver) peerEnded(bool) {
	d.part()
	d.forsake(errLeft)
}

// closed implements driver.
func (d *http2Driver) closed(err error) {
	d.over = true
	d.forsake(err)
}

// look implements driver.
func (d *http2Driver) look(now time.Duration) time.Duration {
	if d.over {
		return time.Hour // the loop bounds the end
	}
	settings := d.client.settings()
	next := settings.idle
	d.busy = true
	for i := len(d.streams) - 1; i >= 0; i = min(i, len(d.streams)) - 1 {
		next = min(next, d.streams[i].look(now))
	}
	d.busy = false
	d.settle()
	bounds := [...]struct {
		on    bool
		since time.Duration
		most  time.Duration
		end   func()
	}{
		{d.inHead, d.headSince, settings.header, func() { d.part(); d.forsake(errHeadTime) }},
		{len(d.streams) == 0, d.idleSince, settings.idle, d.part},
		{d.leaving && len(d.streams) == 0 && d.machine.Open() == 0, max(d.leftAt, d.idleSince), partingTime, d.part},
		{len(d.streams) > 0 && d.pingedAt == 0, d.readAt, settings.idle, func() {
			d.pingedAt = now
			d.machine.Ping()
		}},
		{d.pingedAt > 0, d.pingedAt, pongTime, d.client.conn.Abort},
	}
	for i := range bounds {
		b := &bounds[i]
		if !b.on || d.over {
			continue
		}
		if left := b.since + b.most - now; left > 0 {
			next = min(next, left)
		} else {
			b.end()
			next = min(next, pongTime)
		}
	}
	d.settle()
	return next
}

// recycle takes a stream that nobody refers to any more.
func (l *http2Lane) recycle(s *http2Stream) {
	fields := s.head.Fields
	clear(fields)
	*s = http2Stream{head: exchange.Request{Fields: fields[:0]}}
	l.streams.keep(s)
}
