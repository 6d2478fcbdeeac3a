package backend

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/loop"
)

// asker is a Front that asks again as soon as it has its answer.
type asker struct {
	x     *bench
	l     *loop.Loop
	call  exchange.Exchange
	r     exchange.Request
	flow  exchange.Flow
	left  int
	ended chan error
}

func (a *asker) ask() {
	a.call = exchange.Exchange{Pool: "p", Client: 1, Source: a.call.Source}
	a.r = exchange.Request{
		Method: "GET", Scheme: "https", Authority: testName, Target: "/bytes/1024", Version: exchange.HTTP11,
		Fields: exchange.Fields{{Name: "User-Agent", Value: "bench"}, {Name: "Accept", Value: "*/*"}},
	}
	a.flow = a.x.b.Start(a.l, &a.call, &a.r, a)
}

func (a *asker) Informational(*exchange.Response)  {}
func (a *asker) Response(*exchange.Response, bool) {}
func (a *asker) Sent(int)                          {}
func (a *asker) Failed(err error)                  { a.ended <- err }
func (a *asker) End(exchange.Fields)               { a.next() }
func (a *asker) Data(p []byte, end bool) {
	if end {
		a.next()
		return
	}
	a.flow.Consumed(len(p))
}

func (a *asker) next() {
	if a.left--; a.left <= 0 {
		a.ended <- nil
		return
	}
	a.ask()
}

// BenchmarkExchanges asks for 1 KiB, by as many clients at a time on one loop.
func BenchmarkExchanges(b *testing.B) {
	for protocol, start := range map[string]func(testing.TB, http.Handler) *server{
		"h1": func(t testing.TB, h http.Handler) *server { return serve(t, h) },
		"h2": func(t testing.TB, h http.Handler) *server { return serveH2(t, h) },
	} {
		for _, clients := range []int{1, 16} {
			b.Run(fmt.Sprint(protocol, "/", clients), func(b *testing.B) {
				x := newBench(b, []string{start(b, site()).addr})
				x.get("/bytes/10")
				l := x.Loops.Loops()[0]
				ended := make(chan error, clients)
				b.ReportAllocs()
				b.ResetTimer()
				l.Post(func() {
					for range clients {
						(&asker{x: x, l: l, left: max(b.N/clients, 1), ended: ended}).ask()
					}
				})
				for range clients {
					if err := <-ended; err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
