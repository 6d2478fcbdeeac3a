package integration

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
)

// TestRevocationEverywhere: what is revoked at one replica is out at the other within a
// second: what a user watches ends, its calls are refused, and an edge is gone until
// it is enrolled anew.
func TestRevocationEverywhere(t *testing.T) {
	r := newReplicated(t, 2)
	there := r.replicas[1]
	vera := filepath.Join(r.Dir, "vera.yaml")
	r.Ctl("user", "create", "vera", "--role", "viewer", "--file", vera)
	as := func(args ...string) harness.Result {
		return r.TryCtlAt(there, append([]string{"--config", vera}, args...)...)
	}
	if result := as("get", "edges"); result.Code != 0 {
		t.Fatalf("before: %+v", result)
	}
	r.StartEdge("e1", "", "--control-plane", there.Address)
	r.settled(r.replicas, "e1 synced")

	type ended struct {
		harness.Result
		at time.Time
	}
	watched := make(chan ended, 1)
	go func() { watched <- ended{as("get", "edges", "-w"), time.Now()} }()
	time.Sleep(2 * time.Second) // until it watches

	r.Ctl("user", "revoke", "vera", "--reason", "left us")
	revoked := time.Now()
	end := <-watched
	if took := end.at.Sub(revoked); end.Code != 1 || !strings.Contains(end.Stderr, "viewer/vera was revoked") || !strings.Contains(end.Stderr, "left us") || took > time.Second {
		t.Errorf("the watch ended after %s with %+v", took, end.Result)
	}
	if result := as("get", "edges"); result.Code != 1 || !strings.Contains(result.Stderr, "was revoked") {
		t.Errorf("after: %+v", result)
	}

	if output := r.Ctl("revoke", "e1"); !strings.Contains(output, "resealctl keyring revoke default --epoch 1") {
		t.Errorf("revoke says:\n%s", output)
	}
	revoked = time.Now()
	for {
		if states := strings.Join(r.states(there), ""); !strings.Contains(states, "synced") {
			break
		}
		if time.Since(revoked) > 5*time.Second { // a command takes long with the race detector
			t.Fatalf("the edge is still there: %q", r.states(there))
		}
	}
	if !strings.Contains(r.Ctl("revoke", "--list"), "edge/e1") {
		t.Error("the edge is not listed")
	}
}
