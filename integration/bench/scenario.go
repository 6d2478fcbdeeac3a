// Package bench proves what Reseal is for: it counts, at the backend, the full
// TLS handshakes that a number of requests costs, with Reseal, HAProxy and
// nginx between the same clients and the same backend.
package bench

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/reseal/reseal/integration/peers"
)

// Scenario is one row of the table.
type Scenario struct {
	// Key names it in commands, tests and manifests.
	Key string
	// Title describes it.
	Title string
	// Must is how many full handshakes Reseal may cost the backend; it must be
	// met exactly, or with AtMost not be exceeded.
	Must   int64
	AtMost bool
	// ResealOnly scenarios are about what the peers don't have.
	ResealOnly bool
	// Best scenarios have a configuration of the peers that is better than what
	// their manuals show.
	Best bool
	// Latency scenarios bound the p99 of a request by HAProxy's.
	Latency bool

	backend   launcher // default peers.JettyArranged
	busy      int      // processes that do nothing but take the CPU
	mode      peers.Mode
	closeEach bool
	strict    bool
	path      string // default peers.Small
	clients   int    // default 32
	names     int    // host names, default 1
	aborts    int    // every n-th response
	share     float64
	restarts  bool   // of the backend; its last requests before are not counted
	stops     bool   // of edges; what they do between the last look and their end is not counted
	sessions  string // more of the pool's spec.sessions
	pool      string // more of the pool's manifest
	drive     func(ctx context.Context, t *trial) error
}

type launcher func(context.Context, peers.Options) (*peers.Backend, error)

const (
	defaultClients = 32
	coldClients    = 256
	abortEvery     = 20 // 5%
	fleetSize      = 8
)

// Scenarios are the rows of the table, in its order.
func Scenarios() []*Scenario {
	return slices.Concat(stock(), loaded(), arranged())
}

// arranged are the rows with Jetty arranged to avoid what its choice of
// certificates costs.
func arranged() []*Scenario {
	var all []*Scenario
	for _, closeEach := range []bool{false, true} {
		for _, mode := range []struct {
			mode       peers.Mode
			key, title string
			must       int64
		}{
			{peers.TLS12SessionIDs, "ids", "TLS 1.2 session IDs", 1},
			{peers.TLS12Tickets, "tickets", "TLS 1.2 tickets", 1},
			{peers.TLS13, "tls13", "TLS 1.3", 2},
		} {
			s := &Scenario{Key: "keep-" + mode.key, Title: mode.title + ", keep-alive", mode: mode.mode, Must: mode.must, AtMost: mode.must > 1}
			if closeEach {
				s.Key, s.Title, s.closeEach = "close-"+mode.key, mode.title+", the backend closes after each response", true
			}
			all = append(all, s)
		}
	}
	all = append(all,
		&Scenario{
			Key: "abort", Title: "clients abort 5% of 256 KB responses", Must: 1,
			mode: peers.TLS12SessionIDs, path: peers.Medium, aborts: abortEvery, pool: patientPool,
		},
		&Scenario{
			Key: "cold", Title: "256 cold clients at once", Must: 1,
			mode: peers.TLS12SessionIDs, clients: coldClients,
		},
		&Scenario{
			Key: "strict-abort", Title: "strict backend, clients abort 5% of 256 KB responses", Must: 1,
			mode: peers.TLS12SessionIDs, strict: true, path: peers.Medium, aborts: abortEvery, pool: patientPool,
		},
		&Scenario{
			Key: "strict-closing", Title: "strict backend, keep-alive with idle closes, reload, health checks, stop", Must: 1, ResealOnly: true,
			mode: peers.TLS12SessionIDs, strict: true, stops: true, pool: closingPool(closingIdle), drive: driveClosing,
		},
		&Scenario{
			Key: "hosts", Title: "4 host names, SNI follows the host, the backend closes after each response", Must: 4,
			mode: peers.TLS12SessionIDs, closeEach: true, names: 4, share: 0.4,
		},
		&Scenario{
			Key: "restart", Title: "proxy stopped by SIGTERM and started halfway", Must: 1,
			mode: peers.TLS12SessionIDs, stops: true, drive: driveRestart,
		},
		&Scenario{
			Key: "strict-restart", Title: "strict backend, proxy stopped by SIGTERM and started halfway", Must: 1,
			mode: peers.TLS12SessionIDs, strict: true, stops: true, drive: driveRestart,
		},
		&Scenario{
			Key: "fleet", Title: "8 edges started one after another, the first warmed by one request, each restarted once", Must: 1, ResealOnly: true,
			mode: peers.TLS12SessionIDs, stops: true, sessions: "sharing: fleet", drive: driveFleet,
		},
		&Scenario{
			Key: "backend-restart", Title: "backend restarted halfway", Must: 2,
			mode: peers.TLS12SessionIDs, restarts: true, drive: driveBackendRestart,
		},
	)
	return all
}

