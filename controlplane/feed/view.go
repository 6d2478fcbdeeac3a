package feed

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// generation is a snapshot with the views of it that edges asked for.
type generation struct {
	snapshot *resealv1.Snapshot
	encoder  *encoder
	seen     time.Time // when this replica learned of it

	listeners []*resealv1.Resource
	keyrings  []*resealv1.Resource
	routes    []*resealv1.Resource
	limited   bool // some pool has connections.maxPerFleet

	mu    sync.Mutex
	views map[string]*view // by what was selected
}

func newGeneration(snapshot *resealv1.Snapshot, encoder *encoder, seen time.Time) *generation {
	return &generation{
		snapshot:  snapshot,
		encoder:   encoder,
		seen:      seen,
		listeners: snapshot.Kind("Listener"),
		keyrings:  snapshot.Kind("Keyring"),
		routes:    snapshot.Kind("Route"),
		limited:   slices.ContainsFunc(snapshot.Kind("BackendPool"), func(pool *resealv1.Resource) bool { return budgetOf(pool) > 0 }),
		views:     map[string]*view{},
	}
}

func (g *generation) revision() int64 { return g.snapshot.Revision() }

// view is what an edge with labels should hold. Edges for which the same
// listeners and keyrings are selected share one.
func (g *generation) view(labels map[string]string, encode func(*resealv1.Resource) (*resealv1.EncodedResource, error)) (*view, error) {
	chosen := g.choose(labels)
	key := chosen.key()
	// Building under the lock makes a crowd of edges wait for one build.
	g.mu.Lock()
	defer g.mu.Unlock()
	if found := g.views[key]; found != nil {
		return found, nil
	}
	built := &view{clusterID: g.snapshot.ClusterID(), revision: g.revision(), updates: map[baseKey]*update{}}
	found := g.closure(chosen)
	built.limited = limitedPools(found)
	for _, resource := range found {
		encoded, err := encode(resource)
		if err != nil {
			return nil, err
		}
		built.held = append(built.held, encoded)
	}
	built.hash = resealv1.HashEncoded(built.held)
	g.views[key] = built
	return built, nil
}

// retire drops what only edges that follow the newest generation need.
func (g *generation) retire() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, view := range g.views {
		view.forgetUpdates()
	}
}

// choice is what an edge's labels select directly.
type choice struct {
	listeners []*resealv1.Resource
	keyrings  []*resealv1.Resource
}

func (g *generation) choose(labels map[string]string) choice {
	var chosen choice
	for _, listener := range g.listeners {
		if fleet.Selects(listener.GetListener().GetEdgeSelector(), labels) {
			chosen.listeners = append(chosen.listeners, listener)
		}
	}
	for _, keyring := range g.keyrings {
		if fleet.Selects(keyring.GetKeyring().GetEdgeSelector(), labels) {
			chosen.keyrings = append(chosen.keyrings, keyring)
		}
	}
	return chosen
}

func (c choice) key() string {
	var key strings.Builder
	for _, resource := range c.listeners {
		key.WriteString(resource.GetMetadata().GetName() + "\x00")
	}
	key.WriteString("\x01")
	for _, resource := range c.keyrings {
		key.WriteString(resource.GetMetadata().GetName() + "\x00")
	}
	return key.String()
}

// closure is what was chosen with all that it needs.
func (g *generation) closure(chosen choice) map[string]*resealv1.Resource {
	c := closure{snapshot: g.snapshot, found: map[string]*resealv1.Resource{}}
	for _, keyring := range chosen.keyrings {
		c.add("Keyring", keyring.GetMetadata().GetName())
	}
	selected := map[string]bool{}
	for _, resource := range chosen.listeners {
		listener := resource.GetListener()
		selected[resource.GetMetadata().GetName()] = true
		c.add("Listener", resource.GetMetadata().GetName())
		for _, name := range listener.GetCertificates() {
			c.add("Certificate", name)
		}
		c.add("TLSPolicy", listener.GetTlsPolicy())
		c.addPool(listener.GetPool())
	}
	for _, resource := range g.routes {
		route := resource.GetRoute()
		if !slices.ContainsFunc(route.GetListeners(), func(name string) bool { return selected[name] }) {
			continue
		}
		c.add("Route", resource.GetMetadata().GetName())
		for _, pool := range route.GetPools() {
			c.addPool(pool.GetName())
		}
	}
	return c.found
}

