package tickets

import (
	"context"
	"crypto/tls"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
)

// The clients of TestRotations: 200. Those of Go and OpenSSL speak TLS 1.2 and
// 1.3 in turn.
const (
	goClients   = 160
	sClients    = 20
	curlClients = 20
	// together is how many of the Go clients are connected at a time, and
	// processes how many of the s_clients.
	together, processes = 16, 2
)

// load is clients that connect again and again.
type load struct {
	*fleet
	counts   map[string]*counts // by program
	newest   atomic.Uint64      // epoch of a ticket that a client got
	failures harness.Failures
	running  sync.WaitGroup
	stopping chan struct{}
}

func (l *load) stopped() bool {
	select {
	case <-l.stopping:
		return true
	default:
		return false
	}
}

// start starts all clients.
func (l *load) start(ctx context.Context, openssl, curlPath string) {
	roots := l.WriteFile("roots.pem", string(l.Authority.PEM()))
	l.stopping = make(chan struct{})
	l.counts = map[string]*counts{"go": {}, "openssl": {}, "curl": {}}
	slots, seats := make(chan struct{}, together), make(chan struct{}, processes)
	// loop visits until the load is stopped.
	loop := func(slots chan struct{}, visit func() error) {
		l.running.Go(func() {
			for !l.stopped() {
				slots <- struct{}{}
				err := visit()
				<-slots
				l.failures.Add(err)
				if err != nil {
					return
				}
			}
		})
	}
	for i := range goClients {
		c := newClient(l.Site, []uint16{tls.VersionTLS12, tls.VersionTLS13}[i%2], l.counts["go"])
		c.onTicket = l.saw
		loop(slots, func() error {
			_, err := c.persist(ctx, l.front)
			return err
		})
	}
	for i := range sClients {
		c := &sClient{path: openssl, version: []string{"-tls1_2", "-tls1_3"}[i%2], roots: roots, dir: l.t.TempDir(), counts: l.counts["openssl"]}
		loop(seats, func() error { return c.visit(ctx, l.front) })
	}
	for range curlClients {
		c := &curl{path: curlPath, roots: roots, counts: l.counts["curl"]}
		loop(make(chan struct{}, 1), func() error { return c.visits(ctx, l.front) })
	}
}

// saw notes the epoch of a ticket.
func (l *load) saw(epoch uint64) {
	for newest := l.newest.Load(); epoch > newest && !l.newest.CompareAndSwap(newest, epoch); newest = l.newest.Load() {
	}
}

// total adds up what all clients saw.
func (l *load) total() *counts {
	sum := &counts{}
	for _, c := range l.counts {
		sum.first.Add(c.first.Load())
		sum.resumed.Add(c.resumed.Load())
		sum.missed.Add(c.missed.Load())
		sum.broken.Add(c.broken.Load())
	}
	return sum
}

