// Package intent keeps what operators want of single edges, in etcd: it stands over
// restarts, and is the same for every replica.
//
// Keys in etcd, below Config.Prefix:
//
//	intent/drain/<edge>  the edge is to be out of service
package intent

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/controlplane/mirror"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// requestTimeout bounds one request to etcd.
const requestTimeout = 5 * time.Second

// Config is what a Store needs. It is read once, by New.
type Config struct {
	// Client is the connection to etcd. Required. It is not closed.
	Client *clientv3.Client
	// Prefix of all keys in etcd. Default "/reseal/v1/".
	Prefix string
	// Changed is called when what is wanted of an edge has changed, or may have. It
	// must not block. Required.
	Changed func(edge string)
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
}

// Drain is an order to take an edge out of service.
type Drain struct {
	// Timeout is how long clients may take. 0: each listener's own.
	Timeout time.Duration `json:"timeout,omitempty"`
	// By is who ordered it, and At when.
	By string    `json:"by,omitempty"`
	At time.Time `json:"at"`
}

// held is an order as etcd has it.
type held struct {
	drain    *Drain // nil: removed, which older news must not undo
	revision int64  // of its last write
}

// Store is what one replica knows of all orders. Its methods may be called
// concurrently.
type Store struct {
	config Config
	prefix string // of the drain orders

	cluster uint64 // the etcd cluster that was loaded; belongs to Run

	mu     sync.Mutex
	drains map[string]held // by edge
}

// New makes a store that is empty before Run.
func New(config Config) *Store {
	if config.Prefix == "" {
		config.Prefix = "/reseal/v1/"
	}
	return &Store{config: config, prefix: config.Prefix + "intent/drain/", drains: map[string]held{}}
}

// Run follows etcd until ctx ends. It returns nil.
func (s *Store) Run(ctx context.Context) error {
	mirror.Follow(ctx, mirror.Config{
		Client:         s.config.Client,
		Prefix:         s.prefix,
		RequestTimeout: requestTimeout,
		Logger:         s.config.Logger,
		Subject:        "the orders for edges",
		Load:           s.load,
		Take: func(events []*clientv3.Event) {
			for _, event := range events {
				s.take(event.Kv, event.Type == clientv3.EventTypeDelete)
			}
		},
	})
	return nil
}

func (s *Store) load(found mirror.Contents) {
	if s.cluster != 0 && s.cluster != found.Cluster {
		s.startAnew()
	}
	s.cluster = found.Cluster
	present := map[string]bool{}
	for _, kv := range found.Keys {
		present[s.take(kv, false)] = true
	}
	s.mu.Lock()
	known := maps.Clone(s.drains)
	s.mu.Unlock()
	for edge, was := range known {
		if was.revision > found.Revision || present[edge] {
			continue // newer ones were written here meanwhile
		}
		s.set(edge, nil, found.Revision)
		s.mu.Lock()
		if s.drains[edge].drain == nil && s.drains[edge].revision <= found.Revision {
			delete(s.drains, edge)
		}
		s.mu.Unlock()
	}
}

// startAnew forgets revisions, which mean nothing in another cluster.
func (s *Store) startAnew() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for edge, was := range s.drains {
		s.drains[edge] = held{was.drain, 0}
	}
}

// take enters a key and returns its edge.
func (s *Store) take(kv *mvccpb.KeyValue, removed bool) string {
	edge := strings.TrimPrefix(string(kv.Key), s.prefix)
	if removed {
		s.set(edge, nil, kv.ModRevision)
		return edge
	}
	var drain Drain
	if err := json.Unmarshal(kv.Value, &drain); err != nil {
		s.config.Logger.Warn("an order for an edge can't be read", "edge", edge, "error", err)
		return edge
	}
	s.set(edge, &drain, kv.ModRevision)
	return edge
}

// set notes the order of a revision, nil for none, unless a newer one is known.
func (s *Store) set(edge string, drain *Drain, revision int64) {
	s.mu.Lock()
	before, known := s.drains[edge]
	if known && before.revision >= revision {
		s.mu.Unlock()
		return
	}
	s.drains[edge] = held{drain, revision}
	s.mu.Unlock()
	if before.drain != nil || drain != nil {
		s.config.Changed(edge)
	}
}

// Drained is the order to drain an edge, nil when there is none.
func (s *Store) Drained(edge string) *resealv1.Drain {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := s.drains[edge]
	if found.drain == nil {
		return nil
	}
	order := &resealv1.Drain{Drain: true}
	if found.drain.Timeout > 0 {
		order.Timeout = durationpb.New(found.drain.Timeout)
	}
	return order
}

// Drain takes an edge out of service until Undrain.
func (s *Store) Drain(ctx context.Context, edge string, drain Drain) error {
	data, err := json.Marshal(drain)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := s.config.Client.Put(ctx, s.prefix+edge, string(data))
	if err != nil {
		return fmt.Errorf("write the order: %w", err)
	}
	s.set(edge, &drain, answer.Header.Revision)
	return nil
}

// Undrain puts an edge back into service. It is no error if it is.
func (s *Store) Undrain(ctx context.Context, edge string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := s.config.Client.Delete(ctx, s.prefix+edge)
	if err != nil {
		return fmt.Errorf("remove the order: %w", err)
	}
	s.set(edge, nil, answer.Header.Revision)
	return nil
}
