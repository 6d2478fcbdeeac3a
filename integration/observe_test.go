package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// seen is what the tests read of a line of observe -o json.
type seen struct {
	Edge, Listener, Pool, Endpoint, Protocol, Method, Host, Path, Reason, Blame string

	Status            int
	Frontend, Backend *struct {
		Reused, Resumed bool
		Miss            string
	}
}

// observing is a resealctl observe -o json that runs.
type observing struct {
	*process.Process
	t *testing.T
}

// observe begins one and waits until it says that it sees so many edges.
func (r *replicated) observe(at *harness.ControlPlane, edges string, args ...string) *observing {
	r.t.Helper()
	o := &observing{r.StartCtlAt(at, append([]string{"observe", "-o", "json"}, args...)...), r.t}
	o.await("Observing " + edges + ".")
	return o
}

// await waits until it has printed a text.
func (o *observing) await(text string) {
	o.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(o.Output(), text); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			o.t.Fatalf("no %q in:\n%s", text, o.Output())
		}
	}
}

// seen waits for n requests. They are sorted by edge: those of different edges come in any
// order.
func (o *observing) seen(n int) []seen {
	o.t.Helper()
	var all []seen
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		all = nil
		for line := range strings.Lines(o.Output()) {
			var one seen
			if !strings.HasPrefix(line, "{") || !strings.HasSuffix(line, "}\n") {
				continue
			}
			if err := json.Unmarshal([]byte(line), &one); err != nil {
				o.t.Fatalf("%v in %s", err, line)
			}
			all = append(all, one)
		}
		if len(all) >= n {
			slices.SortStableFunc(all, func(a, b seen) int { return strings.Compare(a.Edge, b.Edge) })
			return all
		}
		if time.Now().After(deadline) {
			o.t.Fatalf("%d requests seen, want %d:\n%s", len(all), n, o.Output())
		}
	}
}

// curl makes a request and returns the status.
func curl(t *testing.T, ca, address, path string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	all := append([]string{
		"--silent", "--show-error", "--max-time", "50", "--cacert", ca, "--connect-to", "::" + address,
		"--output", "/dev/null", "--write-out", "%{http_code}", "https://" + harness.SiteName + path,
	}, args...)
	out, err := exec.CommandContext(ctx, harness.Need(t, "curl"), all...).Output()
	if err != nil {
		t.Fatalf("curl: %v", err)
	}
	return string(out)
}

