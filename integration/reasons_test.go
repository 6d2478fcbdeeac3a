package integration

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

type counted = map[string]int64

// TestMissReasons produces each reason for a full handshake with a backend that
// has that reason, and reads it where an operator does. Backends close after
// each response, so that each request needs a handshake.
func TestMissReasons(t *testing.T) {
	s := newStage(t)
	for _, test := range []struct {
		name string
		play func(s *scene)
	}{
		{"disabled", disabled},
		{"unsupported", unsupported},
		{"expired", expired},
		{"declined", declined},
		{"version", versionChanged},
		{"policy", policyChanged},
		{"unclean", declinedAfterUncleanClose},
		{"killed", killedEdge},
		{"single", singleUse},
		{"spent", singleUseSpent},
		{"coalesce", coalesceTimeout},
	} {
		t.Run(test.name, func(t *testing.T) { test.play(s.scene(t, test.name)) })
	}
}

func disabled(s *scene) {
	s.start(peers.Nginx, peers.Options{CloseEach: true})
	s.apply("  sessions: {mode: off}\n")
	for range 3 {
		s.get()
	}
	s.explained(counted{"disabled": 3})
}

// unsupported: the first handshake has no session, the others know why. nginx
// with TLS 1.3 is not among these: without cache and ticket keys it still gives
// out tickets and declines every one.
func unsupported(s *scene) {
	for _, backend := range []struct {
		name  string
		start launcher
		mode  peers.Mode
	}{
		{"nginx-tls12", peers.Nginx, peers.TLS12Tickets},
		{"openssl-tls12", peers.OpenSSL, peers.TLS12Tickets},
		{"openssl-tls13", peers.OpenSSL, peers.TLS13},
	} {
		s := s.scene(s.t, s.pool+"-"+backend.name)
		s.start(backend.start, peers.Options{Mode: backend.mode, CloseEach: true, NoSessions: true})
		s.apply("")
		for range 3 {
			s.get()
		}
		s.explained(counted{"no_session": 1, "unsupported_by_peer": 2})
	}
}

func expired(s *scene) {
	s.start(peers.Nginx, peers.Options{CloseEach: true, SessionTimeout: time.Second})
	s.apply("")
	s.get()
	// The passing of the ticket's lifetime is the event.
	time.Sleep(2100 * time.Millisecond)
	s.get()
	s.explained(counted{"no_session": 1, "expired": 1})
}

// declined: a backend that was restarted has other ticket keys and an empty
// cache.
func declined(s *scene) {
	for name, mode := range map[string]peers.Mode{"psk": peers.TLS13, "ticket": peers.TLS12Tickets, "id": peers.TLS12SessionIDs} {
		s := s.scene(s.t, s.pool+"-"+name)
		s.start(peers.Nginx, peers.Options{Mode: mode, CloseEach: true})
		s.apply("")
		s.get()
		s.get()
		s.restart(peers.Nginx, peers.Options{Mode: mode, CloseEach: true})
		s.get()
		s.get()
		s.explained(counted{"no_session": 1, "declined": 1})
	}
}

func versionChanged(s *scene) {
	s.start(peers.Nginx, peers.Options{Mode: peers.TLS13, CloseEach: true})
	s.apply("")
	s.get()
	s.restart(peers.Nginx, peers.Options{Mode: peers.TLS12Tickets, CloseEach: true})
	s.get()
	s.restart(peers.Nginx, peers.Options{Mode: peers.TLS13, CloseEach: true})
	s.get()
	s.get()
	s.explained(counted{"no_session": 1, "version_changed": 2})
}

// policyChanged changes everything that a session may depend on, and something
// that it does not.
func policyChanged(s *scene) {
	s.start(peers.Nginx, peers.Options{CloseEach: true})
	s.apply("")
	s.get()
	other, err := peers.NewAuthority("another authority")
	if err != nil {
		s.t.Fatal(err)
	}
	trust := harness.Indent(other.PEM(), 8) + "\n" // goes on in caPem
	s.apply(trust)
	s.get()
	certificate := "    clientCertificate: client\n"
	s.applyWith(trust+certificate, harness.Certificate("client", s.Issue()))
	s.get()
	policy := "    policy: old\n"
	s.applyWith(trust+certificate+policy, `---
apiVersion: reseal/v1
kind: TLSPolicy
metadata: {name: old}
spec: {curves: [P256]}
`)
	s.get()
	s.explained(counted{"no_session": 1, "policy_changed": 3})
	s.apply(trust + certificate + policy + "  connections: {maxRequests: 7}\n")
	s.get()
	s.explained(counted{"no_session": 1, "policy_changed": 3})
}