type closure struct {
	snapshot *resealv1.Snapshot
	found    map[string]*resealv1.Resource
}

// add includes a resource. A name that leads nowhere is left to the edge, which
// refuses it by name.
func (c *closure) add(kind, name string) *resealv1.Resource {
	resource := c.snapshot.Get(kind, name)
	if resource != nil {
		c.found[kind+"/"+name] = resource
	}
	return resource
}

func (c *closure) addPool(name string) {
	if tls := c.add("BackendPool", name).GetBackendPool().GetTls(); tls != nil {
		c.add("TLSPolicy", tls.GetPolicy())
		c.add("Certificate", tls.GetClientCertificate())
	}
}

// view is what a group of edges holds at a revision. Held and hash don't change.
type view struct {
	clusterID string
	revision  int64
	hash      []byte
	held      []*resealv1.EncodedResource // sorted by kind, then name
	limited   []*resealv1.Resource        // pools with connections.maxPerFleet, by name

	mu      sync.Mutex
	updates map[baseKey]*update // that lead to this view
}

// baseKey is what an update builds on. Zero: on nothing.
type baseKey struct {
	revision int64
	hash     string
}

// maxBases bounds the updates kept per view. More come up only while edges of
// many different revisions connect.
const maxBases = 64

// update is an Update ready to be sent.
type update struct {
	message   *fleet.Prepared
	kind      string // "full", "delta" or "empty"
	resources int    // upserts
}

// update leads an edge that holds base, as of baseRevision, to v. A nil base
// stands for nothing.
func (v *view) update(base *view, baseRevision int64, marshal func(*resealv1.SyncResponse) ([]byte, error)) (*update, error) {
	var key baseKey
	if base != nil {
		key = baseKey{baseRevision, string(base.hash)}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if found := v.updates[key]; found != nil {
		return found, nil
	}
	message := &resealv1.Update{ClusterId: v.clusterID, Revision: v.revision, Hash: v.hash}
	made := &update{kind: "full"}
	switch {
	case base == nil:
		message.Upserts = v.held
	case bytes.Equal(base.hash, v.hash):
		made.kind, message.BaseRevision = "empty", baseRevision
	default:
		made.kind, message.BaseRevision = "delta", baseRevision
		message.Upserts, message.Deletes = difference(base.held, v.held)
	}
	made.resources = len(message.Upserts)
	response := &resealv1.SyncResponse{Message: &resealv1.SyncResponse_Update{Update: message}}
	wire, err := marshal(response)
	if err != nil {
		return nil, err
	}
	made.message = &fleet.Prepared{Message: response, Wire: wire}
	if len(v.updates) >= maxBases {
		clear(v.updates)
	}
	v.updates[key] = made
	return made, nil
}

func (v *view) forgetUpdates() {
	v.mu.Lock()
	defer v.mu.Unlock()
	clear(v.updates)
}

// difference walks two sorted lists.
func difference(before, after []*resealv1.EncodedResource) (upserts []*resealv1.EncodedResource, deletes []*resealv1.ResourceRef) {
	for len(before) > 0 || len(after) > 0 {
		order := 0
		switch {
		case len(before) == 0:
			order = 1
		case len(after) == 0:
			order = -1
		default:
			order = cmp.Or(strings.Compare(before[0].Kind, after[0].Kind), strings.Compare(before[0].Name, after[0].Name))
		}
		switch {
		case order < 0:
			deletes = append(deletes, &resealv1.ResourceRef{Kind: before[0].Kind, Name: before[0].Name})
			before = before[1:]
		case order > 0:
			upserts = append(upserts, after[0])
			after = after[1:]
		default:
			if before[0] != after[0] && !bytes.Equal(before[0].Resource, after[0].Resource) {
				upserts = append(upserts, after[0])
			}
			before, after = before[1:], after[1:]
		}
	}
	return upserts, deletes
}

func marshalDeterministic(message proto.Message) ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(message)
}
