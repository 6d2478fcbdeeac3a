package integration

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// cluster is an etcd cluster of three members, with mutual TLS for clients and
// between members.
type cluster struct {
	*world
	members                       [3]*process.Process
	clients, peers                [3]string // addresses
	certFile, keyFile, ca, joined string
	page                          *http.Client
}

func newCluster(w *world) *cluster {
	w.t.Helper()
	c := &cluster{world: w}
	pair, err := w.authority.Issue("localhost", "127.0.0.1")
	if err != nil {
		w.t.Fatal(err)
	}
	if c.certFile, c.keyFile, _, err = pair.Write(w.Dir, "etcd"); err != nil {
		w.t.Fatal(err)
	}
	c.ca = w.WriteFile("etcd-ca.pem", string(w.authority.PEM()))
	var joined []string
	for i := range c.members {
		c.clients[i], c.peers[i] = w.Address(), w.Address()
		joined = append(joined, fmt.Sprintf("m%d=https://%s", i, c.peers[i]))
	}
	c.joined = strings.Join(joined, ",")
	certificate, err := pair.TLS()
	if err != nil {
		w.t.Fatal(err)
	}
	c.page = &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: w.authority.Pool(), Certificates: []tls.Certificate{certificate}},
	}}
	for i := range c.members {
		c.start(i)
	}
	for i := range c.members {
		c.ready(i)
	}
	return c
}

// start starts a member, again.
func (c *cluster) start(i int) {
	c.t.Helper()
	args := []string{
		"--name", fmt.Sprintf("m%d", i), "--data-dir", filepath.Join(c.Dir, fmt.Sprintf("etcd-%d", i)),
		"--listen-client-urls", "https://" + c.clients[i], "--advertise-client-urls", "https://" + c.clients[i],
		"--listen-peer-urls", "https://" + c.peers[i], "--initial-advertise-peer-urls", "https://" + c.peers[i],
		"--initial-cluster", c.joined, "--initial-cluster-token", "reseal-test",
		"--client-cert-auth", "--trusted-ca-file", c.ca, "--cert-file", c.certFile, "--key-file", c.keyFile,
		"--peer-client-cert-auth", "--peer-trusted-ca-file", c.ca, "--peer-cert-file", c.certFile, "--peer-key-file", c.keyFile,
		"--heartbeat-interval", "50", "--election-timeout", "500",
	}
	member, err := process.Start(process.Config{Name: fmt.Sprintf("etcd m%d", i), Path: "etcd", Args: args})
	if err != nil {
		c.t.Fatal(err)
	}
	c.members[i] = member
	c.t.Cleanup(func() {
		if err := member.Stop(); err != nil {
			c.t.Error(err)
		}
		if c.t.Failed() {
			c.t.Logf("%s printed:\n%s", member.Name(), member.Output())
		}
	})
}

// ready waits until a member serves and the cluster has a leader.
func (c *cluster) ready(i int) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := c.members[i].WaitReady(ctx, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.clients[i]+"/health", nil)
		if err != nil {
			return err
		}
		response, err := c.page.Do(request)
		if err != nil {
			return err
		}
		defer func() { _ = response.Body.Close() }()
		var health struct{ Health string }
		if err := json.NewDecoder(response.Body).Decode(&health); err != nil {
			return err
		}
		if health.Health != "true" {
			return fmt.Errorf("/health says %q", health.Health)
		}
		return nil
	}); err != nil {
		c.t.Fatal(err)
	}
}

// flags point a control plane at the cluster.
func (c *cluster) flags() []string {
	var urls []string
	for _, address := range c.clients {
		urls = append(urls, "https://"+address)
	}
	return []string{"--etcd-endpoints", strings.Join(urls, ","), "--etcd-ca", c.ca, "--etcd-cert", c.certFile, "--etcd-key", c.keyFile}
}

// annotated are two resources that are always applied together.
func (c *cluster) annotated(i int, backend *peers.Backend) string {
	annotation := fmt.Sprintf("annotations: {number: \"%d\"}", i)
	pool := strings.Replace(c.pool("app", []*peers.Backend{backend}, fmt.Sprintf("  timeouts: {responseHeader: %ds}\n", 10+i)), "{name: app}", "{name: app, "+annotation+"}", 1)
	return pool + strings.Replace(route("app", "web", siteName, "app", ""), "{name: app}", "{name: app, "+annotation+"}", 1)
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
// stays, and no apply takes effect by half.
func TestEtcdMemberKilled(t *testing.T) {
	need(t, "etcd")
	c := newCluster(newWorld(t))
	backend := c.launch(t, peers.Go, peers.Options{})
	c.StartControlPlane(c.flags()...)
	edge := c.StartEdge("one", "")
	address := c.Address()
	c.WaitAcked(c.Apply(c.certificate("site", c.site)+listener("web", address, "", "")+c.annotated(0, backend)), edge)

	const applies = 50
	revisions := make(map[int64]int)
	var repeated int
	for i := 1; i <= applies; i++ {
		// Members are down during applies 5 to 14, 20 to 29 and 35 to 44.
		switch member := (i - 5) / 15; {
		case i >= 5 && (i-5)%15 == 0 && member < 3:
			c.members[member].Kill()
		case i >= 15 && (i-5)%15 == 10 && member < 3:
			c.start(member)
			c.ready(member)
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
	if err := get(t.Context(), c.client(t, address, false), "https://"+siteName+peers.Small, peers.Body(peers.Small)); err != nil {
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
	need(t, "etcd")
	c := newCluster(newWorld(t))
	backend := c.launch(t, peers.Go, peers.Options{})
	first := c.StartControlPlane(c.flags()...)
	kek := filepath.Join(first.DataDir, "kek")
	second := c.StartControlPlane(append(c.flags(), "--kek-file", kek)...)
	edge := c.StartEdge("one", "", "--control-plane", first.Address+","+second.Address)
	address := c.Address()
	c.WaitAcked(c.Apply(c.certificate("site", c.site)+listener("web", address, "", "")+c.annotated(0, backend)), edge)

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
	settle(t, func() error {
		if got := int64(edge.Metrics().Sum("reseal_config_revision")); got != answer.Revision {
			return fmt.Errorf("the edge serves revision %d, want %d from the second replica", got, answer.Revision)
		}
		return nil
	})
	if err := get(t.Context(), c.client(t, address, false), "https://"+siteName+peers.Small, peers.Body(peers.Small)); err != nil {
		t.Error(err)
	}
}
