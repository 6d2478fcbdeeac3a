package integration

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// census counts the connections that a backend has at a time, as the kernel knows them:
// a connection whose client has closed it is none.
type census struct {
	port string // as /proc/net/tcp has it
	stop func()

	mu   sync.Mutex
	most int64
}

func takeCensus(t *testing.T, address string) *census {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	c := &census{port: fmt.Sprintf(":%04X", number)}
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(5 * time.Millisecond)
		defer ticker.Stop()
		for {
			c.count()
			select {
			case <-ticker.C:
			case <-ended:
				return
			}
		}
	}()
	c.stop = sync.OnceFunc(func() { close(ended); <-done })
	t.Cleanup(c.stop)
	return c
}

// count counts once. It holds the lock meanwhile, so that no count is older than it is
// taken for.
func (c *census) count() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.most = max(c.most, c.now())
}

func (c *census) now() int64 {
	table, err := os.Open("/proc/net/tcp")
	if err != nil {
		return 0
	}
	defer table.Close()
	// The kernel loses its place in the table when connections end while it is read, and
	// then lists some twice.
	clients := map[string]bool{}
	for lines := bufio.NewScanner(table); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		const established = "01"
		if len(fields) > 3 && strings.HasSuffix(fields[1], c.port) && fields[3] == established {
			clients[fields[2]] = true
		}
	}
	return int64(len(clients))
}

// reset returns the most that there was since it was called last.
func (c *census) reset() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	most := c.most
	c.most = 0
	return most
}

// within is the most that there was while something was done.
func (c *census) within(do func()) int64 {
	c.reset()
	do()
	return c.reset()
}

// budgeted is a fleet that shares out what one backend can carry.
type budgeted struct {
	*replicated
	backend   *peers.Backend
	edges     map[string]*harness.Edge
	addresses map[string]string
	failed    harness.Failures
	requests  atomic.Int64
}

// start starts an edge at a replica.
func (b *budgeted) start(id string, at *harness.ControlPlane) {
	b.t.Helper()
	b.edges[id] = b.StartEdge(id, "n="+id, "--control-plane", at.Address)
	b.edges[id].WaitReady()
}

// shares are those of the edges that run, as they show them themselves, sorted.
func (b *budgeted) shares() []int {
	b.t.Helper()
	var all []int
	for _, edge := range b.edges {
		all = append(all, int(edge.Metrics().Sum("reseal_backend_connection_share", "pool", "app")))
	}
	slices.Sort(all)
	return all
}

