package trust

import (
	"context"
	"encoding/json"
	"strings"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/reseal/reseal/controlplane/mirror"
)

// registry is what this replica knows of join tokens and enrolled edges, by
// watch. Edges that come back, and callers that guess, cost the store nothing,
// and edges come back even while the store does not answer. It may lag: for what
// it does not hold the store is asked.
type registry struct {
	mu     sync.RWMutex
	tokens map[string]storedToken
	edges  map[string]edgeRecord
}

func newRegistry() *registry {
	return &registry{tokens: map[string]storedToken{}, edges: map[string]edgeRecord{}}
}

func (r *registry) token(id string) (storedToken, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	token, ok := r.tokens[id]
	return token, ok
}

func (r *registry) edge(id string) (edgeRecord, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	record, ok := r.edges[id]
	return record, ok
}

// put and drop tell of what this replica wrote, before the watch does: whoever made
// a token may use it here at once.
func (r *registry) put(token storedToken) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tokens[token.id] = token
}

func (r *registry) drop(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.tokens, id)
}

// take enters or removes a key. What can't be read is left to those who ask the
// store, and say so.
func (t *Trust) take(r *registry, kv *mvccpb.KeyValue, removed bool) {
	key := strings.TrimPrefix(string(kv.Key), t.prefix)
	r.mu.Lock()
	defer r.mu.Unlock()
	if id, ok := strings.CutPrefix(key, tokensPrefix); ok {
		delete(r.tokens, id)
		if token, err := t.parseToken(kv); err == nil && !removed {
			r.tokens[id] = token
		}
	}
	if id, ok := strings.CutPrefix(key, edgesPrefix); ok {
		var record edgeRecord
		delete(r.edges, id)
		if !removed && json.Unmarshal(kv.Value, &record) == nil {
			r.edges[id] = record
		}
	}
}

// follow keeps the registry up to date until ctx ends. It stands while the store
// does not answer.
func (t *Trust) follow(ctx context.Context) {
	mirror.Follow(ctx, mirror.Config{
		Client:         t.client,
		Prefix:         t.prefix + "trust/",
		RequestTimeout: storeTimeout,
		Logger:         t.logger,
		Subject:        "the enrolled edges",
		Load: func(found mirror.Contents) {
			fresh := newRegistry()
			for _, kv := range found.Keys {
				t.take(fresh, kv, false)
			}
			t.registry.replace(fresh)
		},
		Take: func(events []*clientv3.Event) {
			for _, event := range events {
				t.take(t.registry, event.Kv, event.Type == clientv3.EventTypeDelete)
			}
		},
	})
}

// replace takes over what another holds, which nobody else knows.
func (r *registry) replace(other *registry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tokens, r.edges = other.tokens, other.edges
}
