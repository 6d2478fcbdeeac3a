package trust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// reloadInterval is how often the registry is read anew: a watch that reconnects
// to a restored store waits for a revision that is far off and says nothing.
const reloadInterval = 30 * time.Second

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
	delay := 100 * time.Millisecond
	for ctx.Err() == nil {
		err := t.pass(ctx)
		if err == nil || ctx.Err() != nil {
			delay = 100 * time.Millisecond
			continue
		}
		t.logger.Warn("lost track of the enrolled edges, loading again", "error", err)
		timer := time.NewTimer(delay/2 + rand.N(delay/2))
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		delay = min(2*delay, 3*time.Second)
	}
}

// pass loads everything and follows the watch for some time.
func (t *Trust) pass(ctx context.Context) error {
	revision, err := t.load(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	answers := t.client.Watch(ctx, t.prefix+"trust/", clientv3.WithPrefix(), clientv3.WithRev(revision+1))
	reload := time.NewTimer(reloadInterval)
	defer reload.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reload.C:
			return nil
		case answer, ok := <-answers:
			if !ok {
				return errors.New("the watch ended")
			}
			if err := answer.Err(); err != nil {
				return fmt.Errorf("watch: %w", err)
			}
			for _, event := range answer.Events {
				t.take(t.registry, event.Kv, event.Type == clientv3.EventTypeDelete)
			}
		}
	}
}

// load reads everything at one revision of the store, which it returns.
func (t *Trust) load(ctx context.Context) (int64, error) {
	fresh := newRegistry()
	var revision int64
	for _, prefix := range []string{t.prefix + tokensPrefix, t.prefix + edgesPrefix} {
		from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
		for more := true; more; {
			bounded, cancel := context.WithTimeout(ctx, storeTimeout)
			answer, err := t.client.Get(bounded, from, clientv3.WithRange(end), clientv3.WithLimit(1000), clientv3.WithRev(revision))
			cancel()
			if err != nil {
				return 0, err
			}
			if revision == 0 {
				revision = answer.Header.Revision
			}
			for _, kv := range answer.Kvs {
				t.take(fresh, kv, false)
				from = string(kv.Key) + "\x00"
			}
			more = answer.More && len(answer.Kvs) > 0
		}
	}
	t.registry.mu.Lock()
	defer t.registry.mu.Unlock()
	t.registry.tokens, t.registry.edges = maps.Clone(fresh.tokens), maps.Clone(fresh.edges)
	return revision, nil
}
