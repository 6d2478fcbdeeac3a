package integration

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// patience opens a connection for each request and is for a backend that has
// just started on a busy machine.
const patience = `  protocol: http1
  connections: {maxRequests: 1, closeTimeout: 5s}
  sessions: {coalesceTimeout: 15s}
  timeouts: {handshake: 20s}
`

// TestStockBackends makes an edge open connections to servers whose resumption
// is as their makers left it, and bounds the full handshakes that they cost.
func TestStockBackends(t *testing.T) {
	const requests, clients = 40, 8
	most := map[peers.Mode]int64{peers.TLS12Tickets: 3, peers.TLS13: 8}
	w := newWorldOf(t, harness.NewShipped(t))
	w.StartControlPlane()
	edge := w.StartEdge("one", "")
	address := w.Address()
	w.WaitAcked(w.Apply(harness.Certificate("site", w.Pair)+harness.Listener("web", address, "", "")), edge)
	client := w.Client(t, address, false)
	for _, stock := range peers.Stocks() {
		homes := []string{""}
		if stock.Name == "jetty" {
			homes = peers.Javas() // the others tell nothing more of Java
		}
		for i, home := range homes {
			for _, mode := range []peers.Mode{peers.TLS12Tickets, peers.TLS13} {
				for _, one := range []bool{false, true} {
					if i > 0 && one {
						continue
					}
					name := fmt.Sprintf("%s-%s-%s", stock.Name, pick(mode == peers.TLS13, "tls13", "tls12"), pick(one, "one-name", "two-names"))
					if home != "" {
						name += "-" + filepath.Base(home)
					}
					t.Run(name, func(t *testing.T) {
						backend := w.Launch(t, stock.Start, peers.Options{Mode: mode, OneName: one, JavaHome: home})
						host := name + "." + harness.SiteName
						pool := w.Pool(name, []*peers.Backend{backend}, patience)
						w.WaitAcked(w.Apply(pool+harness.Route(name, "web", host, name, "")), edge)
						ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
						defer cancel()
						together(ctx, requests, clients, func(ctx context.Context) error {
							return answered(ctx, client, "https://"+host+peers.Small)
						}).Check(t, requests)
						harness.Settle(t, func() error {
							return w.judge(t, backend, name, requests, most[mode])
						})
						w.log(t, backend, name)
					})
				}
			}
		}
	}
}

// together makes n requests, as many at a time as there are clients.
func together(ctx context.Context, n, clients int, request func(context.Context) error) *harness.Failures {
	var failed harness.Failures
	var next atomic.Int64
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			for next.Add(1) <= int64(n) {
				failed.Add(request(ctx))
			}
		})
	}
	all.Wait()
	return &failed
}

// answered makes a request that any content answers.
func answered(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	return nil
}

// judge returns what is wrong with what n requests cost a backend.
func (w *world) judge(t *testing.T, backend *peers.Backend, pool string, n, most int64) error {
	t.Helper()
	counts, err := backend.Counts(t.Context())
	if err != nil {
		return err
	}
	stats := w.PoolStats(pool)
	switch {
	case counts.Full+counts.Resumed() < n:
		return fmt.Errorf("%d full and %d resumed handshakes for %d requests on a connection each", counts.Full, counts.Resumed(), n)
	case counts.Full > most:
		return fmt.Errorf("%d full handshakes at the backend, must be at most %d; misses %v", counts.Full, most, stats.Misses)
	case stats.Handshakes.Full != counts.Full || stats.Resumed() != counts.Resumed() || stats.Missed() != counts.Full:
		return fmt.Errorf("the edge counts %+v with misses %v, the backend %+v", stats.Handshakes, stats.Misses, counts)
	case counts.Unclean > 0 || counts.Resets > 0:
		return fmt.Errorf("%d unclean ends and %d RSTs; the edge closed %v", counts.Unclean, counts.Resets, stats.Closes)
	}
	return nil
}
