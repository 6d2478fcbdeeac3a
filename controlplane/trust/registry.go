package trust

import (
	"context"
	"encoding/json"
	"strings"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/reseal/reseal/controlplane/mirror"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// registry is what this replica knows of join tokens, enrolled edges, users and
// revocations, by watch. Edges that come back, and callers that guess, cost the store nothing,
// and edges come back even while the store does not answer. It may lag: for what
// it does not hold the store is asked.
type registry struct {
	mu      sync.RWMutex
	tokens  map[string]storedToken
	edges   map[string]edgeRecord
	users   map[string]userRecord
	revoked map[Identity]revocation
}

func newRegistry() *registry {
	return &registry{
		tokens:  map[string]storedToken{},
		edges:   map[string]edgeRecord{},
		users:   map[string]userRecord{},
		revoked: map[Identity]revocation{},
	}
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

// enrolment is that of a known edge or user.
func (r *registry) enrolment(of Identity) (enrolment string, known bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.enrolmentLocked(of)
}

func (r *registry) enrolmentLocked(of Identity) (string, bool) {
	if of.Role == resealv1.Role_ROLE_EDGE {
		record, known := r.edges[of.Name]
		return record.Enrolment, known
	}
	record, known := r.users[of.Name]
	return record.Enrolment, known && record.Role == of.Role
}

// revocation is the one that concerns a certificate, if there is one: that of an
// enrolment since is good.
func (r *registry) revocation(of Identity, enrolment string) (revocation, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	entry, revoked := r.revoked[of]
	if !revoked {
		return revocation{}, false
	}
	current, known := r.enrolmentLocked(of)
	return entry, !known || current != enrolment
}

// revoke, put and drop tell of what this replica wrote, before the watch does:
// whoever made a token, an edge or a user may use it here at once.
func (r *registry) revoke(of Identity, entry revocation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.revoked[of] = entry
	if of.Role == resealv1.Role_ROLE_EDGE {
		delete(r.edges, of.Name)
	} else {
		delete(r.users, of.Name)
	}
}

func (r *registry) putEdge(id string, record edgeRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.edges[id] = record
}

func (r *registry) putUser(name string, record userRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.users[name] = record
}

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
// store, and say so. It returns whom a key newly revokes, if it does.
func (t *Trust) take(r *registry, kv *mvccpb.KeyValue, removed bool) (revoked Identity, newly bool) {
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
		enter(r.edges, id, kv.Value, removed)
	}
	if name, ok := strings.CutPrefix(key, usersPrefix); ok {
		enter(r.users, name, kv.Value, removed)
	}
	if strings.HasPrefix(key, revokedPrefix) {
		of, entry, ok := t.parseRevocation(kv)
		before, had := r.revoked[of]
		if delete(r.revoked, of); ok && !removed {
			r.revoked[of] = entry
			return of, !had || !before.At.Equal(entry.At)
		}
	}
	return Identity{}, false
}

// enter puts a record that can be read under its name, or removes what is there.
func enter[R any](records map[string]R, name string, value []byte, removed bool) {
	var record R
	delete(records, name)
	if !removed && json.Unmarshal(value, &record) == nil {
		records[name] = record
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
			before := t.registry.replace(fresh)
			t.enforce(newlyRevoked(before, fresh.revoked))
			t.followed.Do(func() { close(t.ready) })
		},
		Take: func(events []*clientv3.Event) {
			var revoked []Identity
			for _, event := range events {
				if of, newly := t.take(t.registry, event.Kv, event.Type == clientv3.EventTypeDelete); newly {
					revoked = append(revoked, of)
				}
			}
			t.enforce(revoked)
		},
	})
}

// replace takes over what another holds, which nobody else knows, and returns the
// revocations that there were before.
func (r *registry) replace(other *registry) map[Identity]revocation {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.revoked
	r.tokens, r.edges, r.users, r.revoked = other.tokens, other.edges, other.users, other.revoked
	return before
}
