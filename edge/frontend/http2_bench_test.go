package frontend

import (
	"context"
	"crypto/tls"
	"log/slog"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/http2"
	"github.com/reseal/reseal/edge/loop"
)

// atOnce is an Upstream that answers at once with a short text, on the loop.
type atOnce struct{ body []byte }

// nothing is the Flow of an exchange that needs none.
type nothing struct{}

func (nothing) Data([]byte, bool)   {}
func (nothing) End(exchange.Fields) {}
func (nothing) Consumed(int)        {}
func (nothing) Abort(error)         {}

func (u atOnce) Start(l *loop.Loop, _ *exchange.Exchange, _ *exchange.Request, front exchange.Front) exchange.Flow {
	l.Post(func() {
		front.Response(&exchange.Response{
			Status: 200, Length: int64(len(u.body)), Version: exchange.HTTP11, Fields: exchange.Fields{{Name: "content-type", Value: "text/plain"}},
		}, false)
		front.Data(u.body, true)
	})
	return nothing{}
}

func (u atOnce) Tunnel(*loop.Loop, *exchange.Exchange, exchange.Front) exchange.Flow {
	return nothing{}
}

// BenchmarkHTTP2 has one client ask for short answers, 50 at a time.
func BenchmarkHTTP2(b *testing.B) {
	const batch = 50
	counts := newCounts()
	e := &edge{t: b, frontend: New(Config{
		Upstream: atOnce{[]byte("hello, world")}, Loops: loops(b), Logger: slog.New(slog.DiscardHandler), Counters: func(string) Counters { return counts },
	})}
	e.cert, e.roots = selfSigned(b, "app.test")
	e.apply(e.listener("main"))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- e.frontend.Run(ctx) }()
	defer func() {
		cancel()
		<-done
	}()
	conn := e.dial(func(c *tls.Config) { c.NextProtos = []string{"h2"} })
	machine := http2.NewClient(http2.Config{})
	defer conn.Close()
	request := &exchange.Request{Method: "GET", Scheme: "https", Authority: "app.test", Target: "/", Fields: exchange.Fields{
		{Name: "user-agent", Value: "benchmark"}, {Name: "accept", Value: "*/*"}, {Name: "accept-encoding", Value: "gzip"},
	}}
	var event http2.Event
	out, in := machine.AppendPending(nil), make([]byte, 64<<10)
	b.ReportAllocs()
	for b.Loop() {
		for range batch {
			out, _, _ = machine.AppendRequest(out, request, true)
		}
		if _, err := conn.Write(out); err != nil {
			b.Fatal(err)
		}
		out = out[:0]
		for left := batch; left > 0; {
			n, err := conn.Read(in)
			if err != nil {
				b.Fatal(err)
			}
			for rest := in[:n]; ; {
				used, err := machine.Next(rest, &event)
				if err != nil {
					b.Fatal(err)
				}
				rest = rest[used:]
				if event.Kind == http2.None {
					break
				}
				if event.Kind == http2.Data {
					machine.Consumed(event.Stream, len(event.Data))
					if event.End {
						left--
					}
				}
			}
			out = machine.AppendPending(out)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/request")
}
