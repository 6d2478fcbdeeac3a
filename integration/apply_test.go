package integration

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// pair is a world with two edges, each with a listener of its own, and a pool
// "app" of two Go backends.
type pair struct {
	*world
	edges     [2]*harness.Edge
	addresses [2]string
	backends  []*peers.Backend
}

// listeners are the manifests of the two listeners.
func (p *pair) listeners() string {
	return harness.Listener("web-a", p.addresses[0], "edge: a", "  pool: app\n") + harness.Listener("web-b", p.addresses[1], "edge: b", "  pool: app\n")
}

func newPair(t *testing.T, controlPlane ...string) *pair {
	t.Helper()
	return newPairOf(newWorld(t), controlPlane...)
}

func newPairOf(w *world, controlPlane ...string) *pair {
	t := w.t
	t.Helper()
	p := &pair{world: w}
	for range 2 {
		p.backends = append(p.backends, p.Launch(t, peers.Go, peers.Options{}))
	}
	p.StartControlPlane(controlPlane...)
	p.startEdges()
	return p
}

// startEdges starts the edges and gives them their first configuration.
func (p *pair) startEdges() {
	p.t.Helper()
	for i, name := range []string{"a", "b"} {
		p.edges[i] = p.StartEdge("edge-"+name, "edge="+name)
		p.addresses[i] = p.Address()
	}
	p.WaitAcked(p.Apply(harness.Certificate("site", p.Pair)+p.Pool("app", p.backends, "")+p.listeners()), p.edges[:]...)
}

