package frontend

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestSwapUnderLoad applies all kinds of changes while requests run: none fails
// and no connection is lost.
func TestSwapUnderLoad(t *testing.T) {
	e := newEdge(t, answering("ok"))
	var load sync.WaitGroup
	var sent atomic.Int64
	stop := make(chan struct{})
	for i := range 4 {
		client := e.client(i%2 == 0)
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				response, err := client.Post("https://app.test/", "", strings.NewReader("body"))
				if err != nil {
					t.Error(err)
					return
				}
				body, err := io.ReadAll(response.Body)
				response.Body.Close()
				if err != nil || response.StatusCode != 200 || string(body) != "ok" {
					t.Errorf("%d %q %v", response.StatusCode, body, err)
					return
				}
				sent.Add(1)
			}
		})
	}
	for i := range 60 {
		before := sent.Load()
		e.apply(e.listener("main", func(l *exchange.Listener) {
			l.Spec.Limits = &resealv1.ListenerLimits{MaxConcurrentStreams: uint32(100 + i/10)} // a new generation at times
			l.PolicyKey = fmt.Sprint(i % 3)
			l.Route = func(string, string) (exchange.Match, bool) { return exchange.Match{Pool: fmt.Sprint("pool", i)}, true }
		}), e.listener(fmt.Sprint("other", i)))
		eventually(t, "requests go on", func() bool { return sent.Load() > before+4 || t.Failed() })
	}
	close(stop)
	load.Wait()
	if opened := read(e.count("main"), func(c *counts) int { return c.opened }); opened != 4 {
		t.Errorf("%d connections for 4 clients", opened)
	}
	// Records are written after the response: one of an older request may come
	// late, so another request tells.
	response := must[*http.Response](t)(e.client(false).Get("https://app.test/last"))
	bodyOf(t, response)
	eventually(t, "the last request goes by the last configuration", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return slices.ContainsFunc(e.records, func(record map[string]any) bool {
			return record["path"] == "/last" && record["pool"] == "pool59"
		})
	})
}

func TestAddressInUse(t *testing.T) {
	taken := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	defer taken.Close()
	free := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	e := newEdge(t, answering("old"))
	at := func(address string) func(*exchange.Listener) {
		return func(l *exchange.Listener) { l.Spec.Address = address }
	}
	free.Close()
	change, violations := e.frontend.Prepare([]exchange.Listener{
		e.listener("main"), e.listener("a", at(taken.Addr().String())), e.listener("b", at(free.Addr().String())), e.listener("c", at(free.Addr().String())),
		e.listener("d", func(l *exchange.Listener) {
			l.Spec.Forwarded = &resealv1.Forwarded{TrustedCidrs: []string{"x"}}
			l.TLS = nil
		}),
	})
	if change != nil {
		t.Fatal("a change with violations")
	}
	var got []string
	for _, v := range violations {
		got = append(got, v.Resource.Name+" "+v.Field)
		if v.Resource.Kind != "Listener" {
			t.Error(v)
		}
	}
	if !slices.Equal(got, []string{"a spec.address", "c spec.address", "d spec.certificates", "d spec.forwarded.trustedCIDRs[0]"}) ||
		!strings.HasPrefix(violations[0].Description, "address already in use") {
		t.Errorf("violations %q", violations)
	}
	if again, err := net.Listen("tcp", free.Addr().String()); err != nil {
		t.Errorf("what was bound stays bound: %v", err)
	} else {
		again.Close()
	}
	if got := bodyOf(t, must[*http.Response](t)(e.client(true).Get("https://app.test/"))); got != "old" {
		t.Errorf("got %q", got)
	}
	change, _ = e.frontend.Prepare([]exchange.Listener{e.listener("main"), e.listener("b", at(free.Addr().String()))})
	change.Abort()
	if again, err := net.Listen("tcp", free.Addr().String()); err != nil {
		t.Errorf("Abort leaves it bound: %v", err)
	} else {
		again.Close()
	}
}

// TestAddressesSwap gives each of two listeners the other's address at once.
func TestAddressesSwap(t *testing.T) {
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, x *exchange.Exchange) (*http.Response, error) {
		return textResponse(200, x.Pool), nil
	}})
	var addresses []string
	for range 2 {
		l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
		addresses = append(addresses, l.Addr().String())
		l.Close()
	}
	pair := func(a, b string) {
		t.Helper()
		var listeners []exchange.Listener
		for name, address := range map[string]string{"a": a, "b": b} {
			listeners = append(listeners, e.listener(name, func(l *exchange.Listener) {
				l.Spec.Address = address
				l.Route = func(string, string) (exchange.Match, bool) { return exchange.Match{Pool: name}, true }
			}))
		}
		e.apply(listeners...)
	}
	get := func(address string) string {
		t.Helper()
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: e.roots, ServerName: "app.test"}, DisableKeepAlives: true}
		request := must[*http.Request](t)(http.NewRequest("GET", "https://"+address+"/", nil))
		request.Host = "app.test"
		return bodyOf(t, must[*http.Response](t)((&http.Client{Transport: transport}).Do(request)))
	}
	for i := range 4 {
		a, b := addresses[i%2], addresses[1-i%2]
		pair(a, b)
		if got := get(a) + get(b); got != "ab" {
			t.Errorf("round %d: got %q", i, got)
		}
	}
}

