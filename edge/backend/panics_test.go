package backend

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// faulty is a Handshaker that panics where it is told to.
type faulty struct {
	*fakeSessions
	where atomic.Value // a string
}

func (f *faulty) panics(where string) {
	if at, _ := f.where.Load().(string); at == where {
		panic("told to")
	}
}

func (f *faulty) Reserve(ctx context.Context, identity exchange.Identity, terms exchange.Terms) (exchange.Attempt, error) {
	f.panics("reserve")
	a, err := f.fakeSessions.Reserve(ctx, identity, terms)
	return faultyAttempt{a, f}, err
}

func (f *faulty) Unclean(identity exchange.Identity) {
	f.panics("unclean")
	f.fakeSessions.Unclean(identity)
}

type faultyAttempt struct {
	exchange.Attempt
	f *faulty
}

func (a faultyAttempt) Handshake(ctx context.Context, conn net.Conn, cfg *tls.Config) (
	exchange.TLSConn, resealv1.Mechanism, resealv1.MissReason, error) {
	a.f.panics("handshake")
	tc, mechanism, miss, err := a.Attempt.Handshake(ctx, conn, cfg)
	return faultyConn{tc, a.f}, mechanism, miss, err
}

type faultyConn struct {
	exchange.TLSConn
	f *faulty
}

func (c faultyConn) Read(p []byte) (int, error) {
	n, err := c.TLSConn.Read(p)
	c.f.panics("read")
	return n, err
}

func (c faultyConn) Write(p []byte) (int, error) {
	c.f.panics("write")
	return c.TLSConn.Write(p)
}

func (c faultyConn) CloseWrite() error {
	c.f.panics("close")
	return c.TLSConn.CloseWrite()
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) has(what string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Contains(l.b.Bytes(), []byte(what))
}

// A panic anywhere costs a request or a connection, whose slot is free again, and
// says where it was.
func TestPanicsEndNothingElse(t *testing.T) {
	bothProtocols(t, func(t *testing.T, plain *bench, s *server) {
		for _, where := range []string{"resolve", "dial", "reserve", "handshake", "read", "write", "close", "unclean"} {
			t.Run(where, func(t *testing.T) {
				log := &lockedBuffer{}
				f := &faulty{fakeSessions: newFakeSessions()}
				x := newBench(t, nil)
				x.stop() // another Backend takes its place
				address := netip.MustParseAddrPort(s.addr)
				stopLoops := x.run(Config{
					Handshaker: f, Counters: func(string) exchange.Counters { return newTally() },
					Logger: slog.New(slog.NewTextHandler(log, nil)),
					Resolve: func(context.Context, string) ([]netip.Addr, error) {
						f.panics("resolve")
						return []netip.Addr{address.Addr()}, nil
					},
					Dial: func(ctx context.Context, network, to string) (net.Conn, error) {
						f.panics("dial")
						return (&net.Dialer{}).DialContext(ctx, network, to)
					},
				})
				defer stopLoops()
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error)
				go func() { ended <- x.b.Run(ctx) }()
				f.where.Store(where)
				x.spec.Protocol = plain.spec.Protocol
				x.spec.Dns = &resealv1.DNSEndpoints{Name: "backend.test", Port: uint32(address.Port())}
				x.set(retries(0), connections(func(c *resealv1.Connections) { c.MaxPerEndpoint, c.MaxRequests = 1, 1 }),
					timeouts(func(p *resealv1.BackendTimeouts) { p.Connect = dur(1e8) }))
				for range 3 {
					req := newRequest(t, "POST", "/bytes/10", nil)
					_, _, _ = x.try(req, nil)
				}
				if where != "unclean" && !log.has("panic") {
					t.Errorf("nothing of it in the log")
				}
				f.where.Store("")
				eventually(t, "requests are served", func() bool {
					resp, _, err := x.try(newRequest(t, "GET", "/bytes/10", nil), nil)
					return err == nil && resp.StatusCode == 200
				})
				cancel()
				<-ended
				for _, e := range x.current("p").state.Load().endpoints {
					if e.open != 0 || e.waiting != 0 || e.InFlight() != 0 {
						t.Errorf("%d connections open, %d calls wait, %d in flight", e.open, e.waiting, e.InFlight())
					}
				}
			})
		}
	})
}
