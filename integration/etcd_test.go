package integration

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// cluster is a world with an etcd cluster of three members.
type cluster struct {
	*world
	*harness.Etcd
}

func newCluster(w *world) *cluster {
	w.t.Helper()
	return &cluster{world: w, Etcd: w.StartEtcd(3)}
}

// annotated are two resources that are always applied together.
func (c *cluster) annotated(i int, backend *peers.Backend) string {
	annotation := fmt.Sprintf("annotations: {number: \"%d\"}", i)
	pool := strings.Replace(c.Pool("app", []*peers.Backend{backend}, fmt.Sprintf("  timeouts: {responseHeader: %ds}\n", 10+i)), "{name: app}", "{name: app, "+annotation+"}", 1)
	return pool + strings.Replace(harness.Route("app", "web", harness.SiteName, "app", ""), "{name: app}", "{name: app, "+annotation+"}", 1)
}

// numbers reads the annotation of both.
func (c *cluster) numbers() (pool, route string) {
	c.t.Helper()
	type resource struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	var list struct {
		Items []struct {
			Kind string `json:"kind"`
			resource
		} `json:"items"`
	}
	// One list is one revision.
	c.CtlJSON(&list, "get", "backendpools,routes")
	for _, item := range list.Items {
		switch item.Kind {
		case "BackendPool":
			pool = item.Metadata.Annotations["number"]
		case "Route":
			route = item.Metadata.Annotations["number"]
		}
	}
	return pool, route
}

// TestEtcdMemberKilled kills each member of a three-member cluster in turn, the
// leader among them, under applies of two resources at a time. What was applied
// stays, and no apply takes effect halfway.
func TestEtcdMemberKilled(t *testing.T) {
	c := newCluster(newWorld(t))
	backend := c.Launch(t, peers.Go, peers.Options{})
	c.StartControlPlane(c.Flags()...)
	edge := c.StartEdge("one", "")
	address := c.Address()
	c.WaitAcked(c.Apply(harness.Certificate("site", c.Pair)+harness.Listener("web", address, "", "")+c.annotated(0, backend)), edge)

	const applies = 50
	revisions := make(map[int64]int)
	var repeated int
	for i := 1; i <= applies; i++ {
		// Members are down during applies 5 to 14, 20 to 29 and 35 to 44.
		switch member := (i - 5) / 15; {
		case i >= 5 && (i-5)%15 == 0 && member < 3:
			c.Members[member].Kill()
		case i >= 15 && (i-5)%15 == 10 && member < 3:
			c.Start(member)
			c.Ready(member)
		}
		path := c.Manifest(c.annotated(i, backend))
		for try := 1; ; try++ {
			result := c.TryCtl("apply", "-f", path, "-m", fmt.Sprintf("number %d", i), "-o", "json")
			pool, route := c.numbers()
			if pool != route {
				t.Fatalf("apply %d: half applied: the pool is at %s, the route at %s", i, pool, route)
			}
			if result.Code == 0 {
				if pool != fmt.Sprint(i) {
					t.Fatalf("apply %d succeeded, but the resources are at %s", i, pool)
				}
				var answer struct{ Revision int64 }
				if err := json.Unmarshal([]byte(result.Stdout), &answer); err != nil {
					t.Fatal(err)
				}
				revisions[answer.Revision] = i
				break
			}
			if try == 5 {
				t.Fatalf("apply %d fails with a majority of the cluster alive: %s", i, result.Stderr)
			}
			repeated++
			t.Logf("apply %d, try %d: %s", i, try, strings.TrimSpace(result.Stderr))
		}
	}
	t.Logf("%d applies, %d had to be repeated", applies, repeated)
	c.checkHistory(t, revisions, applies)
	c.WaitAcked(c.Edges()[0].TargetRevision, edge)
	if err := harness.Get(t.Context(), c.Client(t, address, false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
		t.Error(err)
	}
}

// checkHistory finds each successful apply in the history, once and whole.
func (c *cluster) checkHistory(t *testing.T, revisions map[int64]int, applies int) {
	t.Helper()
	var history struct {
		Revisions []struct {
			Revision int64  `json:"revision"`
			Message  string `json:"message"`
			Changes  []struct {
				Kind string `json:"kind"`
			} `json:"changes"`
		} `json:"revisions"`
	}
	c.CtlJSON(&history, "history", "-n", "0")
	seen := make(map[string]int)
	for _, revision := range history.Revisions {
		seen[revision.Message]++
		if number, ours := revisions[revision.Revision]; ours && revision.Message != fmt.Sprintf("number %d", number) {
			t.Errorf("revision %d is %q, want apply %d", revision.Revision, revision.Message, number)
		}
		var kinds []string
		for _, change := range revision.Changes {
			kinds = append(kinds, change.Kind)
		}
		slices.Sort(kinds)
		if strings.HasPrefix(revision.Message, "number ") && !slices.Equal(kinds, []string{"BackendPool", "Route"}) {
			t.Errorf("revision %d changed %v, want a pool and a route", revision.Revision, kinds)
		}
	}
	for i := 1; i <= applies; i++ {
		if seen[fmt.Sprintf("number %d", i)] != 1 {
			t.Errorf("apply %d is %d times in the history, want once", i, seen[fmt.Sprintf("number %d", i)])
		}
	}
}

// TestReplicas runs two control planes on one cluster: what is applied at one
// is served by the other, and an edge moves when its own is killed.
func TestReplicas(t *testing.T) {
	c := newCluster(newWorld(t))
	backend := c.Launch(t, peers.Go, peers.Options{})
	first := c.StartControlPlane(c.Flags()...)
	kek := filepath.Join(first.DataDir, "kek")
	second := c.StartControlPlane(append(c.Flags(), "--kek-file", kek)...)
	edge := c.StartEdge("one", "", "--control-plane", first.Address+","+second.Address)
	address := c.Address()
	// A replica lists the edges that are connected to it, and this one chooses.
	serves := func(revision int64) {
		t.Helper()
		harness.Settle(t, func() error {
			if got := int64(edge.Metrics().Sum("reseal_config_revision")); got != revision {
				return fmt.Errorf("the edge serves revision %d, want %d", got, revision)
			}
			return nil
		})
	}
	serves(c.Apply(harness.Certificate("site", c.Pair) + harness.Listener("web", address, "", "") + c.annotated(0, backend)))

	// The administrator's context names the first; both know the same.
	for _, replica := range []*harness.ControlPlane{first, second} {
		result := c.TryCtlAt(replica, "get", "routes", "-o", "name")
		if result.Code != 0 || strings.TrimSpace(result.Stdout) == "" {
			t.Errorf("replica %s: %+v", replica.Address, result)
		}
	}
	first.Kill()
	path := c.Manifest(c.annotated(1, backend))
	result := c.TryCtlAt(second, "apply", "-f", path, "-o", "json")
	if result.Code != 0 {
		t.Fatalf("apply at the second replica: %s", result.Stderr)
	}
	var answer struct{ Revision int64 }
	if err := json.Unmarshal([]byte(result.Stdout), &answer); err != nil {
		t.Fatal(err)
	}
	serves(answer.Revision)
	if err := harness.Get(t.Context(), c.Client(t, address, false), "https://"+harness.SiteName+peers.Small, peers.Body(peers.Small)); err != nil {
		t.Error(err)
	}
}