// TestRemovedListenerDrains lets a request that began before finish.
func TestRemovedListenerDrains(t *testing.T) {
	for _, move := range []bool{false, true} {
		for _, http2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("move=%v,h2=%v", move, http2), func(t *testing.T) {
				arrived, finish := make(chan struct{}), make(chan struct{})
				e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
					close(arrived)
					<-finish
					return textResponse(200, "finished"), nil
				}})
				address, client := e.address("main"), e.client(http2)
				result := make(chan string)
				go func() {
					response, err := client.Get("https://app.test/")
					if err != nil {
						result <- err.Error()
						return
					}
					body, _ := io.ReadAll(response.Body)
					response.Body.Close()
					result <- string(body)
				}()
				<-arrived
				if move {
					l := e.listener("main")
					l.Spec.Address = "127.0.0.2:0"
					e.apply(l)
					if now := e.address("main"); !strings.HasPrefix(now, "127.0.0.2:") {
						t.Errorf("it listens on %s", now)
					}
				} else {
					e.apply()
				}
				if conn, err := net.Dial("tcp", address); err == nil {
					conn.Close()
					t.Error("the old address still accepts")
				}
				close(finish)
				if got := <-result; got != "finished" {
					t.Errorf("the request ended with %q", got)
				}
				c := e.count("main")
				eventually(t, "the connection ends", func() bool { return read(c, func(c *counts) bool { return c.opened == c.gone }) })
			})
		}
	}
}

func TestDrainIsBounded(t *testing.T) {
	for _, kind := range []string{"http/1.1", "h2", "upgrade"} {
		t.Run(kind, func(t *testing.T) {
			arrived := make(chan struct{})
			e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
				close(arrived)
				if kind == "upgrade" {
					ours, _ := tcpPipe(t)
					return upgraded("websocket", ours), nil
				}
				<-r.Context().Done()
				return nil, r.Context().Err()
			}}, func(l *exchange.Listener) { l.Spec.Timeouts.Drain = durationpb.New(50 * time.Millisecond) })
			if kind == "upgrade" {
				fmt.Fprint(e.dial(), "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
			} else {
				client := e.client(kind == "h2")
				go func() {
					if response, err := client.Get("https://app.test/"); err == nil {
						response.Body.Close()
						t.Error("an answer")
					}
				}()
			}
			<-arrived
			eventually(t, "the request is served", func() bool { return read(e.count("main"), func(c *counts) bool { return c.active == 1 }) })
			e.stop()
			if record := e.logged(1); record["reason"] != "drain_timeout" {
				t.Errorf("logged %v", record)
			}
		})
	}
}

func TestDrainAndUndo(t *testing.T) {
	e := newEdge(t, answering("ok"))
	c := e.count("main")
	opened := func() int { return read(c, func(c *counts) int { return c.opened }) }
	get := func(client *http.Client) bool {
		t.Helper()
		response := must[*http.Response](t)(client.Get("https://app.test/"))
		bodyOf(t, response)
		return response.Close
	}
	http1, http2 := e.client(false), e.client(true)
	get(http1)
	get(http2)
	e.frontend.Drain(true, time.Second)
	if !e.frontend.Draining() {
		t.Error("not draining")
	}
	// Idle connections leave at once or with their next response.
	eventually(t, "clients leave", func() bool { return read(c, func(c *counts) bool { return c.opened == c.gone }) })
	// New ones are served, once each.
	before := opened()
	if !get(http1) {
		t.Error("no Connection: close")
	}
	get(http1)
	get(http2)
	get(http2)
	if got := opened() - before; got != 4 {
		t.Errorf("%d connections for 4 requests", got)
	}
	e.frontend.Drain(false, 0)
	if e.frontend.Draining() {
		t.Error("still draining")
	}
	before = opened()
	for range 3 {
		if get(http1) {
			t.Error("Connection: close after the drain was undone")
		}
		get(http2)
	}
	if got := opened() - before; got != 2 {
		t.Errorf("%d connections for 2 clients", got)
	}
}

func TestConfigurationBeforeRun(t *testing.T) {
	c := newCounts()
	f := New(Config{Loops: loops(t), Upstream: answering("ok").onLoops(), Counters: func(string) Counters { return c }, Logger: slog.New(slog.DiscardHandler)})
	e := &edge{t: t, frontend: f}
	e.cert, e.roots = selfSigned(t, "app.test")
	e.apply(e.listener("main"))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	conn := e.dial()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n")
	if got := bodyOf(t, must[*http.Response](t)(http.ReadResponse(bufio.NewReader(conn), nil))); got != "ok" {
		t.Errorf("got %q", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	change, violations := f.Prepare([]exchange.Listener{e.listener("late")})
	if len(violations) > 0 {
		t.Fatal(violations)
	}
	change.Commit()
	if f.Addr("late") != nil {
		t.Error("a listener after the end")
	}
}
