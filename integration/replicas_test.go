package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// replicated is a world whose control plane has several replicas.
type replicated struct {
	*cluster
	replicas []*harness.ControlPlane
}

// newReplicated starts replicas over one etcd, with more flags.
func newReplicated(t *testing.T, n int, more ...string) *replicated {
	t.Helper()
	w := newWorld(t)
	r := &replicated{cluster: &cluster{world: w, Etcd: w.StartEtcd(1)}}
	for range n {
		flags := append(r.Flags(), more...)
		if len(r.replicas) > 0 {
			flags = append(flags, "--kek-file", filepath.Join(r.replicas[0].DataDir, "kek"))
		}
		r.replicas = append(r.replicas, r.StartControlPlane(flags...))
	}
	harness.Settle(t, func() error {
		for _, replica := range r.replicas {
			if status := r.status(replica); len(status.Replicas) != n || len(status.Problems) > 0 {
				return fmt.Errorf("replica %s knows %+v", replica.Address, status)
			}
		}
		return nil
	})
	return r
}

// fleetStatus is what the tests read of resealctl status.
type fleetStatus struct {
	Edges    map[string]int
	Draining []string
	Problems []string
	Replicas []struct {
		ID, State, Address string
		Edges              int
	}
}

func (r *replicated) status(at *harness.ControlPlane) fleetStatus {
	r.t.Helper()
	var status fleetStatus
	r.jsonAt(at, &status, "status")
	return status
}

// jsonAt runs a command through one replica.
func (r *replicated) jsonAt(at *harness.ControlPlane, into any, args ...string) harness.Result {
	r.t.Helper()
	result := r.TryCtlAt(at, append(args, "-o", "json")...)
	if result.Code != 0 {
		r.t.Fatalf("resealctl %s at %s ended with %d: %s", strings.Join(args, " "), at.Address, result.Code, result.Stderr)
	}
	if err := json.Unmarshal([]byte(result.Stdout), into); err != nil {
		r.t.Fatalf("resealctl %s: %v in:\n%s", strings.Join(args, " "), err, result.Stdout)
	}
	return result
}

type edgeList struct {
	Edges []struct {
		ID, State, Replica string
		Draining           bool
	}
	Unanswered []struct{ Replica, Address, Reason string }
}

// states lists the edges as a replica shows them: "id state".
func (r *replicated) states(at *harness.ControlPlane) []string {
	r.t.Helper()
	var list edgeList
	r.jsonAt(at, &list, "get", "edges")
	states := []string{}
	for _, e := range list.Edges {
		states = append(states, e.ID+" "+e.State)
	}
	return states
}

