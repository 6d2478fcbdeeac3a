package store

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// startCluster starts members of one etcd cluster on unix sockets. Members dial
// each other by the host of the URL, so the peers' sockets lie in the current
// folder, and are named like a host with a port.
func startCluster(t *testing.T, size int) []*testEtcd {
	t.Helper()
	dir, err := os.MkdirTemp("", "cluster")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	t.Chdir(dir)
	members := make([]*testEtcd, size)
	var initial []string
	for i := range members {
		name := fmt.Sprintf("m%d", i)
		peer := url.URL{Scheme: "unix", Host: name + ":1"}
		client := url.URL{Scheme: "unix", Path: filepath.Join(dir, name+"c")}
		config := quietConfig(filepath.Join(dir, name))
		config.Name, config.TickMs, config.ElectionMs = name, 20, 200
		config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
		config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
		initial = append(initial, name+"="+peer.String())
		members[i] = &testEtcd{config: config, socket: client.Path}
	}
	var wg sync.WaitGroup
	errs := make([]error, size)
	for i, member := range members {
		member.config.InitialCluster = strings.Join(initial, ",")
		wg.Go(func() { errs[i] = member.start() })
	}
	wg.Wait()
	// After the clients, since cleanups run backwards.
	t.Cleanup(func() {
		var wg sync.WaitGroup
		for _, member := range members {
			if member.server != nil {
				wg.Go(member.kill)
			}
		}
		wg.Wait()
	})
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return members
}

// kill ends a member without handing over what it leads.
func (e *testEtcd) kill() {
	e.server.Server.HardStop()
	e.server.Close()
}

func leader(t *testing.T, members []*testEtcd) int {
	t.Helper()
	for i, member := range members {
		if member.server.Server.Leader() == member.server.Server.MemberID() {
			return i
		}
	}
	t.Fatal("no leader")
	return 0
}

// manyApplies is what two writers share.
type manyApplies struct {
	mu       sync.Mutex
	answered map[string]int64 // revisions by name
	retried  int
	kill     func()
}

// apply makes one change of three resources, trying again as callers do. In the
// middle of a quarter of the changes it kills the leader.
func (m *manyApplies) apply(t *testing.T, replica *Store, n int) {
	name := fmt.Sprintf("n%02d", n)
	request := &resealv1.ApplyRequest{Resources: []*resealv1.Resource{
		pool(name+"-a", "10.0.0.1:443"),
		certificate(name+"-b", "PEM", secretA),
		pool("newest", fmt.Sprintf("10.0.%d.1:443", n)),
	}}
	if n == 12 {
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(m.kill)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		resp, err := replica.Apply(t.Context(), "tester", request)
		m.mu.Lock()
		if err == nil {
			m.answered[name] = resp.Revision
		} else {
			m.retried++
		}
		m.mu.Unlock()
		switch {
		case err == nil:
			return
		case !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), "not known") || time.Now().After(deadline):
			t.Errorf("apply %d: %v", n, err)
			return
		case replica.Snapshot().Get("BackendPool", name+"-a") != nil:
			t.Errorf("apply %d was reported as failed, but is there: %v", n, err)
			return
		}
	}
}

// A member, even the leader, stops while two replicas make changes: none that was
// answered is lost, none is half there, and none shows up whose caller was told
// that it had failed.
func TestMemberStopsUnderApplies(t *testing.T) {
	members := startCluster(t, 3)
	stopped := leader(t, members)
	cfg, _ := testConfig(t)
	cfg.RequestTimeout = 2 * time.Second
	replicas := make([]*Store, 2)
	endpoints := []string{"unix://" + members[0].socket, "unix://" + members[1].socket, "unix://" + members[2].socket}
	for i := range replicas {
		own := cfg
		own.Client = newClient(t, endpoints...)
		replicas[i] = run(t, own)
	}
	const applies = 50
	writers := &manyApplies{answered: map[string]int64{}, kill: sync.OnceFunc(members[stopped].kill)}
	var wg sync.WaitGroup
	for i, replica := range replicas {
		wg.Go(func() {
			for n := i; n < applies; n += len(replicas) {
				writers.apply(t, replica, n)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	answered, newest := writers.answered, slices.Max(slices.Collect(maps.Values(writers.answered)))
	t.Logf("killed the leader; %d tries were answered with unavailable", writers.retried)
	for i, replica := range append(replicas, run(t, withClient(t, cfg, endpoints))) {
		snapshot, err := replica.Next(within(t, 10*time.Second), newest-1)
		if err != nil {
			t.Fatalf("replica %d: %v", i, err)
		}
		if snapshot.Revision() != newest || snapshot.Len() != 2*applies+2 {
			t.Errorf("replica %d: revision %d with %d resources, want %d with %d", i, snapshot.Revision(), snapshot.Len(), newest, 2*applies+2)
		}
		for name, revision := range answered {
			a, b := snapshot.Get("BackendPool", name+"-a"), snapshot.Get("Certificate", name+"-b")
			if a.GetMetadata().GetRevision() != revision || b.GetMetadata().GetRevision() != revision {
				t.Errorf("replica %d: %s answered at %d, stored at %d and %d", i, name, revision, a.GetMetadata().GetRevision(), b.GetMetadata().GetRevision())
			}
		}
		history, err := replica.Revisions(t.Context(), &resealv1.ListRevisionsRequest{})
		if err != nil || len(history.Revisions) != applies+1 {
			t.Errorf("replica %d: %d revisions, want %d (%v)", i, len(history.GetRevisions()), applies+1, err)
		}
	}
	// The stopped member comes back and the cluster goes on.
	if err := members[stopped].start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the member to be back", func() bool {
		_, err := replicas[0].Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{pool("after", "10.0.0.1:443")}})
		return err == nil
	})
}

func withClient(t *testing.T, cfg Config, endpoints []string) Config {
	t.Helper()
	cfg.Client = newClient(t, endpoints...)
	return cfg
}
