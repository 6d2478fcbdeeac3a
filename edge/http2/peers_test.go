package http2

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/reseal/reseal/edge/exchange"
)

// patience bounds waits for what must happen.
const patience = 20 * time.Second

// echo is a server's side made of the machine. It answers a request with its body,
// its fields x-* and its trailers.
func echo(t *testing.T, cfg Config) func(net.Conn) {
	return func(conn net.Conn) {
		type message struct {
			request  exchange.Request
			body     []byte
			trailers exchange.Fields
		}
		open := map[uint32]*message{}
		d := drive(t, conn, NewServer(cfg), func(d *driver, ev *Event) {
			m := open[ev.Stream]
			switch ev.Kind {
			case Request:
				m = &message{request: ev.Request}
				ev.Request.Fields = nil
				if open[ev.Stream] = m; m.request.Continue {
					d.out, _ = d.c.AppendInformational(d.out, ev.Stream, &exchange.Response{Status: 100, Length: exchange.UnknownLength})
				}
			case Data:
				m.body = append(m.body, ev.Data...)
			case Trailers:
				m.trailers, ev.Trailers = ev.Trailers, nil
			case Reset:
				delete(open, ev.Stream)
			}
			if !ev.End {
				return
			}
			delete(open, ev.Stream)
			r := exchange.Response{Status: 200, Length: exchange.UnknownLength}
			for _, f := range m.request.Fields {
				if strings.HasPrefix(f.Name, "x-") {
					r.Fields.Add(f.Name, f.Value)
				}
			}
			r.Fields.Add("X-Request", m.request.Method+" "+m.request.Target)
			for _, f := range m.trailers {
				r.Fields.Add("Trailer", f.Name)
			}
			if m.request.Target == "/reset" {
				d.c.Reset(ev.Stream, EnhanceYourCalm)
				return
			}
			if m.request.Method == "HEAD" {
				m.body = nil
			}
			d.respond(ev.Stream, r, m.body, m.trailers)
		})
		<-d.done
	}
}

// TestAgainstTransport has the client of golang.org/x/net talk to the machine.
func TestAgainstTransport(t *testing.T) {
	for name, cfg := range map[string]Config{"defaults": {}, "small": {StreamWindow: 100, MaxStreams: 8}, "large": {StreamWindow: 1 << 20, MaxFrame: 1 << 20}} {
		t.Run(name, func(t *testing.T) {
			address := listen(t, echo(t, cfg)).String()
			transport := &xhttp2.Transport{AllowHTTP: true, DialTLSContext: func(ctx context.Context, network, _ string, _ *tls.Config) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, address)
			}}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, Timeout: patience}
			var wait sync.WaitGroup
			for i, size := range []int{0, 1, 1000, 16384, 65535, 65536, 300000} {
				wait.Go(func() {
					content := body(uint32(i), size)
					var reader io.Reader = bytes.NewReader(content)
					if i%2 == 0 {
						reader = struct{ io.Reader }{reader} // of unknown length
					}
					request, _ := http.NewRequest("POST", fmt.Sprintf("http://a.test/p?%d", i), reader)
					request.Header.Set("X-Index", strconv.Itoa(i))
					request.Trailer = http.Header{"X-Trailer": {strconv.Itoa(size)}}
					response, err := client.Do(request)
					if err != nil {
						t.Error(err)
						return
					}
					defer response.Body.Close()
					got, err := io.ReadAll(response.Body)
					if err != nil || !bytes.Equal(got, content) {
						t.Errorf("%d bytes of %d: %v", len(got), size, err)
					}
					if response.Header.Get("X-Index") != strconv.Itoa(i) || response.Header.Get("X-Request") != fmt.Sprintf("POST /p?%d", i) {
						t.Errorf("%v", response.Header)
					}
					if got := response.Trailer.Get("X-Trailer"); got != strconv.Itoa(size) {
						t.Errorf("trailer %q", got)
					}
				})
			}
			wait.Wait()
			request, _ := http.NewRequest("POST", "http://a.test/expect", strings.NewReader("hello"))
			request.Header.Set("Expect", "100-continue")
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(response.Body); err != nil || string(got) != "hello" {
				t.Error(string(got), err)
			}
			response, err = client.Head("http://a.test/head")
			if err != nil || response.StatusCode != 200 || response.ContentLength > 0 {
				t.Error(response, err)
			}
			var reset xhttp2.StreamError
			if _, err = client.Get("http://a.test/reset"); !errors.As(err, &reset) || reset.Code != xhttp2.ErrCodeEnhanceYourCalm {
				t.Error(err)
			}
		})
	}
}

// reply is what came for a request of TestAgainstServer.
type reply struct {
	response exchange.Response
	body     []byte
	trailers exchange.Fields
	early    []int
	code     Code
	reset    bool
}

