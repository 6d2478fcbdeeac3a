package http2

import (
	"bytes"
	"runtime"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// pair is a client and a server machine, connected by memory.
type pair struct {
	client, server     *Conn
	toServer, toClient []byte
	clientEv, serverEv Event
}

func newPair(cfg Config) *pair {
	p := &pair{client: NewClient(cfg), server: NewServer(cfg)}
	p.toServer = p.client.AppendPending(nil)
	p.toClient = p.server.AppendPending(nil)
	for range 2 {
		p.atServer(func(*Event) {})
		p.atClient(func(*Event) {})
	}
	return p
}

func (p *pair) atServer(on func(ev *Event)) {
	p.toServer = p.drain(p.server, p.toServer, &p.serverEv, on)
}
func (p *pair) atClient(on func(ev *Event)) {
	p.toClient = p.drain(p.client, p.toClient, &p.clientEv, on)
}

// drain has a machine read all that came, and send what it owes.
func (p *pair) drain(c *Conn, in []byte, ev *Event, on func(ev *Event)) []byte {
	for rest := in; ; {
		n, err := c.Next(rest, ev)
		if rest = rest[n:]; err != nil {
			panic(err)
		}
		if ev.Kind == None {
			break
		}
		on(ev)
	}
	if c.client {
		p.toServer = c.AppendPending(p.toServer)
	} else {
		p.toClient = c.AppendPending(p.toClient)
	}
	return in[:0]
}

var (
	benchRequest = exchange.Request{
		Method: "GET", Scheme: "https", Authority: "www.example.com", Target: "/static/app.js?v=17", Version: exchange.HTTP2,
		Fields: exchange.Fields{
			{Name: "user-agent", Value: "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"},
			{Name: "accept", Value: "*/*"}, {Name: "accept-language", Value: "en-GB,en;q=0.5"},
			{Name: "accept-encoding", Value: "gzip, deflate, br, zstd"}, {Name: "cookie", Value: "session=0123456789abcdef0123456789abcdef"},
			{Name: "x-forwarded-for", Value: "192.0.2.17"},
		},
	}
	benchResponse = exchange.Response{
		Status: 200, Length: 1024,
		Fields: exchange.Fields{
			{Name: "Content-Type", Value: "text/javascript"}, {Name: "Date", Value: "Sun, 29 Nov 2026 15:00:00 GMT"},
			{Name: "ETag", Value: `"0123456789"`}, {Name: "Cache-Control", Value: "max-age=600"}, {Name: "Server", Value: "nginx"},
		},
	}
)

// exchangeOnce makes a GET with a response of 1 KB. It returns the bytes of
// content that came.
func (p *pair) exchangeOnce(body []byte) (received int) {
	var err error
	if p.toServer, _, err = p.client.AppendRequest(p.toServer, &benchRequest, true); err != nil {
		panic(err)
	}
	p.atServer(func(ev *Event) {
		if ev.Kind != Request {
			return
		}
		if p.toClient, err = p.server.AppendResponse(p.toClient, ev.Stream, &benchResponse, false); err != nil {
			panic(err)
		}
		if p.toClient, _, err = p.server.AppendData(p.toClient, ev.Stream, body, true); err != nil {
			panic(err)
		}
	})
	p.atClient(func(ev *Event) {
		if ev.Kind == Data {
			received += len(ev.Data)
			p.client.Consumed(ev.Stream, len(ev.Data))
		}
	})
	return received
}

// BenchmarkExchange is a GET with a response of 1 KB, through both machines.
func BenchmarkExchange(b *testing.B) {
	p, body := newPair(Config{}), bytes.Repeat([]byte("x"), 1024)
	b.ReportAllocs()
	for b.Loop() {
		if p.exchangeOnce(body) != len(body) {
			b.Fatal("no answer")
		}
	}
}

// TestExchangeAllocations: what an exchange costs in allocations, both sides
// together, once the tables know the fields that repeat. Two are the text of what
// is not in the tables, one of each head.
func TestExchangeAllocations(t *testing.T) {
	p, body := newPair(Config{}), bytes.Repeat([]byte("x"), 1024)
	if got := testing.AllocsPerRun(1000, func() { p.exchangeOnce(body) }); got > 2 {
		t.Errorf("%v allocations per exchange", got)
	}
}

// TestDataAllocations: content costs none.
func TestDataAllocations(t *testing.T) {
	p, content := newPair(Config{}), make([]byte, 60000)
	if p.toServer, _, _ = p.client.AppendRequest(p.toServer, &benchRequest, true); len(p.toServer) == 0 {
		t.Fatal("no request")
	}
	p.atServer(func(ev *Event) {
		p.toClient, _ = p.server.AppendResponse(p.toClient, 1, &exchange.Response{Status: 200, Length: exchange.UnknownLength}, false)
	})
	sent, received := 0, 0
	got := testing.AllocsPerRun(100, func() {
		var n int
		p.toClient, n, _ = p.server.AppendData(p.toClient, 1, content, false)
		sent += n
		p.atClient(func(ev *Event) {
			if ev.Kind == Data {
				received += len(ev.Data)
				p.client.Consumed(1, len(ev.Data))
			}
		})
		p.atServer(func(*Event) {})
	})
	if got > 0 || received != sent || sent < 50*len(content) {
		t.Errorf("%v allocations for 60,000 bytes, %d of %d bytes came", got, received, sent)
	}
}

// BenchmarkDownload passes 100 MB of a body through both machines.
func BenchmarkDownload(b *testing.B) {
	const size, part = 100 << 20, 128 << 10
	body := bytes.Repeat([]byte("x"), part)
	response := exchange.Response{Status: 200, Length: size}
	b.ReportAllocs()
	b.SetBytes(size)
	for b.Loop() {
		p := newPair(Config{StreamWindow: 1 << 20})
		var err error
		if p.toServer, _, err = p.client.AppendRequest(p.toServer, &benchRequest, true); err != nil {
			b.Fatal(err)
		}
		p.atServer(func(ev *Event) {
			if ev.Kind == Request {
				p.toClient, err = p.server.AppendResponse(p.toClient, 1, &response, false)
			}
		})
		for sent, received := 0, 0; received < size; {
			var n int
			rest := min(part, size-sent)
			if p.toClient, n, err = p.server.AppendData(p.toClient, 1, body[:rest], sent+rest == size); err != nil {
				b.Fatal(err)
			}
			sent += n
			p.atClient(func(ev *Event) {
				if ev.Kind == Data {
					received += len(ev.Data)
					p.client.Consumed(1, len(ev.Data))
				}
			})
			p.atServer(func(*Event) {})
		}
	}
}

// BenchmarkIdle tells what a connection holds between exchanges.
func BenchmarkIdle(b *testing.B) {
	const conns = 1000
	body := bytes.Repeat([]byte("x"), 1024)
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	for b.Loop() {
		before, kept := heap(), make([]*Conn, 0, 2*conns)
		for range conns {
			p := newPair(Config{})
			for range 20 {
				p.exchangeOnce(body)
			}
			kept = append(kept, p.client, p.server)
		}
		b.ReportMetric(float64(heap()-before)/float64(len(kept)), "B/conn")
		runtime.KeepAlive(kept)
	}
}
