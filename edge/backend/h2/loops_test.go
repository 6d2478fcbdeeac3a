package h2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/reseal/reseal/edge/backend/crossing"
	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/legtest"
	"github.com/reseal/reseal/edge/loop"
)

// leg carries exchanges of all loops over one connection.
type leg struct {
	b     *bench
	lanes crossing.Lanes
}

func (l leg) Start(at *loop.Loop, x *exchange.Exchange, r *exchange.Request, front exchange.Front) exchange.Flow {
	return l.lanes.Begin(at, l.b.loop, l, x.Client, r, front)
}

func (l leg) Tunnel(*loop.Loop, *exchange.Exchange, exchange.Front) exchange.Flow {
	panic("no tunnels")
}

func (l leg) Begin(client uint64, r *exchange.Request, front exchange.Front) exchange.Flow {
	return l.b.conn.Begin(client, r, front)
}

func (l leg) Drop() { l.b.Free(1, 1, false) }

// TestThroughLoops: many exchanges of other loops at once, with bodies both ways, of
// which some are given up, lose nothing and hold nothing.
func TestThroughLoops(t *testing.T) {
	b := dial(t, serveHTTP(site(), &http2.Server{MaxConcurrentStreams: 1000, MaxUploadBufferPerStream: 70_000, MaxUploadBufferPerConnection: 100_000}))
	group := loop.New(loop.Config{Loops: 2, Panicked: func(bug any, stack []byte) { t.Errorf("panic: %v\n%s", bug, stack) }})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := group.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer cancel()
	rt := &legtest.RoundTripper{Backend: leg{b: b, lanes: crossing.New(append(slices.Clone(group.Loops()), b.loop))}, Loops: group}
	const clients, requests = 8, 16
	var all sync.WaitGroup
	for client := range clients {
		all.Go(func() {
			for i := range requests {
				content := bytes.Repeat([]byte{byte(client), byte(i), 3}, rand.IntN(200_000)/3+1)
				ctx, cancel := context.WithCancel(t.Context())
				givenUp := rand.IntN(4) == 0
				if givenUp {
					time.AfterFunc(time.Duration(rand.IntN(20))*time.Millisecond, cancel)
				}
				req := httptest.NewRequestWithContext(ctx, http.MethodPost, "/echo", io.NopCloser(bytes.NewReader(content)))
				if rand.IntN(2) == 0 {
					req.ContentLength = int64(len(content))
				}
				err := echoes(rt, req, content)
				if err != nil && !givenUp {
					t.Errorf("client %d, request %d: %v", client, i, err)
				}
				cancel()
			}
		})
	}
	all.Wait()
	b.eventually("all streams are free", func() bool {
		return b.free == clients*requests && b.over == b.free && len(b.conn.streams) == 0 && b.conn.machine.Open() == 0
	})
	if c := b.get("/"); c.failed != nil {
		t.Error(c.failed)
	}
	b.on(func() {
		if len(b.conn.blocked)+len(b.conn.starting)+len(b.conn.news) > 0 || b.conn.reset+b.conn.awaited > 0 {
			t.Errorf("left over: %+v", b.conn)
		}
	})
}

func echoes(rt *legtest.RoundTripper, req *http.Request, content []byte) error {
	resp, err := rt.RoundTrip(req, &exchange.Exchange{})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(got, content):
		return fmt.Errorf("%d bytes of %d came back, or others", len(got), len(content))
	case resp.Trailer.Get("X-Sum") != fmt.Sprint(len(content)):
		return fmt.Errorf("trailers %v", resp.Trailer)
	}
	return nil
}
