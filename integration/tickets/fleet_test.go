package tickets

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// patience bounds the wait for an event. A machine that is busy with other
// things is slow.
const patience = 2 * time.Minute

// pause is between two looks for an event.
const pause = 100 * time.Millisecond

// fleet is edges that all listen on the same address, each in a network of its
// own, behind one address that takes a client to any of them.
type fleet struct {
	*harness.Site
	t        *testing.T
	replicas []*harness.ControlPlane
	backend  *peers.Backend
	edges    []*node
	address  string // of the listener, on each edge
	front    string // that takes clients to any edge
}

// node is an edge with its host.
type node struct {
	*harness.Edge
	network *process.Network
	link    *gate // to the control plane
	// Connections that were passed on to it, and those of them that have ended.
	passed, ended atomic.Int64
}

// needNetworks skips a test that may not give each edge a host.
func needNetworks(t *testing.T) {
	t.Helper()
	network, err := process.NewNetwork()
	if errors.Is(err, process.ErrPrivilege) {
		t.Skip("edges that listen on the same address: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	network.Close()
}

// newFleet starts a fleet with an embedded store.
func newFleet(t *testing.T, edges int) *fleet {
	t.Helper()
	needNetworks(t)
	f := &fleet{t: t, Site: harness.NewSite(harness.New(t))}
	f.replicas = []*harness.ControlPlane{f.StartControlPlane()}
	f.start(edges)
	return f
}

// start starts the backend and the edges.
func (f *fleet) start(edges int) {
	f.t.Helper()
	f.backend = f.Launch(f.t, peers.Go, peers.Options{})
	f.address = f.Address()
	for i := range edges {
		f.startEdge(fmt.Sprintf("edge-%d", i))
	}
	f.front = f.relay(nil, "127.0.0.1:0", nil, func(ctx context.Context) (net.Conn, func(), error) {
		return f.edges[rand.IntN(len(f.edges))].dial(ctx, f.address)
	})
}

// relay starts one for the length of the test and returns its address.
func (f *fleet) relay(network *process.Network, address string, gate *gate, to func(context.Context) (net.Conn, func(), error)) string {
	f.t.Helper()
	listen := func(address string) (net.Listener, error) { return net.Listen("tcp", address) }
	if network != nil {
		listen = network.Listen
	}
	listener, err := listen(address)
	if err != nil {
		f.t.Fatal(err)
	}
	_, end := newRelay(listener, gate, to)
	f.t.Cleanup(end)
	return listener.Addr().String()
}

// startEdge starts an edge on a host from where the control planes and the
// backend are reached as from here.
func (f *fleet) startEdge(id string) {
	f.t.Helper()
	network, err := process.NewNetwork()
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(network.Close)
	n := &node{network: network, link: newGate()}
	outside := func(address string) func(context.Context) (net.Conn, func(), error) {
		return func(ctx context.Context) (net.Conn, func(), error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
			return conn, func() {}, err
		}
	}
	var addresses []string
	for _, replica := range f.replicas {
		f.relay(network, replica.Address, n.link, outside(replica.Address))
		addresses = append(addresses, replica.Address)
	}
	f.relay(network, f.backend.Address, nil, outside(f.backend.Address))
	n.Edge = f.StartEdgeIn(network, id, "", "--control-plane", strings.Join(addresses, ","))
	f.edges = append(f.edges, n)
}

// dial connects to the edge's listener, as a client.
func (n *node) dial(ctx context.Context, address string) (net.Conn, func(), error) {
	conn, err := n.network.Dial(ctx, address)
	if err != nil {
		return nil, nil, err
	}
	n.passed.Add(1)
	return conn, func() { n.ended.Add(1) }, nil
}

// at is an address that takes clients to one edge.
func (f *fleet) at(n *node) string {
	f.t.Helper()
	return f.relay(nil, "127.0.0.1:0", nil, func(ctx context.Context) (net.Conn, func(), error) { return n.dial(ctx, f.address) })
}

// manifest is all that the fleet serves. More is further lines of the listener.
func (f *fleet) manifest(more string) string {
	return harness.Certificate("site", f.Pair) + f.Pool("app", []*peers.Backend{f.backend}, "") +
		harness.Listener("web", f.address, "", "  pool: app\n"+more)
}

// keyringManifest is the keyring "default".
func keyringManifest(spec string) string {
	return fmt.Sprintf("---\napiVersion: reseal/v1\nkind: Keyring\nmetadata: {name: default}\nspec: {%s}\n", spec)
}

// apply applies a manifest and waits until all edges serve it. Each of them is
// asked: a replica of the control plane lists those that are connected to it.
func (f *fleet) apply(manifest string) {
	f.t.Helper()
	revision := float64(f.Apply(manifest))
	for _, n := range f.edges {
		f.await(n.ID+" serves what was applied", func() bool { return n.Metrics().Sum("reseal_config_revision") >= revision })
	}
}

// await calls condition until it is true.
func (f *fleet) await(what string, condition func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(pause) {
		if time.Now().After(deadline) {
			f.t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// alive are the replicas that run.
func (f *fleet) alive() []*harness.ControlPlane {
	return slices.DeleteFunc(slices.Clone(f.replicas), func(c *harness.ControlPlane) bool {
		select {
		case <-c.Done():
			return true
		default:
			return false
		}
	})
}

// keyring is the status of the keyring "default", as any replica knows it.
func (f *fleet) keyring() harness.KeyringStatus {
	f.t.Helper()
	var status harness.KeyringStatus
	f.await("keyring status", func() (ok bool) {
		var err error
		status, err = f.KeyringAt(f.alive()[0], "default")
		return err == nil
	})
	return status
}

// awaitKeyring waits until the status fulfils a condition.
func (f *fleet) awaitKeyring(what string, condition func(harness.KeyringStatus) bool) harness.KeyringStatus {
	f.t.Helper()
	var status harness.KeyringStatus
	for deadline := time.Now().Add(patience); ; time.Sleep(pause) {
		if status = f.keyring(); condition(status) {
			return status
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("not within %v: %s: %+v", patience, what, status)
		}
	}
}

// covered waits until an epoch encrypts on all edges.
func (f *fleet) covered(epoch uint64) {
	f.t.Helper()
	f.awaitKeyring(fmt.Sprintf("epoch %d encrypts on all edges", epoch), func(k harness.KeyringStatus) bool {
		return k.Active() >= epoch && len(k.Edges) == len(f.edges) &&
			!slices.ContainsFunc(k.Edges, func(e harness.EdgeCoverage) bool { return e.Active < epoch })
	})
}

// rotate prepares an epoch through any replica and returns its number.
func (f *fleet) rotate() uint64 {
	f.t.Helper()
	result := f.TryCtlAt(f.alive()[0], "keyring", "rotate", "default")
	var epoch uint64
	if _, err := fmt.Sscanf(result.Stdout, "keyring/default: epoch %d is prepared", &epoch); result.Code != 0 || err != nil {
		f.t.Fatalf("keyring rotate: %+v, %v", result, err)
	}
	return epoch
}

// renew rotates. After it no rotation is due by itself for rotationInterval, and
// a control plane that has just started no longer waits for edges that it might
// not know of.
func (f *fleet) renew() {
	f.t.Helper()
	f.awaitKeyring("no rotation is under way", func(k harness.KeyringStatus) bool { return k.Active() == k.Newest() && len(k.Laggards) == 0 })
	f.covered(f.rotate())
}

// stats are the counters of the listener on one edge, newer than the call.
func (f *fleet) stats(n *node) harness.Stats {
	f.t.Helper()
	var found harness.Stats
	f.await("statistics of "+n.ID, func() bool {
		// The replica to which the edge reports knows them.
		for _, replica := range f.alive() {
			var answer struct {
				Edges []struct {
					Stale     bool            `json:"stale"`
					Listeners []harness.Stats `json:"listeners"`
				} `json:"edges"`
			}
			result := f.TryCtlAt(replica, "stats", "edges", n.ID, "-o", "json")
			if result.Code != 0 || json.Unmarshal([]byte(result.Stdout), &answer) != nil || len(answer.Edges) != 1 || answer.Edges[0].Stale {
				continue
			}
			i := slices.IndexFunc(answer.Edges[0].Listeners, func(s harness.Stats) bool { return s.Name == "web" })
			if i >= 0 {
				found = answer.Edges[0].Listeners[i]
				return true
			}
		}
		return false
	})
	return found
}