// reach waits until the clients completed n handshakes.
func (l *load) reach(n int64) {
	l.t.Helper()
	last, progress := int64(-1), time.Now()
	for l.total().completed() < n {
		if now := l.total().completed(); now > last {
			last, progress = now, time.Now()
		}
		if time.Since(progress) > patience {
			l.t.Fatalf("the clients make no handshakes any more: %v", l.total())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// ledger is what the edges counted.
type ledger struct {
	full, resumed, failed int64
	misses                map[string]int64
	// unseen bounds the connections whose counters died with a process.
	unseen int64
}

func (b *ledger) add(s harness.Stats) {
	b.full += s.Handshakes.Full
	b.resumed += s.Resumed()
	b.failed += s.Handshakes.Failed
	for reason, n := range s.Misses {
		b.misses[reason] += n
	}
}

// rotations is TestRotations under way.
type rotations struct {
	*load
	book    ledger
	checked int // rotations of which it is known that no ticket came too early
}

// TestRotations: clients with tickets come back to random edges, through
// rotations of the keys, restarts of edges and the death of the replica that
// rotates. Each handshake that offers a ticket is resumed.
func TestRotations(t *testing.T) {
	needNetworks(t)
	openssl, curlPath := harness.Need(t, "openssl"), harness.Need(t, "curl")
	size, rounds := int64(5000), 4
	if harness.Long() {
		size, rounds = 51_000, 20
	}
	f := &fleet{t: t, Site: harness.NewSite(harness.NewShipped(t))}
	etcd := f.StartEtcd(1)
	first := f.StartControlPlane(etcd.Flags()...)
	second := f.StartControlPlane(append(etcd.Flags(), "--kek-file", first.DataDir+"/kek")...)
	f.replicas = []*harness.ControlPlane{first, second}
	f.start(8)
	f.apply(f.manifest(""))
	f.covered(1)

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	r := &rotations{load: &load{fleet: f}, book: ledger{misses: map[string]int64{}}}
	begin := time.Now()
	r.load.start(ctx, openssl, curlPath)
	defer func() {
		cancel()
		r.running.Wait()
	}()
	for round := range rounds {
		r.reach(size * int64(round+1) / int64(rounds+1))
		victim := f.edges[round%len(f.edges)]
		if round%2 == 0 {
			r.whileAway(victim, round == 2)
		} else {
			r.whileRotating(victim)
		}
	}
	r.reach(size)
	close(r.stopping)
	r.running.Wait()
	t.Logf("%d rotations in %v", rounds, time.Since(begin).Round(time.Second))
	r.settleUp(rounds)
}

// whileAway rotates while an edge is down: nobody may encrypt with the epoch
// before the edge holds it.
func (r *rotations) whileAway(victim *node, killLeader bool) {
	r.t.Helper()
	r.remember(victim)
	if err := victim.Stop(); err != nil {
		r.t.Error(err)
	}
	r.forget(victim)
	epoch := r.rotate()
	r.awaitKeyring("all edges but one hold the epoch", func(k harness.KeyringStatus) bool {
		return k.Epoch(epoch).State != "prepared" || slices.Equal(k.Laggards, []string{victim.ID})
	})
	// A second wish while the first is under way changes nothing.
	again := r.TryCtlAt(r.alive()[0], "keyring", "rotate", "default")
	r.reach(r.total().completed() + 200)
	seen, status := r.newest.Load(), r.keyring()
	live := slices.ContainsFunc(status.Edges, func(e harness.EdgeCoverage) bool { return e.Edge == victim.ID })
	switch {
	case status.Epoch(epoch).State == "prepared":
		r.checked++
		if seen >= epoch {
			r.t.Errorf("a client has a ticket of epoch %d, which %v does not hold", seen, status.Laggards)
		}
		if again.Code != 1 || !strings.Contains(again.Stderr, "is under way") {
			r.t.Errorf("keyring rotate during a rotation: %+v", again)
		}
	case live: // otherwise it is away for 30 s, and no longer counts
		r.t.Errorf("epoch %d is active before %s, which counts as live, holds it: %+v", epoch, victim.ID, status)
	}
	var leader *harness.ControlPlane
	if killLeader {
		i := slices.IndexFunc(r.replicas, func(c *harness.ControlPlane) bool { return c.Address == status.Leader })
		if i < 0 {
			r.t.Fatalf("the leader is %q", status.Leader)
		}
		leader = r.replicas[i]
		leader.Kill()
	}
	victim.Start()
	r.covered(epoch)
	if leader != nil {
		leader.Start()
	}
}

// whileRotating kills an edge that has just heard of an epoch, or is about to.
func (r *rotations) whileRotating(victim *node) {
	r.t.Helper()
	r.remember(victim)
	epoch := r.rotate()
	victim.Kill()
	r.forget(victim)
	victim.Start()
	r.covered(epoch)
}

// remember takes the counters of an edge that is about to go.
func (r *rotations) remember(n *node) {
	r.t.Helper()
	before := n.ended.Load()
	r.book.add(r.stats(n))
	// What was passed on and had not ended may or may not be in there.
	r.book.unseen -= before
}

// forget is called when it has gone.
func (r *rotations) forget(n *node) {
	r.book.unseen += n.passed.Load()
}

// settleUp compares what clients and edges counted.
func (r *rotations) settleUp(rounds int) {
	r.t.Helper()
	for _, n := range r.edges {
		r.book.add(r.stats(n))
	}
	total := r.total()
	for _, program := range []string{"go", "openssl", "curl"} {
		r.t.Logf("%s: %v", program, r.counts[program])
	}
	r.t.Logf("edges: %d full, %d resumed, %d failed, misses %v; at most %d connections of processes that ended are not in there",
		r.book.full, r.book.resumed, r.book.failed, r.book.misses, r.book.unseen)
	r.failures.Check(r.t, total.completed())
	if missed := total.missed.Load(); missed > 0 {
		r.t.Errorf("%d of %d tickets were declined", missed, missed+total.resumed.Load())
	}
	for program, c := range r.counts {
		if c.resumed.Load() < c.completed()/2 {
			r.t.Errorf("%s: resumed less than half: %v", program, c)
		}
	}
	if got := r.counts["go"].first.Load(); got != goClients {
		r.t.Errorf("Go clients came %d times without a ticket, want %d", got, goClients)
	}
	for reason, n := range r.book.misses {
		if reason != "not_offered" && n > 0 {
			r.t.Errorf("the edges count %d misses for the reason %s", n, reason)
		}
	}
	if r.book.misses["not_offered"] != r.book.full {
		r.t.Errorf("misses %v don't add up to %d full handshakes", r.book.misses, r.book.full)
	}
	// A connection that broke may have been completed on one side alone.
	for what, pair := range map[string][2]int64{
		"without a ticket": {r.book.full, total.first.Load()},
		"resumed":          {r.book.resumed, total.resumed.Load()},
	} {
		edges, clients := pair[0], pair[1]
		if edges > clients+total.broken.Load() || edges+r.book.unseen < clients {
			r.t.Errorf("%s: the edges count %d handshakes, the clients %d, of which at most %d are unseen", what, edges, clients, r.book.unseen)
		}
	}
	if active := r.keyring().Active(); active < uint64(rounds)+1 {
		r.t.Errorf("epoch %d is active after %d rotations", active, rounds)
	}
	if r.newest.Load() < uint64(rounds)+1 {
		r.t.Errorf("the newest ticket is of epoch %d after %d rotations", r.newest.Load(), rounds)
	}
	if r.checked == 0 {
		r.t.Error("no rotation was seen in its middle")
	}
	if r.t.Failed() {
		r.t.Logf("%+v", r.keyring())
	}
}
