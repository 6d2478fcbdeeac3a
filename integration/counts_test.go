package integration

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// countedRequests is what each backend gets, besides its content.
const countedRequests = 5000

// maxFull is how many full handshakes a backend may pay for: one is enough, and
// one for each concurrent client would be as bad as proxies that don't wait for
// the first session.
const maxFull = 31

// TestBackends sends all content and 5,000 requests through an edge to each kind
// of backend, and compares the edge's handshakes with those that the backend
// counted itself.
func TestBackends(t *testing.T) {
	w := newWorldOf(t, harness.NewShipped(t))
	w.StartControlPlane()
	edge := w.StartEdge("one", "")
	address := w.Address()
	w.WaitAcked(w.Apply(harness.Certificate("site", w.Pair)+harness.Listener("web", address, "", "")), edge)

	cases := []struct {
		name  string
		start func(context.Context, peers.Options) (*peers.Backend, error)
		peers.Options
	}{
		{"jetty-ids", peers.JettyArranged, peers.Options{Mode: peers.TLS12SessionIDs}},
		{"jetty-ids-close", peers.JettyArranged, peers.Options{Mode: peers.TLS12SessionIDs, CloseEach: true}},
		{"jetty-tickets", peers.JettyArranged, peers.Options{Mode: peers.TLS12Tickets}},
		{"jetty-tickets-close", peers.JettyArranged, peers.Options{Mode: peers.TLS12Tickets, CloseEach: true}},
		{"jetty-tls13", peers.JettyArranged, peers.Options{Mode: peers.TLS13}},
		{"jetty-tls13-close", peers.JettyArranged, peers.Options{Mode: peers.TLS13, CloseEach: true}},
		{"nginx-ids-close", peers.Nginx, peers.Options{Mode: peers.TLS12SessionIDs, CloseEach: true}},
		{"nginx-tickets-close", peers.Nginx, peers.Options{Mode: peers.TLS12Tickets, CloseEach: true}},
		{"nginx-tls13-close", peers.Nginx, peers.Options{Mode: peers.TLS13, CloseEach: true}},
		{"nginx-h2", peers.Nginx, peers.Options{Mode: peers.TLS13, HTTP2: true}},
		{"haproxy", peers.HAProxy, peers.Options{Mode: peers.TLS13}},
		{"haproxy-tickets-close", peers.HAProxy, peers.Options{Mode: peers.TLS12Tickets, CloseEach: true}},
		{"openssl-tickets", peers.OpenSSL, peers.Options{Mode: peers.TLS12Tickets}},
		{"openssl-tls13", peers.OpenSSL, peers.Options{Mode: peers.TLS13}},
		{"go-h1-close", peers.Go, peers.Options{Mode: peers.TLS13, CloseEach: true}},
		{"go-h1-tickets-close", peers.Go, peers.Options{Mode: peers.TLS12Tickets, CloseEach: true}},
		{"go-h2", peers.Go, peers.Options{Mode: peers.TLS13, HTTP2: true}},
	}
	for _, test := range cases {
		t.Run(test.name, func(t *testing.T) {
			backend := w.Launch(t, test.start, test.Options)
			host := test.name + "." + harness.SiteName
			w.WaitAcked(w.Apply(w.Pool(test.name, []*peers.Backend{backend}, "")+harness.Route(test.name, "web", host, test.name, "")), edge)
			base := "https://" + host

			for _, http2 := range []bool{false, true} {
				if err := peers.Verify(t.Context(), w.Client(t, address, http2), base, backend); err != nil {
					t.Errorf("content, h2=%t: %v", http2, err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			client := w.Client(t, address, false)
			start := time.Now()
			harness.Hammer(ctx, countedRequests, func(ctx context.Context, _ int) error {
				return harness.Get(ctx, client, base+peers.Small, peers.Body(peers.Small))
			}).Check(t, countedRequests)
			t.Logf("%d requests in %v", countedRequests, time.Since(start).Round(time.Millisecond))
			harness.Settle(t, func() error { return w.compare(t, backend, test.name) })
			w.log(t, backend, test.name)
		})
	}
}

// compare returns how the edge's counters of a pool differ from the backend's.
func (w *world) compare(t *testing.T, backend *peers.Backend, pool string) error {
	t.Helper()
	counts, err := backend.Counts(t.Context())
	if err != nil {
		return err
	}
	stats := w.PoolStats(pool)
	want := harness.Stats{}
	want.Handshakes.Full = counts.Full
	want.Handshakes.Resumed.SessionID = counts.ResumedSessionID
	want.Handshakes.Resumed.Ticket = counts.ResumedTicket
	want.Handshakes.Resumed.PSK = counts.ResumedPSK
	want.Handshakes.Failed = stats.Handshakes.Failed // an end that one side alone may see
	switch {
	case stats.Handshakes != want.Handshakes:
		return fmt.Errorf("handshakes: the edge counts %+v, the backend %+v", stats.Handshakes, counts)
	case counts.Full > maxFull:
		return fmt.Errorf("the backend counts %d full handshakes, want at most %d; misses %v", counts.Full, maxFull, stats.Misses)
	case stats.Missed() != stats.Handshakes.Full:
		return fmt.Errorf("misses %v don't add up to %d full handshakes", stats.Misses, stats.Handshakes.Full)
	case stats.Requests < countedRequests:
		return fmt.Errorf("the edge counts %d requests, less than the %d of this test", stats.Requests, countedRequests)
	case counts.Requests != peers.Unknown && stats.Requests != counts.Requests:
		return fmt.Errorf("requests: the edge counts %d, the backend %d", stats.Requests, counts.Requests)
	case stats.Errors != 0:
		return fmt.Errorf("the edge counts errors: %v", stats.ErrorsByReason)
	case counts.Unclean > 0:
		return fmt.Errorf("the backend saw %d connections end without close_notify; the edge closed %v", counts.Unclean, stats.Closes)
	case counts.Resets > 0:
		return fmt.Errorf("the backend saw %d resets; the edge closed %v", counts.Resets, stats.Closes)
	}
	return nil
}

func (w *world) log(t *testing.T, backend *peers.Backend, pool string) {
	t.Helper()
	counts, err := backend.Counts(t.Context())
	stats := w.PoolStats(pool)
	t.Logf("backend: %+v (%v)", counts, err)
	t.Logf("edge: %+v, misses %v, connections %+v, closes %v", stats.Handshakes, stats.Misses, stats.Connections, stats.Closes)
}