// declinedAfterUncleanClose: a strict backend hangs during an upload, so that the
// edge's close_notify has to wait behind what the backend does not read, until
// closeTimeout. When the backend goes on it finds no close_notify.
func declinedAfterUncleanClose(s *scene) {
	s.start(peers.JettyArranged, peers.Options{Mode: peers.TLS12SessionIDs, Strict: true})
	s.apply(impatient)
	s.get()
	s.upload()
	s.closed(counted{"timeout": 1})
	s.backend.Signal(syscall.SIGCONT)
	harness.Settle(s.t, func() error {
		counts, err := s.backend.Counts(s.t.Context())
		if err == nil && counts.Unclean != 1 {
			err = fmt.Errorf("the backend counts %+v, want 1 unclean end", counts)
		}
		return err
	})
	s.get()
	s.explained(counted{"no_session": 1, "declined_after_unclean_close": 1})
}

// killedEdge: nobody sends close_notify for an edge that was killed.
func killedEdge(s *scene) {
	s.start(peers.JettyArranged, peers.Options{Mode: peers.TLS12SessionIDs, Strict: true})
	s.apply("")
	s.get()
	s.kept()
	s.edge.Kill()
	harness.Settle(s.t, func() error {
		counts, err := s.backend.Counts(s.t.Context())
		if err == nil && counts.Unclean != 1 {
			err = fmt.Errorf("the backend counts %+v, want 1 unclean end", counts)
		}
		return err
	})
	s.edge.Start()
	s.edge.WaitReady()
	s.client.CloseIdleConnections()
	s.get()
	s.explained(counted{"declined_after_unclean_close": 1}) // counters began anew
}

// kept waits until the edge has saved its newest sessions. The file can't be read
// here, and other pools' sessions are in it.
func (s *scene) kept() {
	s.t.Helper()
	harness.Settle(s.t, func() error {
		_, err := os.Stat(filepath.Join(s.edge.StateDir, "sessions"))
		return err
	})
	time.Sleep(3 * time.Second) // what came meanwhile is written within a second
}

// singleUse: JSSE without stateless tickets takes each ticket once and gives one
// with each handshake, so that nothing is ever spent.
func singleUse(s *scene) {
	s.start(peers.JettyArranged, peers.Options{Mode: peers.TLS13, Stateful: true, CloseEach: true})
	s.apply("")
	for range 6 {
		s.get()
	}
	s.explained(counted{"no_session": 1})
}

// singleUseSpent needs a server that takes each ticket once and gives none with
// a resumed handshake. JSSE and OpenSSL, which take tickets once, give one then,
// so it is Go. The third handshake learns what kind of server that is.
func singleUseSpent(s *scene) {
	s.start(peers.Go, peers.Options{SingleUse: true, CloseEach: true})
	s.apply("")
	for range 6 {
		s.get()
	}
	s.explained(counted{"no_session": 1, "declined": 1, "single_use_spent": 1})
}

// coalesceTimeout: a backend hangs during the first handshake. Of those that
// wait for it one goes ahead, the others resume.
func coalesceTimeout(s *scene) {
	const clients = 8
	s.start(peers.HAProxy, peers.Options{CloseEach: true})
	s.apply("  protocol: http1\n  sessions: {coalesceTimeout: 200ms}\n  timeouts: {handshake: 60s}\n")
	s.backend.Signal(syscall.SIGSTOP)
	done := s.fetch(clients)
	s.await("a second handshake", func(found sockets) bool { return found.established == 2 })
	s.backend.Signal(syscall.SIGCONT)
	for range clients {
		if err := <-done; err != nil {
			s.t.Error(err)
		}
	}
	s.explained(counted{"no_session": 1, "coalesce_timeout": 1})
}

// TestEvicted has more server names than an edge keeps identities of a pool. The
// bound is not configurable, so this takes 10,000 handshakes.
func TestEvicted(t *testing.T) {
	if !harness.Long() {
		t.Skip("10,001 full handshakes take too long; set RESEAL_LONG to run this")
	}
	const most = 10_000
	w := newWorldOf(t, harness.NewShipped(t))
	w.StartControlPlane()
	edge := w.StartEdge("one", "")
	address := w.Address()
	backend := w.Launch(t, peers.HAProxy, peers.Options{CloseEach: true, Names: []string{"*." + harness.SiteName}})
	pool := strings.Replace(w.Pool("many", []*peers.Backend{backend}, ""), "    serverName: "+peers.ServerName+"\n", "", 1)
	w.WaitAcked(w.Apply(harness.Certificate("site", w.Pair)+harness.Listener("web", address, "", "")+pool+harness.Route("many", "web", `"*.`+harness.SiteName+`"`, "many", "")), edge)
	client := w.Client(t, address, true)
	visit := func(ctx context.Context, i int) error {
		return harness.Get(ctx, client, fmt.Sprintf("https://n%d.%s%s", i, harness.SiteName, peers.Empty), peers.Body(peers.Empty))
	}
	if err := visit(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	harness.Hammer(t.Context(), most, visit).Check(t, most)
	if err := visit(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	stats := w.PoolStats("many")
	if want := (counted{"no_session": most + 1, "evicted": 1}); !maps.Equal(stats.Misses, want) || stats.Missed() != stats.Handshakes.Full {
		t.Errorf("misses %v, want %v; handshakes %+v", stats.Misses, want, stats.Handshakes)
	}
}