// hosts are the names that clients ask for.
func (s *Scenario) hosts() []string { return hostNames(s.names) }

// requests is the scenario's part of n.
func (s *Scenario) requests(n int) int {
	if s.share > 0 {
		n = int(float64(n) * s.share)
	}
	return max(n, 2*s.clientCount())
}

func (s *Scenario) clientCount() int {
	if s.clients > 0 {
		return s.clients
	}
	return defaultClients
}

// options start the scenario's backend at address.
func (s *Scenario) options(authority *peers.Authority, dir, address string) peers.Options {
	o := peers.Options{
		Authority: authority, Dir: dir, Address: address,
		Mode: s.mode, AnyVersion: true, CloseEach: s.closeEach, Strict: s.strict, Bulk: s.path == peers.Medium,
	}
	if s.names > 1 {
		o.Names = s.hosts()
	}
	return o
}

// driveRestart stops the proxy when half of the requests are made and starts it
// again.
func driveRestart(ctx context.Context, t *trial) error {
	load := t.load(t.requests)
	load.RetryRefused = true
	load.Halfway = func() error {
		if err := t.proxy.Stop(); err != nil {
			return err
		}
		before, err := t.settled(ctx)
		if err != nil {
			return err
		}
		t.before = &before
		return t.proxy.Start(ctx)
	}
	return t.run(ctx, load)
}

// driveBackendRestart restarts the backend when half of the requests are made.
// It takes a second or so to come back; clients keep trying.
func driveBackendRestart(ctx context.Context, t *trial) error {
	load := t.load(t.requests)
	load.RetryUnavailable = true
	load.Halfway = func() error { return t.restartBackend(ctx) }
	if err := t.run(ctx, load); err != nil {
		return err
	}
	if t.outcome.Retried == 0 {
		return fmt.Errorf("no request noticed the restart")
	}
	return nil
}

// patientPool lets a backend that shares two cores with all the others finish
// the response that nobody wants any more, before the connection is closed.
const patientPool = "  connections: {closeTimeout: 5s}\n"

// closingIdle is the idle time-out of the closing scenario.
const closingIdle = 300 * time.Millisecond

func closingPool(idle time.Duration) string {
	return fmt.Sprintf("  connections: {idleTimeout: %v}\n  healthCheck: {path: /0, interval: 100ms}\n", idle)
}

// driveClosing makes the edge close its connections in every way but an abort:
// when they are idle, after health checks, around reloads and at its end.
func driveClosing(ctx context.Context, t *trial) error {
	const rounds = 10
	edge := t.proxy.(*Reseal)
	for round := range rounds {
		before, err := t.counts(ctx)
		if err != nil {
			return err
		}
		load := t.load(t.requests / rounds)
		if round%3 == 1 {
			// Connections are in use while the configuration changes.
			load.Halfway = func() error {
				edge.Reload(closingPool(closingIdle + time.Duration(round)*time.Millisecond))
				return nil
			}
		}
		if err := t.run(ctx, load); err != nil {
			return err
		}
		if err := sleep(ctx, 3*closingIdle); err != nil {
			return err
		}
		after, err := t.counts(ctx)
		if err != nil {
			return err
		}
		if opened := after.Connections - before.Connections; opened < int64(load.Clients) {
			return fmt.Errorf("round %d: %d new connections: the old ones were not closed when idle", round+1, opened)
		}
	}
	return t.proxy.Stop()
}

// driveFleet starts edges one after another and restarts each once.
func driveFleet(ctx context.Context, t *trial) error {
	fleet := t.proxy.(*Reseal)
	if err := t.run(ctx, t.single()); err != nil {
		return err
	}
	for range fleetSize - 1 {
		if err := fleet.addEdge(); err != nil {
			return err
		}
		if err := t.visit(ctx, fleet.nodes[len(fleet.nodes)-1].address); err != nil {
			return err
		}
	}
	for _, n := range fleet.nodes {
		if err := fleet.stopEdge(n); err != nil {
			return err
		}
		fleet.startEdge(n)
		if err := t.visit(ctx, n.address); err != nil {
			return err
		}
	}
	return nil
}

// single is one request of one client.
func (t *trial) single() *Load {
	load := t.load(1)
	load.Clients = 1
	return load
}

// visit sends one edge's part of the requests of driveFleet.
func (t *trial) visit(ctx context.Context, address string) error {
	load := t.load(max(t.requests/(2*fleetSize), defaultClients))
	load.Address = address
	return t.run(ctx, load)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