// settled waits until each of some replicas shows the edges so: an edge that enrols
// gives each address 10 s.
func (r *replicated) settled(replicas []*harness.ControlPlane, want ...string) {
	r.t.Helper()
	deadline := time.Now().Add(40 * time.Second)
	for _, replica := range replicas {
		for got := r.states(replica); !slices.Equal(got, want); got = r.states(replica) {
			if time.Now().After(deadline) {
				r.t.Fatalf("replica %s shows %q, want %q", replica.Address, got, want)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// requests is the total that a replica shows.
func (r *replicated) requests(at *harness.ControlPlane) (listeners uint64, edges int) {
	r.t.Helper()
	var stats struct {
		Listeners []struct{ Requests uint64 }
	}
	r.jsonAt(at, &stats, "stats", "listeners")
	var byEdge struct{ Edges []struct{ Name string } }
	r.jsonAt(at, &byEdge, "stats", "edges")
	for _, l := range stats.Listeners {
		listeners += l.Requests
	}
	return listeners, len(byEdge.Edges)
}

// TestWhicheverReplica: all that is said of the fleet is the same at each replica,
// orders reach edges that are connected to another one and stand over restarts, and
// a replica that does not answer is named.
func TestWhicheverReplica(t *testing.T) {
	r := newReplicated(t, 3)
	backend := r.Launch(t, peers.Go, peers.Options{})
	var edges []*harness.Edge
	var addresses []string
	manifest := harness.Certificate("site", r.Pair) + r.annotated(0, backend)
	for i, replica := range r.replicas {
		edges = append(edges, r.StartEdge(fmt.Sprint("e", i+1), fmt.Sprintf("n=%d", i+1), "--control-plane", replica.Address))
		addresses = append(addresses, r.Address())
		manifest += harness.Listener(fmt.Sprint("web", i+1), addresses[i], fmt.Sprintf("n: \"%d\"", i+1), "")
	}
	manifest = strings.Replace(manifest, "listeners: [web]", "listeners: [web1, web2, web3]", 1)
	r.Apply(manifest)
	r.settled(r.replicas, "e1 synced", "e2 synced", "e3 synced")
	for _, address := range addresses {
		if err := harness.Get(t.Context(), r.Client(t, address, false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
			t.Fatal(err)
		}
	}
	for _, replica := range r.replicas {
		if requests, count := r.requests(replica); requests != 3 || count != 3 {
			t.Errorf("replica %s counts %d requests of %d edges, want 3 of 3", replica.Address, requests, count)
		}
		for i := range edges {
			if result := r.TryCtlAt(replica, "probe", "--edge", fmt.Sprint("e", i+1), "--pool", "app", backend.Address, "--no-requests"); result.Code != 0 {
				t.Errorf("a probe from e%d by replica %s: %s", i+1, replica.Address, result.Stderr)
			}
		}
	}

	// An order through another replica, and its restart.
	if result := r.TryCtlAt(r.replicas[0], "drain", "e2", "--wait"); result.Code != 0 {
		t.Fatal(result.Stderr)
	}
	r.settled(r.replicas, "e1 synced", "e2 draining", "e3 synced")
	if err := r.replicas[1].Stop(); err != nil {
		t.Error(err)
	}
	r.replicas[1].Start()
	if err := edges[1].Stop(); err != nil {
		t.Error(err)
	}
	edges[1].Start()
	r.settled(r.replicas, "e1 synced", "e2 draining", "e3 synced")
	harness.Settle(t, func() error {
		response, err := http.Get("http://" + edges[1].Admin + "/readyz")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if body, _ := io.ReadAll(response.Body); response.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(body), "drain") {
			return fmt.Errorf("the edge that was restarted says %s: %s", response.Status, body)
		}
		return nil
	})

	// What is taken back while the edge can't hear it.
	if err := r.replicas[1].Stop(); err != nil {
		t.Error(err)
	}
	if result := r.TryCtlAt(r.replicas[2], "drain", "e2", "--undo"); result.Code != 0 || !strings.Contains(result.Stdout, "not connected") {
		t.Errorf("undo while the edge is away: %+v", result)
	}
	r.replicas[1].Start()
	r.settled(r.replicas, "e1 synced", "e2 synced", "e3 synced")
	edges[1].WaitReady()
	if result := r.TryCtlAt(r.replicas[0], "drain", "nobody"); result.Code != 1 || !strings.Contains(result.Stderr, "not found") {
		t.Errorf("an edge that does not exist: %+v", result)
	}

	// A replica that does not answer is named, soon.
	r.replicas[2].Kill()
	var list edgeList
	begun := time.Now()
	result := r.jsonAt(r.replicas[0], &list, "get", "edges")
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("the list took %s", took)
	}
	if len(list.Edges) != 2 || len(list.Unanswered) != 1 || list.Unanswered[0].Address != r.replicas[2].Address || !strings.Contains(result.Stderr, "did not answer") {
		t.Errorf("with a dead replica: %+v; %s", list, result.Stderr)
	}
	if status := r.status(r.replicas[1]); len(status.Problems) != 1 || !strings.Contains(status.Problems[0], "replica ") {
		t.Errorf("status with a dead replica: %+v", status)
	}
	if result := r.TryCtlAt(r.replicas[1], "probe", "--edge", "e3", "--pool", "app", backend.Address); result.Code != 1 || !strings.Contains(result.Stderr, "no replica that answers") {
		t.Errorf("a probe by an edge of a dead replica: %+v", result)
	}
	r.replicas[2].Start()
	r.settled(r.replicas, "e1 synced", "e2 synced", "e3 synced")
}

// TestSharedAcrossReplicas: edges of different replicas hand each other their
// sessions: the backend pays for one key exchange.
func TestSharedAcrossReplicas(t *testing.T) {
	r := newReplicated(t, 2)
	backend := r.Launch(t, peers.Go, peers.Options{})
	pool := strings.Replace(r.annotated(0, backend), "  timeouts:", "  sessions: {sharing: fleet}\n  timeouts:", 1)
	manifest := harness.Certificate("site", r.Pair) + strings.Replace(pool, "listeners: [web]", "listeners: [web1, web2]", 1)
	addresses := []string{r.Address(), r.Address()}
	for i, address := range addresses {
		manifest += harness.Listener(fmt.Sprint("web", i+1), address, fmt.Sprintf("n: \"%d\"", i+1), "")
	}
	r.Apply(manifest)
	for i, replica := range r.replicas {
		r.StartEdge(fmt.Sprint("e", i+1), fmt.Sprintf("n=%d", i+1), "--control-plane", replica.Address).WaitReady()
		if err := harness.Get(t.Context(), r.Client(t, addresses[i], false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
			t.Fatal(err)
		}
	}
	var stats struct {
		Pools []struct {
			Requests   uint64
			Handshakes struct {
				Full    uint64
				Resumed struct{ Ticket, PSK uint64 }
			}
		}
	}
	r.jsonAt(r.replicas[1], &stats, "stats", "pools")
	if len(stats.Pools) != 1 || stats.Pools[0].Requests != 2 || stats.Pools[0].Handshakes.Full != 1 || stats.Pools[0].Handshakes.Resumed.PSK == 0 {
		t.Errorf("two edges cost the backend %+v, want one full handshake", stats.Pools)
	}
}

// counts are the edges of each replica, as the last one sees them.
func (r *replicated) counts(at *harness.ControlPlane) map[string]int {
	r.t.Helper()
	found := make(map[string]int)
	for _, replica := range r.status(at).Replicas {
		found[replica.Address] = replica.Edges
	}
	return found
}

// TestSpread: edges and operators that know several addresses do without a replica
// that is dead, or does not answer, even when it is the first; a replica that stops
// hands its edges over, and one that comes back is given some.
func TestSpread(t *testing.T) {
	r := newReplicated(t, 2)
	refusing := r.Address()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // and nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	first, second := r.replicas[0], r.replicas[1]
	all := strings.Join([]string{refusing, silent.Addr().String(), first.Address, second.Address}, ",")
	for i := range 4 {
		r.StartEdge(fmt.Sprint("e", i+1), "", "--control-plane", all)
	}
	anywhere := &harness.ControlPlane{Address: all}
	r.settled([]*harness.ControlPlane{anywhere}, "e1 synced", "e2 synced", "e3 synced", "e4 synced")

	begun := time.Now()
	if err := first.Stop(); err != nil {
		t.Error(err)
	}
	r.settled([]*harness.ControlPlane{anywhere, second}, "e1 synced", "e2 synced", "e3 synced", "e4 synced")
	if got := r.counts(anywhere); len(got) != 1 || got[second.Address] != 4 {
		t.Errorf("after a replica's stop: %v", got)
	}
	t.Logf("all edges are at the other replica %s after a stop", time.Since(begun).Round(time.Millisecond))
	first.Start()
	begun = time.Now()
	for got := r.counts(first); got[first.Address] != 2 || got[second.Address] != 2; got = r.counts(first) {
		if time.Since(begun) > time.Minute {
			t.Fatalf("edges are spread as %v", got)
		}
		time.Sleep(time.Second)
	}
	t.Logf("edges are spread %s after a start", time.Since(begun).Round(time.Millisecond))

	// One that is killed.
	second.Kill()
	begun = time.Now()
	r.settled([]*harness.ControlPlane{anywhere}, "e1 synced", "e2 synced", "e3 synced", "e4 synced")
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("edges of a replica that was killed are back after %s", took)
	}
}
