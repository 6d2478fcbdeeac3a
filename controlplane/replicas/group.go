// Package replicas knows the replicas of a control plane, calls them, and answers
// for the edges of all of them.
//
// Each replica has one key in etcd, below Config.Prefix, on a lease of its own:
//
//	replicas/<name>  its address, version and number of edges, as JSON
//
// What a replica is asked by another it answers for its own edges alone, so that a
// question never goes round, and costs at most one call of each replica.
package replicas

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/reseal/reseal/controlplane/mirror"
)

const (
	// leaseTTL is how long a replica that died counts as one, in seconds.
	leaseTTL = 10
	// lostFor is how long a replica that vanished without a farewell is still
	// asked, and named when it does not answer: it may only have lost etcd. By then
	// its edges are connected to others.
	lostFor = 30 * time.Second
	// refreshInterval is how often a replica tells the number of its edges, if that
	// has changed.
	refreshInterval = 3 * time.Second
	// requestTimeout bounds one request to etcd.
	requestTimeout = 5 * time.Second
	// farewell bounds what a replica that stops still says.
	farewell = time.Second
)

// Config is what a Group needs. It is read once, by New.
type Config struct {
	// Client is the connection to etcd. Required. It is not closed.
	Client *clientv3.Client
	// Prefix of all keys in etcd. Default "/reseal/v1/".
	Prefix string
	// ID is this replica's name: letters, digits, ".", "_" and "-". No other
	// replica may have it. Required.
	ID string
	// Address is where the others reach this one: host:port. Required.
	Address string
	// Advertised are addresses under which edges may know this replica. May be empty.
	Advertised []string
	// Version is that of this binary.
	Version string
	// Edges is how many edges are connected to this replica. Nil: none.
	Edges func() int
	// TLS is the configuration with which others are called. Required.
	TLS *tls.Config
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// Registerer takes the metrics. Nil: none.
	Registerer prometheus.Registerer
}

// record is a replica as etcd holds it.
type record struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	// Advertised are other addresses of it.
	Advertised []string  `json:"advertised,omitempty"`
	Version    string    `json:"version,omitempty"`
	StartedAt  time.Time `json:"startedAt"`
	// Boot is random per start of the process.
	Boot string `json:"boot"`
	// Edges is how many edges are connected to it.
	Edges int `json:"edges"`
	// Leaving says that it is about to stop.
	Leaving bool `json:"leaving,omitempty"`
}

// Group is this replica and what it knows of the others.
type Group struct {
	config  Config
	key     string
	metrics *metrics
	ended   chan struct{} // closed when Run has ended

	mu      sync.Mutex
	self    record
	peers   map[string]*peer // by id, without this one
	changed chan struct{}    // closed at the next change of peers
	left    bool             // Leave was called
	wake    chan struct{}    // self has changed
}

// New makes a group of one. It panics when its metrics are on the Registerer
// already.
func New(config Config) *Group {
	if config.Prefix == "" {
		config.Prefix = "/reseal/v1/"
	}
	if config.Edges == nil {
		config.Edges = func() int { return 0 }
	}
	g := &Group{
		config:  config,
		key:     config.Prefix + "replicas/" + config.ID,
		peers:   map[string]*peer{},
		changed: make(chan struct{}),
		ended:   make(chan struct{}),
		wake:    make(chan struct{}, 1),
		self: record{
			ID: config.ID, Address: config.Address, Advertised: config.Advertised, Version: config.Version,
			StartedAt: time.Now().UTC().Truncate(time.Millisecond), Boot: randomID(),
		},
	}
	g.metrics = newMetrics(config.Registerer, g)
	return g
}

// ID is this replica's name.
func (g *Group) ID() string { return g.config.ID }

// Run makes this replica known and follows the others until ctx ends; then it
// withdraws and ends the connections. Trouble with etcd is logged and tried again.
// It may be called once and returns nil.
func (g *Group) Run(ctx context.Context) error {
	defer close(g.ended)
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error { g.follow(inner); return nil })
	group.Go(func() error { g.announce(inner); return nil })
	group.Go(func() error {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				g.forget(time.Now())
			case <-inner.Done():
				return nil
			}
		}
	})
	err := group.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.peers {
		p.close()
	}
	clear(g.peers)
	return err
}

// Leave tells the others that this replica is about to stop, and waits for a
// moment until etcd has it: no edge moves to it from then on.
func (g *Group) Leave(ctx context.Context) {
	g.mu.Lock()
	g.self.Leaving, g.left = true, true
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, farewell)
	defer cancel()
	// Without its lease: the key's stays, or there is none to tell of.
	value := g.value()
	_, err := g.config.Client.Txn(ctx).If(clientv3.Compare(clientv3.Version(g.key), ">", 0)).
		Then(clientv3.OpPut(g.key, value, clientv3.WithIgnoreLease())).Commit()
	if err != nil {
		g.config.Logger.Debug("the other replicas could not be told that this one stops", "error", err)
	}
}

// value is this replica's record, with the number of edges as it is now.
func (g *Group) value() string {
	edges := g.config.Edges()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.self.Edges = edges
	data, err := json.Marshal(g.self)
	if err != nil {
		panic(err) // strings, numbers and a time
	}
	return string(data)
}

