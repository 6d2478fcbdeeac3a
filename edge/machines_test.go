package edge

import (
	"bytes"
	"fmt"
	"testing"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http1"
	"github.com/reseal/reseal/edge/http2"
)

// machineFields are fields that mean something to a protocol, and some that don't.
var machineFields = []string{
	"host", "expect", "te", "trailer", "upgrade", "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization",
	"http2-settings", "transfer-encoding", "content-length", "cookie", "x-a", "grpc-status",
}

// TestMachinesMeet: a head that one protocol machine takes, every other one can
// write.
func TestMachinesMeet(t *testing.T) {
	taken := 0
	for _, name := range machineFields {
		for _, value := range []string{"a", "trailers", "100-continue", "chunked", "0", "X-T", "b\tc \xff", ""} {
			t.Run(fmt.Sprintf("%s %q", name, value), func(t *testing.T) {
				for _, request := range []*exchange.Request{http1Request(name, value), http2Request(t, name, value)} {
					if request != nil {
						taken++
						writeRequest(t, request)
					}
				}
				for _, response := range []*exchange.Response{http1Response(t, name, value), http2Response(t, name, value)} {
					if response != nil {
						taken++
						writeResponse(t, response)
					}
				}
			})
		}
	}
	if taken < 200 {
		t.Errorf("only %d heads were taken", taken)
	}
}

// get is a request as each machine writes it.
var get = &exchange.Request{Method: "GET", Scheme: "https", Authority: "a.test", Target: "/"}

func http1Request(name, value string) *exchange.Request {
	var event http1.Event
	in := "POST / HTTP/1.1\r\nX-Host: a\r\nHost: a.test\r\n" + name + ": " + value + "\r\n\r\n"
	if _, err := http1.NewServer(http1.Limits{}).Next([]byte(in), &event); err != nil {
		return nil
	}
	return &event.Request
}

func http1Response(t *testing.T, name, value string) *exchange.Response {
	t.Helper()
	c := http1.NewClient(http1.Limits{})
	if _, err := c.AppendRequest(nil, get); err != nil {
		t.Fatal(err)
	}
	var event http1.Event
	if _, err := c.Next([]byte("HTTP/1.1 200 OK\r\n"+name+": "+value+"\r\n\r\n"), &event); err != nil {
		return nil
	}
	return &event.Response
}

// frames writes a HEADERS frame that the machine itself would not.
func frames(t *testing.T, preface string, fields ...string) []byte {
	t.Helper()
	var block, wire bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for i := 0; i < len(fields); i += 2 {
		if err := encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			t.Fatal(err)
		}
	}
	wire.WriteString(preface)
	framer := xhttp2.NewFramer(&wire, nil)
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	if err := framer.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true}); err != nil {
		t.Fatal(err)
	}
	return wire.Bytes()
}

// http2Event returns the head that in brings, or nil if it is refused.
func http2Event(c *http2.Conn, in []byte, kind http2.Kind) *http2.Event {
	event := new(http2.Event)
	for {
		n, err := c.Next(in, event)
		if in = in[n:]; event.Kind == kind {
			return event
		}
		if err != nil || event.Kind == http2.None && len(in) == 0 || event.Kind == http2.Reset {
			return nil
		}
	}
}

func http2Request(t *testing.T, name, value string) *exchange.Request {
	in := frames(t, xhttp2.ClientPreface, ":method", "POST", ":scheme", "https", ":authority", "a.test", ":path", "/", name, value)
	event := http2Event(http2.NewServer(http2.Config{}), in, http2.Request)
	if event == nil {
		return nil
	}
	return &event.Request
}

func http2Response(t *testing.T, name, value string) *exchange.Response {
	c := http2.NewClient(http2.Config{})
	if _, _, err := c.AppendRequest(nil, get, true); err != nil {
		t.Fatal(err)
	}
	event := http2Event(c, frames(t, "", ":status", "200", name, value), http2.Response)
	if event == nil {
		return nil
	}
	return &event.Response
}

func writeRequest(t *testing.T, request *exchange.Request) {
	t.Helper()
	if out, err := http1.NewClient(http1.Limits{}).AppendRequest(nil, request); err != nil {
		t.Errorf("%+v can't be written to HTTP/1: %v, %q", request, err, out)
	}
	if _, _, err := http2.NewClient(http2.Config{}).AppendRequest(nil, request, false); err != nil {
		t.Errorf("%+v can't be written to HTTP/2: %v", request, err)
	}
}

func writeResponse(t *testing.T, response *exchange.Response) {
	t.Helper()
	h1 := http1.NewServer(http1.Limits{})
	if _, err := h1.Next([]byte("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"), new(http1.Event)); err != nil {
		t.Fatal(err)
	}
	if out, err := h1.AppendResponse(nil, response); err != nil {
		t.Errorf("%+v can't be written to HTTP/1: %v, %q", response, err, out)
	}
	h2 := http2.NewServer(http2.Config{})
	if http2Event(h2, frames(t, xhttp2.ClientPreface, ":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", "/"), http2.Request) == nil {
		t.Fatal("no request")
	}
	if _, err := h2.AppendResponse(nil, 1, response, false); err != nil {
		t.Errorf("%+v can't be written to HTTP/2: %v", response, err)
	}
}
