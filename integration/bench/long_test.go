package bench

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

const (
	longRequests = 1_000_000
	// A tenth of the requests comes before the first look.
	longWarmUp = longRequests / 10
	// What may differ without being a leak: goroutines of the edge's own, as the
	// feed and the page come and go, and what the allocator keeps.
	spareGoroutines = 10
	spareMemory     = 6 << 20
)

// TestMillion makes a million requests through one edge and compares its
// goroutines and memory after a tenth of them with those after all. The backend
// closes every 20th connection and clients abort every 100th large response, so
// that connections, handshakes and closes are among what could leak.
func TestMillion(t *testing.T) {
	if os.Getenv("RESEAL_LONG") != "1" {
		t.Skip("a million requests take minutes; set RESEAL_LONG=1")
	}
	b := newBench(t)
	backend, err := peers.GoWith(peers.Options{Authority: b.Authority, Mode: peers.TLS13}, closeSome(peers.Handler(false)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := backend.Stop(); err != nil {
			t.Error(err)
		}
	})
	edge := newReseal(b.Fleet, target{scenario: &Scenario{Key: "million"}, backend: backend.Address, authority: b.Authority})
	if err := edge.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	send := func(n int) {
		longLoad(t, b, edge.Address(), peers.Small, n*99/100, 0)
		longLoad(t, b, edge.Address(), peers.Medium, n/100, 100)
	}
	send(longWarmUp)
	before := usageOf(t, edge.nodes[0].Edge)
	send(longRequests - longWarmUp)
	after := usageOf(t, edge.nodes[0].Edge)
	t.Logf("after %d requests: %v; after %d: %v", longWarmUp, before, longRequests, after)
	t.Logf("edge: %+v", edge.Handshakes())
	if after.goroutines > before.goroutines+spareGoroutines {
		t.Errorf("goroutines grew from %d to %d", before.goroutines, after.goroutines)
	}
	if after.heap > before.heap+spareMemory {
		t.Errorf("the heap grew from %d to %d bytes", before.heap, after.heap)
	}
	if after.resident > before.resident+before.resident/10+spareMemory {
		t.Errorf("resident memory grew from %d to %d bytes", before.resident, after.resident)
	}
	counts, err := backend.Counts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if counts.Requests < longRequests*99/100 {
		t.Errorf("the backend had %d requests only", counts.Requests)
	}
}

// closeSome makes a server close its connection after every 20th response.
func closeSome(handler http.Handler) http.Handler {
	var served atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if served.Add(1)%20 == 0 {
			w.Header().Set("Connection", "close")
		}
		handler.ServeHTTP(w, r)
	})
}

func longLoad(t *testing.T, b testBench, address, path string, n, abortEvery int) {
	t.Helper()
	load := &Load{
		Address: address, TLS: &tls.Config{RootCAs: b.Authority.Pool(), MinVersion: tls.VersionTLS12},
		Hosts: []string{siteName}, Path: path, Requests: n, Clients: defaultClients, AbortEvery: abortEvery,
	}
	outcome, err := load.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if outcome.Failed > 0 {
		t.Errorf("%d of %d requests failed: %v", outcome.Failed, n, outcome.Errors)
	}
	t.Logf("%d requests of %s in %v", n, path, outcome.Took.Round(time.Millisecond))
}

// usage is what a process holds while it has nothing to do.
type usage struct {
	goroutines, heap, resident int64
}

func (u usage) String() string {
	return fmt.Sprintf("%d goroutines, %.1f MB heap, %.1f MB resident", u.goroutines, float64(u.heap)/(1<<20), float64(u.resident)/(1<<20))
}

// usageOf looks at an edge once its closes are over and its garbage is
// collected.
func usageOf(t *testing.T, edge *harness.Edge) usage {
	t.Helper()
	if err := sleep(t.Context(), 3*time.Second); err != nil {
		t.Fatal(err)
	}
	var u usage
	first := page(t, edge, "/debug/pprof/goroutine?debug=1")
	if n, err := fmt.Sscanf(first, "goroutine profile: total %d", &u.goroutines); n != 1 {
		t.Fatalf("goroutine profile: %v in %.100q", err, first)
	}
	// Two collections: the first one only empties sync.Pools into their victims.
	page(t, edge, "/debug/pprof/heap?gc=1&debug=1")
	page(t, edge, "/debug/pprof/heap?gc=1&debug=1")
	u.heap = int64(edge.Metrics().Sum("go_memstats_heap_alloc_bytes"))
	u.resident = int64(edge.Metrics().Sum("process_resident_memory_bytes"))
	if u.heap == 0 || u.resident == 0 {
		t.Fatalf("the edge's /metrics lack its memory: %v", u)
	}
	return u
}

func page(t *testing.T, edge *harness.Edge, path string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+edge.Admin+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", path, response.Status, err)
	}
	return string(text)
}