// announce keeps this replica's key, until ctx ends.
func (g *Group) announce(ctx context.Context) {
	pause := time.Second
	for ctx.Err() == nil {
		begun := time.Now()
		err := g.term(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) > time.Minute {
			pause = time.Second
		}
		g.config.Logger.Warn("this replica is unknown to the others, trying again", "error", err, "after", pause)
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		pause = min(2*pause, 5*time.Second)
	}
}

// term is the life of one lease.
func (g *Group) term(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, requestTimeout)
	lease, err := g.config.Client.Grant(bounded, leaseTTL)
	cancel()
	if err != nil {
		return err
	}
	defer g.withdraw(context.WithoutCancel(ctx), lease.ID)
	kept, err := g.config.Client.KeepAlive(ctx, lease.ID)
	if err != nil {
		return err
	}
	ticker := time.NewTicker(refreshInterval)
	defer ticker.Stop()
	for told := ""; ; {
		if value := g.value(); value != told {
			bounded, cancel := context.WithTimeout(ctx, requestTimeout)
			_, err := g.config.Client.Put(bounded, g.key, value, clientv3.WithLease(lease.ID))
			cancel()
			if err != nil {
				return err
			}
			told = value
		}
		for again := false; !again; {
			select {
			case _, ok := <-kept:
				if !ok {
					return errLeaseLost
				}
			case <-ticker.C:
				again = true
			case <-g.wake:
				told, again = "", true
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// withdraw says farewell, so that this replica is not looked for, and ends its
// lease.
func (g *Group) withdraw(ctx context.Context, lease clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(ctx, farewell)
	defer cancel()
	g.mu.Lock()
	g.self.Leaving = true
	g.mu.Unlock()
	value := g.value()
	g.mu.Lock()
	g.self.Leaving = g.left // only a lease ends, if Run goes on
	g.mu.Unlock()
	_, err := g.config.Client.Put(ctx, g.key, value, clientv3.WithLease(lease))
	if err == nil {
		_, err = g.config.Client.Revoke(ctx, lease)
	}
	if err != nil {
		g.config.Logger.Debug("this replica's lease ends by itself", "error", err)
	}
}

// follow keeps the peers up to date until ctx ends.
func (g *Group) follow(ctx context.Context) {
	mirror.Follow(ctx, mirror.Config{
		Client:         g.config.Client,
		Prefix:         g.config.Prefix + "replicas/",
		RequestTimeout: requestTimeout,
		Logger:         g.config.Logger,
		Subject:        "the other replicas",
		Load: func(found mirror.Contents) {
			present := map[string]bool{}
			for _, kv := range found.Keys {
				present[g.take(kv)] = true
			}
			for _, id := range g.known() {
				if !present[id] {
					g.lose(id)
				}
			}
		},
		Take: func(events []*clientv3.Event) {
			for _, event := range events {
				if event.Type == clientv3.EventTypeDelete {
					g.lose(strings.TrimPrefix(string(event.Kv.Key), g.config.Prefix+"replicas/"))
				} else {
					g.take(event.Kv)
				}
			}
		},
	})
}

// take enters what a replica says of itself, and returns its id.
func (g *Group) take(kv *mvccpb.KeyValue) string {
	id := strings.TrimPrefix(string(kv.Key), g.config.Prefix+"replicas/")
	var said record
	if err := json.Unmarshal(kv.Value, &said); err != nil || said.ID != id {
		g.config.Logger.Warn("what a replica says of itself can't be read", "replica", id, "error", err)
		return id
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if id == g.config.ID {
		if said.Boot != g.self.Boot && said.StartedAt.After(g.self.StartedAt) {
			g.config.Logger.Error("another replica has this one's name and took its place: give each one of its own (--replica-name)",
				"name", id, "address", said.Address)
		}
		return id
	}
	p := g.peers[id]
	if p != nil && p.said.Address != said.Address {
		p.close()
		p = nil
	}
	if p == nil {
		made, err := newPeer(said, g.config.TLS)
		if err != nil {
			g.config.Logger.Warn("a replica can't be called", "replica", id, "address", said.Address, "error", err)
			return id
		}
		p = made
		g.peers[id] = p
	}
	p.said, p.lost = said, time.Time{}
	g.changedLocked()
	return id
}

// lose notes that a replica's key is gone.
func (g *Group) lose(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[id]
	if p == nil || !p.lost.IsZero() {
		return
	}
	if p.lost = time.Now(); p.said.Leaving {
		g.dropLocked(p) // that was its farewell
	}
	g.changedLocked()
}

// forget drops the replicas that were lost long ago and don't answer.
func (g *Group) forget(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.peers {
		if !p.lost.IsZero() && now.Sub(later(p.lost, p.answered)) > lostFor {
			g.dropLocked(p)
			g.changedLocked()
		}
	}
}

func (g *Group) dropLocked(p *peer) {
	p.close()
	delete(g.peers, p.id)
}

func (g *Group) changedLocked() {
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *Group) known() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Keys(g.peers))
}

// others are the other replicas, sorted by id, and a channel that is closed when
// there are others.
func (g *Group) others() ([]*peer, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var peers []*peer
	for _, id := range slices.Sorted(maps.Keys(g.peers)) {
		peers = append(peers, g.peers[id])
	}
	return peers, g.changed
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