// asker is a client's side made of the machine.
type asker struct {
	*driver
	replies map[uint32]*reply
	done    map[uint32]chan struct{}
}

func newAsker(t *testing.T, conn net.Conn, cfg Config) *asker {
	a := &asker{replies: map[uint32]*reply{}, done: map[uint32]chan struct{}{}}
	a.driver = drive(t, conn, NewClient(cfg), func(_ *driver, ev *Event) {
		r := a.replies[ev.Stream]
		switch ev.Kind {
		case Informational:
			r.early = append(r.early, ev.Response.Status)
		case Response:
			r.response, ev.Response.Fields = ev.Response, nil
		case Data:
			r.body = append(r.body, ev.Data...)
		case Trailers:
			r.trailers, ev.Trailers = ev.Trailers, nil
		case Reset:
			r.code, r.reset = ev.Code, true
		}
		if r != nil && (ev.End || ev.Kind == Reset) {
			close(a.done[ev.Stream])
		}
	})
	return a
}

// ask sends a request and waits for its reply.
func (a *asker) ask(t *testing.T, r exchange.Request, content []byte, trailers exchange.Fields) *reply {
	t.Helper()
	var id uint32
	a.do(func() {
		var err error
		end := content == nil && trailers == nil
		if a.out, id, err = a.c.AppendRequest(a.out, &r, end); err != nil {
			t.Error(err)
			return
		}
		a.replies[id], a.done[id] = new(reply), make(chan struct{})
		if !end {
			a.send(id, content, trailers)
		}
	})
	a.mu.Lock()
	done, got := a.done[id], a.replies[id]
	a.mu.Unlock()
	if done == nil {
		return new(reply)
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
		t.Error("no reply")
	}
	return got
}

// TestAgainstServer has the machine talk to the server of golang.org/x/net.
func TestAgainstServer(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/reset":
			panic(http.ErrAbortHandler)
		case "/hints":
			w.Header().Set("Link", "</a>")
			w.WriteHeader(103)
		case "/304":
			w.WriteHeader(304)
			return
		}
		content, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("X-Index", r.Header.Get("X-Index"))
		w.Header().Set("X-Length", strconv.FormatInt(r.ContentLength, 10))
		w.Header().Set("Trailer", "X-Trailer")
		_, _ = w.Write(content)
		w.Header().Set("X-Trailer", r.Trailer.Get("X-Trailer"))
	})
	for name, cfg := range map[string]Config{"defaults": {}, "small": {StreamWindow: 100}, "large": {StreamWindow: 1 << 20, MaxFrame: 1 << 20}} {
		t.Run(name, func(t *testing.T) {
			address := listen(t, func(conn net.Conn) {
				new(xhttp2.Server).ServeConn(conn, &xhttp2.ServeConnOpts{Handler: handler, BaseConfig: new(http.Server)})
			})
			conn, err := net.Dial("tcp", address.String())
			if err != nil {
				t.Fatal(err)
			}
			a := newAsker(t, conn, cfg)
			var wait sync.WaitGroup
			for i, size := range []int{0, 1, 1000, 16384, 65535, 65536, 300000} {
				wait.Go(func() {
					content := body(uint32(i), size)
					r := request("POST", "/p", exchange.Field{Name: "X-Index", Value: strconv.Itoa(i)}, exchange.Field{Name: "Trailer", Value: "X-Trailer"})
					if r.Length = int64(size); i%2 == 0 {
						r.Length = exchange.UnknownLength
					}
					got := a.ask(t, r, content, exchange.Fields{{Name: "X-Trailer", Value: "t" + strconv.Itoa(i)}})
					if !bytes.Equal(got.body, content) || got.response.Status != 200 || got.reset {
						t.Errorf("%d bytes of %d, %+v", len(got.body), size, got.response)
					}
					if got.response.Fields.Get("x-index") != strconv.Itoa(i) || got.response.Fields.Get("x-length") != strconv.FormatInt(r.Length, 10) {
						t.Errorf("%v", got.response.Fields)
					}
					if got.trailers.Get("x-trailer") != "t"+strconv.Itoa(i) {
						t.Errorf("trailers %v", got.trailers)
					}
				})
			}
			wait.Wait()
			if got := a.ask(t, request("GET", "/hints"), nil, nil); !slices.Equal(got.early, []int{103}) || got.response.Status != 200 {
				t.Errorf("%+v", got)
			}
			if got := a.ask(t, request("HEAD", "/"), nil, nil); got.response.Status != 200 || len(got.body) > 0 {
				t.Errorf("%+v", got)
			}
			if got := a.ask(t, request("GET", "/304"), nil, nil); got.response.Status != 304 || got.reset {
				t.Errorf("%+v", got)
			}
			if got := a.ask(t, request("GET", "/reset"), nil, nil); !got.reset || got.code != InternalError {
				t.Errorf("%+v", got)
			}
		})
	}
}