// TestObserve: what becomes of requests is told live, at whichever replica one asks, of
// edges at all replicas: the answer, the reason of a failure, and why the backend had to
// make a full handshake, but nothing that may be secret. Edges stop when the observer is
// gone, however it went, or the replica is.
func TestObserve(t *testing.T) {
	r := newReplicated(t, 2)
	backend := r.Launch(t, peers.Go, peers.Options{CloseEach: true}) // so that each request needs a handshake
	ca := r.WriteFile("ca.pem", string(r.Authority.PEM()))
	manifest := harness.Certificate("site", r.Pair) + r.Pool("app", []*peers.Backend{backend}, "") + `---
apiVersion: reseal/v1
kind: BackendPool
metadata: {name: dead}
spec: {dns: {name: nowhere.invalid, port: 443}, tls: {serverName: dead.test, trust: {system: true}}}
`
	var edges []*harness.Edge
	var addresses []string
	for i, replica := range r.replicas {
		edges = append(edges, r.StartEdge(fmt.Sprint("e", i+1), fmt.Sprintf("n=%d", i+1), "--control-plane", replica.Address))
		addresses = append(addresses, r.Address())
		manifest += harness.Listener(fmt.Sprint("web", i+1), addresses[i], fmt.Sprintf("n: \"%d\"", i+1), "  pool: app\n")
	}
	manifest += `---
apiVersion: reseal/v1
kind: Route
metadata: {name: to-dead}
spec: {listeners: [web1, web2], hosts: ["` + harness.SiteName + `"], paths: [{prefix: /dead}], pools: [{name: dead}]}
`
	r.Apply(manifest)
	r.settled(r.replicas, "e1 synced", "e2 synced")

	every := r.observe(r.replicas[0], "2 edges")
	full := r.observe(r.replicas[1], "2 edges", "--pool", "app", "--full")
	resumed := r.observe(r.replicas[0], "1 edge", "--edge", "e2", "--resumed")
	failed := r.observe(r.replicas[1], "2 edges", "--status", "5xx", "--path", "/dead")
	for _, address := range addresses {
		for range 2 {
			if got := curl(t, ca, address, peers.Small+"?token=hush", "-H", "Cookie: hush", "-H", "Authorization: hush"); got != "200" {
				t.Errorf("curl got %s", got)
			}
		}
	}
	if got := curl(t, ca, addresses[0], "/dead?token=hush"); got != "503" {
		t.Errorf("curl got %s of a pool without endpoints", got)
	}

	all := slices.DeleteFunc(every.seen(5), func(one seen) bool { return one.Path == "/dead" })
	if len(all) != 4 {
		t.Errorf("%d requests were served: %+v", len(all), all)
	}
	for _, one := range all {
		if one.Pool != "app" || one.Status != 200 || one.Method != "GET" || one.Host != harness.SiteName || one.Path != peers.Small ||
			one.Endpoint != backend.Address || one.Protocol != "HTTP/2.0" || one.Frontend == nil || one.Frontend.Miss != "not_offered" || one.Backend == nil {
			t.Errorf("seen: %+v", one)
		}
	}
	first := full.seen(2)
	for i, one := range first {
		if one.Backend.Resumed || one.Backend.Miss != "no_session" {
			t.Errorf("a full handshake %d: %+v", i, *one.Backend)
		}
	}
	if first[0].Edge != "e1" || first[1].Edge != "e2" || first[0].Listener != "web1" {
		t.Errorf("full handshakes: %+v", first)
	}
	if got := resumed.seen(1); len(got) != 1 || got[0].Edge != "e2" || !got[0].Backend.Resumed || got[0].Backend.Miss != "" {
		t.Errorf("resumed handshakes: %+v", got)
	}
	failures := failed.seen(1)
	if last := failures[0]; len(failures) != 1 || last.Status != 503 || last.Reason != "no_endpoint" || last.Pool != "dead" || last.Path != "/dead" || last.Edge != "e1" || last.Backend != nil {
		t.Errorf("failures: %+v", failures)
	}

	// Ctrl-C ends it well, and says how much was seen.
	if err := full.Stop(); err != nil {
		t.Errorf("after a signal: %v", err)
	}
	full.await("2 requests matched, 2 shown.")
	// Whoever is gone without a word is noticed.
	resumed.Kill()
	failed.Kill()
	r.watchers(1, edges...)
	// A replica that is gone is named, and its edge stops, until it is at another.
	r.replicas[1].Kill()
	every.await("did not answer, and its edges are missing")
	r.watchers(0, edges[1])
	r.watchers(1, edges[0])
	every.Kill()
	r.watchers(0, edges[0])
	for _, o := range []*observing{every, full, resumed, failed} {
		if strings.Contains(o.Output(), "hush") || strings.Contains(o.Output(), "token") {
			t.Errorf("secrets are told:\n%s", o.Output())
		}
	}
	if got := every.Output(); strings.Contains(got, "Error") {
		t.Error(got)
	}
}

// watchers waits until each of some edges is observed by so many.
func (r *replicated) watchers(n float64, edges ...*harness.Edge) {
	r.t.Helper()
	harness.Settle(r.t, func() error {
		for _, edge := range edges {
			if got := edge.Metrics().Sum("reseal_observations"); got != n {
				return fmt.Errorf("%g observe edge %s, want %g", got, edge.ID, n)
			}
		}
		return nil
	})
}
