package frontend

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// TestNewcomersAreServedAtTheEnd: a client that has connected and not yet said what it
// wants gets an answer from an edge that ends, and is told to leave.
func TestNewcomersAreServedAtTheEnd(t *testing.T) {
	e := newEdge(t, answering("ok"))
	whole, begun := e.dial(), e.dial()
	must[int](t)(fmt.Fprint(begun, "GET / HTTP/1.1\r\nHo"))
	time.Sleep(50 * time.Millisecond)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		e.stop()
	}()
	time.Sleep(2 * maxGrace) // all that is idle is asked to go
	must[int](t)(fmt.Fprint(whole, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n"))
	must[int](t)(fmt.Fprint(begun, "st: app.test\r\n\r\n"))
	for _, conn := range []io.Reader{whole, begun} {
		answer := string(must[[]byte](t)(io.ReadAll(conn)))
		if !strings.HasPrefix(answer, "HTTP/1.1 200") || !strings.Contains(answer, "Connection: close") {
			t.Errorf("got %q", answer)
		}
	}
	<-stopped
}

// TestInheritedSockets are used in place of binding an address, and narrower ones that
// a wide listener covers are kept.
func TestInheritedSockets(t *testing.T) {
	wide := must[net.Listener](t)(net.Listen("tcp", "0.0.0.0:0")).(*net.TCPListener)
	_, port, _ := net.SplitHostPort(wide.Addr().String())
	beside := net.ListenConfig{}
	narrow, err := beside.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	given := map[string]*net.TCPListener{"0.0.0.0:" + port: wide, "127.0.0.1:" + port: narrow.(*net.TCPListener)}
	e := newEdgeOf(t, Config{Upstream: answering("ok").onLoops(), Inherited: func(key, address string) (*net.TCPListener, error) {
		listener := given[key]
		delete(given, key)
		return listener, nil
	}}, func(l *exchange.Listener) { l.Spec.Address = "0.0.0.0:" + port })
	if e.frontend.Sockets()["0.0.0.0:"+port] != wide {
		t.Fatal("the inherited socket is not used")
	}
	if err := e.frontend.Adopt([]string{"127.0.0.1:" + port, "127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	if sockets := e.frontend.Sockets(); len(sockets) != 2 || len(given) != 0 {
		t.Errorf("%v, %v", sockets, given)
	}
	if _, ok := e.frontend.Sockets()["127.0.0.1:"+port]; !ok {
		t.Error("the narrower socket is not kept")
	}
}
