package integration

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// upgradeStage is a fleet of one edge that can be upgraded, before one backend.
type upgradeStage struct {
	*world
	edge    *harness.Upgradable
	address string
}

func newUpgradeStage(t *testing.T, backend *peers.Backend, w *world) *upgradeStage {
	t.Helper()
	s := &upgradeStage{world: w}
	s.StartControlPlane()
	s.edge = s.StartUpgradable("one", "")
	s.address = s.Address()
	s.WaitAcked(s.Apply(harness.Certificate("site", s.Pair)+s.Pool("app", []*peers.Backend{backend}, "")+
		harness.Listener("web", s.address, "", "  pool: app\n")), s.edge.Edge)
	return s
}

func get(t *testing.T, client *http.Client, path string) (int, error) {
	t.Helper()
	response, err := client.Get("https://" + harness.SiteName + path)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return response.StatusCode, err
}

func countsOf(t *testing.T, backend *peers.Backend) peers.Counts {
	t.Helper()
	counts, err := backend.Counts(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return counts
}

// TestUpgradeThatFails leaves the running process alone, whatever is wrong with the new
// one, and says what it is. After that an upgrade works.
func TestUpgradeThatFails(t *testing.T) {
	w := newWorld(t)
	backend := w.Launch(t, peers.Go, peers.Options{})
	s := newUpgradeStage(t, backend, w)
	client := s.Client(t, s.address, false)
	mustServe := func() {
		t.Helper()
		if code, err := get(t, client, peers.Small); err != nil || code != 200 {
			t.Fatal(code, err)
		}
	}
	mustServe()
	before, err := s.edge.State()
	if err != nil {
		t.Fatal(err)
	}
	for i, bad := range []string{
		"this is no program",
		"#!/bin/sh\necho 'panic: broken release' >&2; exit 2\n",
		"#!/bin/sh\nexec 3>&-; exec sleep 300\n",
	} {
		s.edge.InstallThis([]byte(bad))
		s.edge.Order()
		harness.Settle(t, func() error {
			if got := strings.Count(s.edge.Output(), "upgrade failed; this process goes on as before"); got != i+1 {
				return fmt.Errorf("%d upgrades are said to have failed", got)
			}
			return nil
		})
		mustServe()
		if now, err := s.edge.State(); err != nil || now.PID != before.PID {
			t.Fatal(now, err)
		}
	}
	// A configuration is taken meanwhile, and afterwards.
	s.WaitAcked(s.Apply(harness.Route("r", "web", harness.SiteName, "app", "")), s.edge.Edge)
	after := s.edge.Upgrade()
	mustServe()
	s.edge.Gone(before.PID)
	if after.BootID != before.BootID {
		t.Error("an upgrade looks like a restart")
	}
	if pid, err := s.edge.Serves(); err != nil || pid != after.PID {
		t.Errorf("the pid file names %d, %v; process %d serves", pid, err, after.PID)
	}
	if full := countsOf(t, backend).Full; full != 1 {
		t.Errorf("%d full handshakes", full)
	}
	time.Sleep(100 * time.Millisecond)
	s.WaitAcked(s.Apply(harness.Route("r2", "web", "other."+harness.SiteName, "app", "")), s.edge.Edge)
}
