package bench

import (
	"context"
	"fmt"
	"maps"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Handshakes are what edges counted themselves on their backend leg.
type Handshakes struct {
	// Full and Resumed handshakes.
	Full, Resumed int64
	// Misses are the full ones by reason.
	Misses map[string]int64
	// Closes are the connections that ended, by kind.
	Closes map[string]int64
}

func (h *Handshakes) add(other Handshakes) {
	h.Full += other.Full
	h.Resumed += other.Resumed
	for _, sum := range []struct{ into, from map[string]int64 }{{h.Misses, other.Misses}, {h.Closes, other.Closes}} {
		for name, n := range sum.from {
			sum.into[name] += n
		}
	}
}

// Reseal is one or several edges with a scenario's configuration.
type Reseal struct {
	fleet     *harness.Fleet
	scenario  *Scenario
	authority *peers.Authority
	backend   string
	nodes     []*node
	more      string     // of the pool's manifest
	past      Handshakes // of edges' earlier lives
}

type node struct {
	*harness.Edge
	address string
}

func newReseal(fleet *harness.Fleet, t target) *Reseal {
	return &Reseal{
		fleet: fleet, scenario: t.scenario, authority: t.authority, backend: t.backend, more: t.scenario.pool,
		past: Handshakes{Misses: map[string]int64{}, Closes: map[string]int64{}},
	}
}

// Address implements Proxy: that of the first edge.
func (r *Reseal) Address() string { return r.nodes[0].address }

// Start implements Proxy: it starts the first edge, with a configuration if it
// is the first time.
func (r *Reseal) Start(context.Context) error {
	if len(r.nodes) == 0 {
		return r.addEdge()
	}
	r.startEdge(r.nodes[0])
	return nil
}

// Stop implements Proxy: it ends all edges, one after another.
func (r *Reseal) Stop() error {
	for _, n := range r.nodes {
		if err := r.stopEdge(n); err != nil {
			return err
		}
	}
	return nil
}

func (r *Reseal) stopEdge(n *node) error {
	select {
	case <-n.Done():
		return nil
	default:
	}
	r.past.add(r.scrape(n))
	return n.Edge.Stop()
}

func (r *Reseal) startEdge(n *node) {
	n.Edge.Start()
	n.WaitReady()
}

// addEdge starts another edge with the scenario's configuration.
func (r *Reseal) addEdge() error {
	id := fmt.Sprintf("%s-%d", r.scenario.Key, len(r.nodes)+1)
	n := &node{Edge: r.fleet.StartEdge(id, "edge="+id, "--access-log="), address: r.fleet.Address()}
	r.nodes = append(r.nodes, n)
	manifest := listenerManifest(id, n.address, id, r.scenario.Key, r.scenario.Key)
	if len(r.nodes) == 1 {
		site, err := r.authority.Issue(siteNames...)
		if err != nil {
			return err
		}
		manifest += harness.Certificate(r.scenario.Key, site) + r.poolManifest()
	}
	r.fleet.WaitAcked(r.fleet.Apply(manifest), n.Edge)
	n.WaitReady()
	return nil
}

func (r *Reseal) poolManifest() string {
	serverName := peers.ServerName
	if len(r.scenario.hosts()) > 1 {
		serverName = ""
	}
	return poolManifest(r.scenario.Key, r.backend, serverName, r.authority.PEM(), r.scenario.sessions, r.more)
}

// Reload replaces what stands in the pool's manifest besides its endpoints, and
// waits until all edges serve it.
func (r *Reseal) Reload(more string) {
	r.more = more
	var edges []*harness.Edge
	for _, n := range r.nodes {
		edges = append(edges, n.Edge)
	}
	r.fleet.WaitAcked(r.fleet.Apply(r.poolManifest()), edges...)
}

// Handshakes is what all edges have counted so far. What an edge did between its
// last scrape and its end is missing.
func (r *Reseal) Handshakes() Handshakes {
	sum := Handshakes{Misses: maps.Clone(r.past.Misses), Closes: maps.Clone(r.past.Closes), Full: r.past.Full, Resumed: r.past.Resumed}
	for _, n := range r.nodes {
		select {
		case <-n.Done():
		default:
			sum.add(r.scrape(n))
		}
	}
	return sum
}

func (r *Reseal) scrape(n *node) Handshakes {
	metrics := n.Metrics()
	pool := []string{"side", "backend", "pool", r.scenario.Key}
	h := Handshakes{Misses: map[string]int64{}, Closes: map[string]int64{}}
	h.Full = int64(metrics.Sum("reseal_tls_handshakes_total", append(pool, "result", "full")...))
	h.Resumed = int64(metrics.Sum("reseal_tls_handshakes_total", append(pool, "result", "resumed")...))
	for value := range resealv1.MissReason_name {
		reason := resealv1.Label(resealv1.MissReason(value))
		if count := metrics.Sum("reseal_tls_resumption_misses_total", append(pool, "reason", reason)...); reason != "" && count > 0 {
			h.Misses[reason] = int64(count)
		}
	}
	for value := range resealv1.CloseKind_name {
		kind := resealv1.Label(resealv1.CloseKind(value))
		if count := metrics.Sum("reseal_backend_connections_closed_total", "pool", r.scenario.Key, "how", kind); kind != "" && count > 0 {
			h.Closes[kind] = int64(count)
		}
	}
	return h
}
