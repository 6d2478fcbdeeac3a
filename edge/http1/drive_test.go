package http1

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/reseal/reseal/edge/exchange"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// driver does what the owner of a connection does, and writes down what happens.
type driver struct {
	conn    *Conn
	held    []byte
	event   Event
	log     strings.Builder
	data    []byte // of the body under way
	failed  error
	ended   func() // called at each End
	heads   int
	methods []string // of requests that are sent when the connection is free
}

// server answers each request at its end.
func server(limits Limits) *driver {
	d := &driver{conn: NewServer(limits)}
	d.ended = func() {
		if _, err := d.conn.AppendResponse(nil, &exchange.Response{Status: 200}); err == nil {
			_, _ = d.conn.AppendEnd(nil, nil)
		}
	}
	return d
}

// client sends a request of each method in turn; "UPGRADE" is a GET that asks for
// websocket.
func client(limits Limits, methods ...string) *driver {
	d := &driver{conn: NewClient(limits), methods: methods}
	d.ended = d.send
	d.send()
	return d
}

func (d *driver) send() {
	if len(d.methods) == 0 || !d.conn.Reusable() {
		return
	}
	request := exchange.Request{Method: d.methods[0], Authority: "app.test", Target: "/"}
	if d.methods = d.methods[1:]; request.Method == "UPGRADE" {
		request.Method, request.Protocol = "GET", "websocket"
	}
	if _, err := d.conn.AppendRequest(nil, &request); err != nil {
		panic(err)
	}
	if _, err := d.conn.AppendEnd(nil, nil); err != nil {
		panic(err)
	}
}

// feed has in come, behind what was not consumed.
func (d *driver) feed(in []byte) {
	d.held = append(d.held, in...)
	for d.failed == nil {
		n, err := d.conn.Next(d.held, &d.event)
		d.held = d.held[n:]
		if err != nil {
			d.flush()
			d.failed = err
			var known *Error
			if !errors.As(err, &known) {
				panic(err)
			}
			fmt.Fprintf(&d.log, "error %d %s\n", known.Status, known.Reason)
		} else if !d.note() {
			return
		}
	}
}

func (d *driver) note() bool {
	switch d.event.Kind {
	case None:
		return false
	case Request, Response, Informational:
		d.heads++
		if d.conn.client {
			r := d.event.Response
			fmt.Fprintf(&d.log, "%d %q %d %s %s\n", r.Status, r.Protocol, r.Length, r.Version, shown(r.Fields))
		} else {
			r := d.event.Request
			fmt.Fprintf(&d.log, "%s %s %s %s %q %d %s %v %v %s\n",
				r.Method, r.Scheme, r.Authority, r.Target, r.Protocol, r.Length, r.Version, r.Continue, r.Trailers, shown(r.Fields))
		}
	case Data, Tunnel:
		d.data = append(d.data, d.event.Data...)
	case End:
		d.flush()
		fmt.Fprintf(&d.log, "end %s\n", shown(d.event.Trailers))
		d.ended()
	}
	return true
}

// shown is fields as the tests want them.
func shown(fields exchange.Fields) string {
	var lines []string
	for _, field := range fields {
		lines = append(lines, fmt.Sprintf("{%q %q}", field.Name, field.Value))
	}
	return "[" + strings.Join(lines, " ") + "]"
}

func (d *driver) flush() {
	if len(d.data) > 0 {
		fmt.Fprintf(&d.log, "data %q\n", d.data)
		d.data = d.data[:0]
	}
}

// close has the peer end the stream.
func (d *driver) close(clean bool) {
	if d.failed != nil {
		return
	}
	if d.failed = d.conn.PeerClosed(clean, &d.event); d.failed != nil {
		d.flush()
		fmt.Fprintln(&d.log, "cut", d.failed)
		return
	}
	d.note()
}

func (d *driver) String() string {
	d.flush()
	return fmt.Sprintf("%sreusable %v over %v lingers %v", d.log.String(), d.conn.Reusable(), d.conn.Over(), d.conn.Lingers())
}

// everySplit checks that what happens does not depend on how the bytes come.
func everySplit(t *testing.T, stream string, start func() *driver) string {
	t.Helper()
	return splits(t, stream, 1, start)
}

// splits cuts at each step-th byte, and then at all at once.
func splits(t *testing.T, stream string, step int, start func() *driver) string {
	t.Helper()
	whole := start()
	whole.feed([]byte(stream))
	want := whole.String()
	for at := 1; at < len(stream); at += step {
		d := start()
		d.feed([]byte(stream[:at]))
		d.feed([]byte(stream[at:]))
		if got := d.String(); got != want {
			t.Fatalf("%q cut at %d:\n%s\nwant\n%s", stream, at, got, want)
		}
	}
	single := start()
	for i := range len(stream) {
		single.feed([]byte(stream[i : i+1]))
	}
	if got := single.String(); got != want {
		t.Fatalf("%q byte by byte:\n%s\nwant\n%s", stream, got, want)
	}
	return want
}