// serve checks that an edge answers.
func (p *pair) serve(i int) {
	p.t.Helper()
	if err := harness.Get(p.t.Context(), p.Client(p.t, p.addresses[i], false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
		p.t.Errorf("edge %s: %v", p.edges[i].ID, err)
	}
}

func TestApply(t *testing.T) {
	p := newPair(t)
	t.Run("reaches both edges", p.reach)
	t.Run("bad manifest", p.badManifest)
	t.Run("refused by the edge", p.refused)
}

func (p *pair) reach(t *testing.T) {
	for i := range 5 {
		start := time.Now()
		revision := p.Apply(p.Pool("app", p.backends, fmt.Sprintf("  timeouts: {responseHeader: %ds}\n", 10+i)))
		applied := time.Now()
		p.WaitAcked(revision, p.edges[:]...)
		took := time.Since(start)
		t.Logf("apply took %v, acked by both edges %v after its start", applied.Sub(start).Round(time.Millisecond), took.Round(time.Millisecond))
		if took > 5*time.Second {
			t.Errorf("acked after %v; something waits for a time-out", took)
		}
	}
	p.serve(0)
	p.serve(1)
	for _, edge := range p.Edges() {
		if edge.Drifted || edge.RunningHash == "" || edge.RunningHash != edge.IntendedHash {
			t.Errorf("edge %s runs %q and should run %q", edge.ID, edge.RunningHash, edge.IntendedHash)
		}
	}
}

// badManifest applies manifests with mistakes. Nothing may change, and the
// error names file, line and field of each.
func (p *pair) badManifest(t *testing.T) {
	before := p.Ctl("get", "backendpools,routes,listeners,certificates,tlspolicies", "-o", "yaml")
	tests := []struct {
		name, text string
		want       []string // after the file's name
	}{
		{
			"two mistakes beside a good resource",
			strings.TrimPrefix(p.Pool("good", p.backends, ""), "---\n") + `---
apiVersion: reseal/v1
kind: BackendPool
metadata: {name: bad}
spec:
  endpoints:
    - address: 10.0.0.1
  timeouts:
    connect: soon
`,
			[]string{"BackendPool/bad: spec.endpoints[0].address:", "BackendPool/bad: spec.timeouts.connect:"},
		},
		{
			"unknown field",
			`apiVersion: reseal/v1
kind: Route
metadata: {name: bad}
spec:
  listener: [web-a]
  pools: [{name: app}]
`,
			[]string{":5:3: Route/bad: spec.listener:"},
		},
		{
			"dangling reference",
			strings.TrimPrefix(harness.Route("bad", "web-a", "x."+harness.SiteName, "nowhere", ""), "---\n"),
			[]string{"Route/bad: spec.pools[0].name:"},
		},
		{
			"no YAML",
			"apiVersion: reseal/v1\nkind: [\n",
			[]string{":"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := p.Manifest(test.text)
			result := p.TryCtl("apply", "-f", path)
			if result.Code != 1 {
				t.Errorf("exit code %d, want 1", result.Code)
			}
			for _, want := range test.want {
				found := false
				for line := range strings.Lines(result.Stderr) {
					_, rest, ok := strings.Cut(line, path)
					found = found || ok && strings.HasPrefix(rest, ":") && strings.Contains(rest, want)
				}
				if !found {
					t.Errorf("no line with %s and %q in:\n%s", path, want, result.Stderr)
				}
			}
			if after := p.Ctl("get", "backendpools,routes,listeners,certificates,tlspolicies", "-o", "yaml"); after != before {
				t.Errorf("the configuration changed:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
	for _, edge := range p.Edges() {
		if edge.State != "synced" || edge.Nack != nil {
			t.Errorf("edge %s is %s after manifests that were refused (nack %+v)", edge.ID, edge.State, edge.Nack)
		}
	}
	p.serve(0)
	p.serve(1)
}

// refused applies a listener on a port that is in use on one edge's machine.
func (p *pair) refused(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	good := p.Edges()[0].AckedRevision
	other := p.Address()
	revision := p.Apply(harness.Listener("taken", taken.Addr().String(), "edge: a", "  pool: app\n") + harness.Listener("other", other, "edge: a", "  pool: app\n"))
	_, edges := p.WaitEdges("partly", func(e harness.EdgeStatus) bool { return e.State == "partly" }, "edge-a")
	switch nack := edges[0].Nack; {
	case nack == nil || len(nack.Violations) == 0:
		t.Errorf("no violations: %+v", edges[0])
	case nack.Revision != revision || nack.ServingRevision != good:
		t.Errorf("refused %d and serves %d, want %d and %d", nack.Revision, nack.ServingRevision, revision, good)
	case !nack.Partly || !slices.Equal(nack.HeldBack, []string{"Listener/taken"}):
		t.Errorf("held back: %+v", nack)
	case nack.Violations[0].Resource != "Listener/taken" || nack.Violations[0].Field != "spec.address" || !strings.Contains(nack.Violations[0].Description, "in use"):
		t.Errorf("violations: %+v", nack.Violations)
	}
	p.WaitEdges("synced", func(e harness.EdgeStatus) bool { return e.State == "synced" && e.AckedRevision >= revision }, "edge-b")
	table := p.Ctl("get", "edges")
	if !strings.Contains(table, "PARTLY") || !strings.Contains(table, "Listener/taken") {
		t.Errorf("get edges does not show the refusal:\n%s", table)
	}
	description := p.Ctl("describe", "edge", "edge-a")
	for _, want := range []string{"PARTLY", "Listener/taken", "spec.address", "in use", "the rest of it is in force"} {
		if !strings.Contains(description, want) {
			t.Errorf("describe edge does not show %q:\n%s", want, description)
		}
	}
	p.serve(0)
	p.serve(1)
	// What was applied with it, and what is applied later, is in force.
	get := func(address string) {
		t.Helper()
		if err := harness.Get(t.Context(), p.Client(t, address, false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
			t.Errorf("beside a listener that is refused: %v", err)
		}
	}
	get(other)
	later := p.Address()
	revision = p.Apply(harness.Listener("later", later, "edge: a", "  pool: app\n"))
	p.WaitEdges("partly", func(e harness.EdgeStatus) bool {
		return e.State == "partly" && e.Nack.Revision == revision && slices.Equal(e.Nack.HeldBack, []string{"Listener/taken"})
	}, "edge-a")
	get(later)
	p.Ctl("delete", "listener", "other")
	p.Ctl("delete", "listener", "later")

	// The same file with a free port is the way out.
	address := p.Address()
	p.WaitAcked(p.Apply(harness.Listener("taken", address, "edge: a", "  pool: app\n")), p.edges[:]...)
	if err := harness.Get(t.Context(), p.Client(t, address, false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
		t.Errorf("the listener that was refused at first: %v", err)
	}
	p.Ctl("delete", "listener", "taken")
}

// TestApplyUnderLoad runs requests through two edges while the configuration
// changes 200 times. None of them may fail.
func TestApplyUnderLoad(t *testing.T) {
	p := newPair(t)
	const applies = 200
	requests := 10_000
	if harness.Long() {
		requests = 100_000
	}
	p.WaitAcked(p.Apply(harness.Route("app", "web-a, web-b", harness.SiteName, "app", "")), p.edges[:]...)

	// Clients stop when both the requests and the applies are done.
	applied := make(chan struct{})
	go func() {
		defer close(applied)
		p.applyOften(applies)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	sender := newSender(t, p)
	start := time.Now()
	var failed harness.Failures
	var sent, workers = make(chan struct{}, requests), sync.WaitGroup{}
	for range requests {
		sent <- struct{}{}
	}
	var total int64
	var mu sync.Mutex
	for worker := range 16 {
		workers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				select {
				case <-sent:
				default:
					select {
					case <-applied:
						return
					default:
					}
				}
				failed.Add(sender.send(ctx, worker, i))
				mu.Lock()
				total++
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	<-applied
	if ctx.Err() != nil {
		t.Errorf("not done in time: %v", ctx.Err())
	}
	failed.Check(t, total)
	t.Logf("%d requests with %d applies in %v", total, applies, time.Since(start).Round(time.Millisecond))

	// The last configuration must have arrived, and no edge refused one.
	edges := p.Edges()
	p.WaitAcked(edges[0].TargetRevision, p.edges[:]...)
	if nacks := p.Control.Metrics().Sum("reseal_feed_nacks_total"); nacks != 0 {
		t.Errorf("edges refused %v updates", nacks)
	}
	stats := p.PoolStats("app")
	if stats.Errors != 0 {
		t.Errorf("the edges count errors: %v", stats.ErrorsByReason)
	}
	if stats.Missed() != stats.Handshakes.Full {
		t.Errorf("misses %v don't add up to %d full handshakes", stats.Misses, stats.Handshakes.Full)
	}
}

// applyOften changes pools, routes, certificates and listeners in turn.
func (p *pair) applyOften(applies int) {
	other, err := peers.NewAuthority("another root")
	if err != nil {
		p.t.Error(err)
		return
	}
	both := append(append([]byte{}, p.Authority.PEM()...), other.PEM()...)
	extra := p.Address()
	for i := range applies {
		var manifest string
		switch i % 8 {
		case 0: // how requests are sent
			manifest = p.Pool("app", p.backends, fmt.Sprintf("  timeouts: {responseHeader: %ds}\n", 10+i))
		case 1: // one endpoint goes
			manifest = p.Pool("app", p.backends[:1+i/8%2], "")
		case 2: // where requests go
			manifest = p.Pool("app-2", p.backends, "") + harness.Route("app", "web-a, web-b", harness.SiteName, "app-2", "")
		case 3: // headers
			manifest = harness.Route("app", "web-a, web-b", harness.SiteName, "app", fmt.Sprintf("  responseHeaders: {set: {X-Apply: \"%d\"}}\n", i))
		case 4: // a new certificate of the same name
			manifest = harness.Certificate("site", p.Issue())
		case 5: // another identity: pooled connections and sessions end
			manifest = strings.Replace(p.Pool("app", p.backends, ""), harness.Indent(p.Authority.PEM(), 8), harness.Indent(both, 8), 1)
		case 6: // another order, another algorithm
			manifest = p.Pool("app", []*peers.Backend{p.backends[1], p.backends[0]}, "  loadBalancing: {algorithm: round_robin}\n")
		case 7: // a listener comes, and goes below
			manifest = harness.Listener("extra", extra, "", "  pool: app\n")
			if i%16 == 15 {
				if result := p.TryCtl("delete", "listener", "extra"); result.Code != 0 {
					p.t.Errorf("delete %d: %s", i, result.Stderr)
				}
				continue
			}
			manifest = strings.Replace(manifest, "matchLabels: {}", "matchLabels: {edge: a}", 1)
		}
		path := p.Manifest(manifest)
		if result := p.TryCtl("apply", "-f", path); result.Code != 0 {
			p.t.Errorf("apply %d: %s", i, result.Stderr)
			return
		}
	}
}

// sender sends requests of several kinds over kept and over new connections.
type sender struct {
	pair    *pair
	clients [2][2]*http.Client // by edge and protocol
	single  [2]*http.Client    // a connection per request
}

func newSender(t *testing.T, p *pair) *sender {
	s := &sender{pair: p}
	for edge := range 2 {
		s.clients[edge] = [2]*http.Client{p.Client(t, p.addresses[edge], false), p.Client(t, p.addresses[edge], true)}
		s.single[edge] = p.Client(t, p.addresses[edge], false)
		s.single[edge].Transport.(*http.Transport).DisableKeepAlives = true
	}
	return s
}

func (s *sender) send(ctx context.Context, worker, i int) error {
	client := s.clients[worker%2][worker/2%2]
	base := "https://" + harness.SiteName
	switch {
	case i%50 == 49:
		return harness.Get(ctx, s.single[worker%2], base+peers.Small, peers.Body(peers.Small))
	case i%40 == 39:
		return harness.Get(ctx, client, base+peers.Slow, peers.Body(peers.Slow))
	case i%10 == 9:
		return harness.Exchange(ctx, client, http.MethodPost, base+peers.Echo, bytes.NewReader(peers.Body(peers.Small)), peers.Body(peers.Small))
	case i%10 == 5:
		return harness.Get(ctx, client, base+peers.Chunked, peers.Body(peers.Chunked))
	default:
		return harness.Get(ctx, client, base+peers.Small, peers.Body(peers.Small))
	}
}
