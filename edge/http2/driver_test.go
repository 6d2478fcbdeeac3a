package http2

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/reseal/reseal/edge/exchange"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// driver runs a machine over a connection, as an event loop would.
type driver struct {
	t      *testing.T
	conn   net.Conn
	on     func(d *driver, ev *Event) // with mu held
	mu     sync.Mutex
	c      *Conn
	out    []byte
	bodies map[uint32]*outgoing
	err    error
	done   chan struct{}
}

// outgoing is what is still to be sent on a stream.
type outgoing struct {
	data     []byte
	trailers exchange.Fields
}

// drive starts the machine; the test ends it.
func drive(t *testing.T, conn net.Conn, c *Conn, on func(d *driver, ev *Event)) *driver {
	d := &driver{t: t, conn: conn, on: on, c: c, bodies: map[uint32]*outgoing{}, done: make(chan struct{})}
	go d.run()
	t.Cleanup(func() {
		conn.Close()
		<-d.done
	})
	return d
}

func (d *driver) run() {
	defer close(d.done)
	var ev Event
	buffer := make([]byte, 32<<10)
	d.do(func() {})
	for {
		n, err := d.conn.Read(buffer)
		in, failed := buffer[:n], false
		d.do(func() {
			for d.err == nil {
				used, err := d.c.Next(in, &ev)
				in = in[used:]
				if err != nil {
					d.err, failed = err, true
					return
				}
				if ev.Kind == None {
					return
				}
				d.handle(&ev)
			}
		})
		if err != nil || failed {
			d.hangUp(failed)
			return
		}
	}
}

// hangUp closes the connection, so that the peer gets the GOAWAY: it reads until
// the peer has closed, too.
func (d *driver) hangUp(failed bool) {
	if tcp, ok := d.conn.(interface{ CloseWrite() error }); ok && failed {
		_ = tcp.CloseWrite()
		_, _ = io.Copy(io.Discard, d.conn)
	}
	d.conn.Close()
}

// do changes the machine and sends what there is to send.
func (d *driver) do(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
	d.out = d.c.AppendPending(d.out)
	if len(d.out) > 0 {
		_, _ = d.conn.Write(d.out)
		d.out = d.out[:0]
	}
}

func (d *driver) handle(ev *Event) {
	switch ev.Kind {
	case Window:
		for id := range d.bodies {
			if ev.Stream == 0 || ev.Stream == id {
				d.push(id)
			}
		}
	case Settings:
		for id := range d.bodies {
			d.push(id)
		}
	case Reset:
		delete(d.bodies, ev.Stream)
	}
	d.on(d, ev)
	if ev.Kind == Data {
		d.c.Consumed(ev.Stream, len(ev.Data))
	}
}

// send queues a body; the head has been sent.
func (d *driver) send(id uint32, data []byte, trailers exchange.Fields) {
	d.bodies[id] = &outgoing{data, trailers}
	d.push(id)
}

func (d *driver) push(id uint32) {
	o := d.bodies[id]
	var n int
	var err error
	d.out, n, err = d.c.AppendData(d.out, id, o.data, o.trailers == nil)
	if o.data = o.data[n:]; err != nil {
		delete(d.bodies, id)
		if !errors.Is(err, ErrClosed) {
			d.t.Errorf("stream %d: %v", id, err)
		}
		return
	}
	if len(o.data) > 0 {
		return
	}
	delete(d.bodies, id)
	if o.trailers != nil {
		if d.out, err = d.c.AppendTrailers(d.out, id, o.trailers); err != nil {
			d.t.Errorf("stream %d: %v", id, err)
		}
	}
}

// respond sends a response.
func (d *driver) respond(id uint32, r exchange.Response, body []byte, trailers exchange.Fields) {
	var err error
	end := len(body) == 0 && trailers == nil
	if d.out, err = d.c.AppendResponse(d.out, id, &r, end); err != nil {
		d.t.Errorf("stream %d: %v", id, err)
	} else if !end {
		d.send(id, body, trailers)
	}
}

// listen accepts connections on a port of its own and has a function serve each.
func listen(t *testing.T, serve func(net.Conn)) net.Addr {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wait.Go(func() { serve(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		wait.Wait()
	})
	return l.Addr()
}