func (b *budgeted) await(patience time.Duration, want ...int) {
	b.t.Helper()
	deadline := time.Now().Add(patience)
	for got := b.shares(); !slices.Equal(got, want); got = b.shares() {
		if time.Now().After(deadline) {
			b.t.Fatalf("the edges have shares of %v, want %v", got, want)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// load has each edge serve 24 clients at a time for as long as do takes.
func (b *budgeted) load(do func()) {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	var clients sync.WaitGroup
	for id := range b.edges {
		client := b.Client(b.t, b.addresses[id], false)
		for range 24 {
			clients.Go(func() {
				for ctx.Err() == nil {
					b.requests.Add(1)
					b.failed.Add(harness.Get(context.WithoutCancel(ctx), client, "https://"+harness.SiteName+"/", []byte("ok")))
				}
			})
		}
	}
	do()
	cancel()
	clients.Wait()
}

// loadAndCount loads the edges, and fails unless they use all of what they have, and no
// more, once they had a moment for it.
func (b *budgeted) loadAndCount(when string, c *census, want int64) {
	b.t.Helper()
	b.load(func() {
		time.Sleep(500 * time.Millisecond)
		if most := c.within(func() { time.Sleep(1500 * time.Millisecond) }); most != want {
			b.t.Errorf("%s: the backend had up to %d connections, want %d; the edges' shares are %v", when, most, want, b.shares())
		}
	})
}

// TestConnectionBudget: edges of two replicas come and go, and one starts without a
// control plane, and the backend never has more connections than it can carry.
func TestConnectionBudget(t *testing.T) {
	r := newReplicated(t, 2)
	answer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(5 * time.Millisecond)
		_, _ = io.WriteString(w, "ok")
	})
	b := &budgeted{replicated: r, edges: map[string]*harness.Edge{}, addresses: map[string]string{}}
	b.backend = r.Launch(t, func(_ context.Context, o peers.Options) (*peers.Backend, error) { return peers.GoWith(o, answer) }, peers.Options{})
	manifest := harness.Certificate("site", r.Pair) + r.Pool("app", []*peers.Backend{b.backend}, "  connections: {maxPerFleet: 9}\n")
	for _, id := range []string{"e1", "e2", "e3"} {
		b.addresses[id] = r.Address()
		manifest += harness.Listener("web-"+id, b.addresses[id], "n: "+id, "  pool: app\n")
	}
	r.Apply(manifest)
	count := takeCensus(t, b.backend.Address)

	b.start("e1", r.replicas[0])
	b.await(10*time.Second, 9)
	b.loadAndCount("one edge", count, 9)

	// The second one, at the other replica, has to wait; meanwhile there is one more.
	b.load(func() {
		most := count.within(func() {
			b.start("e2", r.replicas[1])
			b.await(15*time.Second, 4, 5)
		})
		if most > 10 {
			t.Errorf("while an edge came the backend had up to %d connections", most)
		}
	})
	b.loadAndCount("two edges", count, 9)
	b.start("e3", r.replicas[0])
	b.await(15*time.Second, 3, 3, 3)
	b.loadAndCount("three edges", count, 9)

	var stats struct {
		Pools []struct{ Connections struct{ Share int } }
	}
	for _, replica := range r.replicas {
		if described := r.TryCtlAt(replica, "describe", "pool", "app"); !strings.Contains(described.Stdout, "9 of 9 per endpoint shared out: 3 each to 3 edges") {
			t.Errorf("described at %s:\n%s%s", replica.Address, described.Stdout, described.Stderr)
		}
		r.jsonAt(replica, &stats, "stats", "pools")
		if len(stats.Pools) != 1 || stats.Pools[0].Connections.Share != 9 {
			t.Errorf("statistics at %s: %+v", replica.Address, stats)
		}
	}

	// An edge that is restarted keeps its place, and nobody hears of it.
	if err := b.edges["e2"].Stop(); err != nil {
		t.Error(err)
	}
	b.edges["e2"].Start()
	b.edges["e2"].WaitReady()
	b.await(time.Second, 3, 3, 3)
	time.Sleep(2 * time.Second)
	b.await(time.Second, 3, 3, 3)

	// One leaves: after a while the others have more.
	if err := b.edges["e2"].Stop(); err != nil {
		t.Error(err)
	}
	delete(b.edges, "e2")
	time.Sleep(5 * time.Second)
	b.await(time.Second, 3, 3)
	b.await(60*time.Second, 4, 5)
	b.loadAndCount("one left", count, 9)

	// More edges than connections.
	revision := r.Apply(r.Pool("app", []*peers.Backend{b.backend}, "  connections: {maxPerFleet: 1}\n"))
	r.WaitAcked(revision, b.edges["e1"], b.edges["e3"])
	b.await(10*time.Second, 1, 1)
	if diagnosed := strings.Join(strings.Fields(r.Ctl("diagnose", "pool", "app")), " "); !strings.Contains(diagnosed, "connections.maxPerFleet is 1, but 2 edges have") {
		t.Errorf("diagnosed:\n%s", diagnosed)
	}
	b.loadAndCount("two edges for one connection", count, 2)
	revision = r.Apply(r.Pool("app", []*peers.Backend{b.backend}, "  connections: {maxPerFleet: 9}\n"))
	r.WaitAcked(revision, b.edges["e1"], b.edges["e3"])
	b.await(10*time.Second, 4, 5)

	// Without a control plane all keep what they have, over a restart as well.
	for _, replica := range r.replicas {
		replica.Kill()
	}
	before := b.edges["e1"].Metrics().Sum("reseal_backend_connection_share", "pool", "app")
	b.edges["e1"].Kill()
	b.edges["e1"].Start()
	b.edges["e1"].WaitReady()
	if after := b.edges["e1"].Metrics().Sum("reseal_backend_connection_share", "pool", "app"); after != before {
		t.Errorf("an edge that was started without a control plane has a share of %v, want %v", after, before)
	}
	b.loadAndCount("without a control plane", count, 9)
	b.failed.Check(t, b.requests.Load())
	count.stop()
}
