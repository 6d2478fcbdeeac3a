package keyring

import (
	"context"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/reseal/reseal/controlplane/mirror"
)

// follow keeps the state up to date until ctx ends. It stands while etcd does not
// answer.
func (s *Server) follow(ctx context.Context) {
	mirror.Follow(ctx, mirror.Config{
		Client:         s.config.Client,
		Prefix:         s.keys.all(),
		Load:           s.load,
		Take:           s.take,
		RequestTimeout: s.config.RequestTimeout,
		Reload:         s.reload,
		Logger:         s.log,
		Subject:        "the keyrings",
	})
}

// load replaces the state by all that etcd holds.
func (s *Server) load(found mirror.Contents) {
	events := make([]*clientv3.Event, len(found.Keys))
	for i, kv := range found.Keys {
		events[i] = &clientv3.Event{Type: mvccpb.Event_PUT, Kv: kv}
	}
	gap := found.Gap
	parsed := s.parse(events)
	st := s.state
	st.mu.Lock()
	if st.loaded && (found.Revision < st.revision || found.Cluster != s.cluster) {
		s.log.Warn("etcd was restored or replaced, edges are asked again what they hold", "revision", found.Revision, "before", st.revision)
		st.era++
		gap = true
	}
	s.cluster = found.Cluster
	if gap {
		st.since = time.Now()
	}
	st.loaded, st.revision = true, found.Revision
	clear(st.records)
	clear(st.covers)
	clear(st.offices)
	for i, event := range events {
		st.take(s.keys, event, parsed[i])
	}
	st.notify(true)
	st.mu.Unlock()
	s.forget()
}

// take brings events of the watch into the state.
func (s *Server) take(events []*clientv3.Event) {
	parsed := s.parse(events)
	s.state.mu.Lock()
	sets := false
	for i, event := range events {
		sets = s.state.take(s.keys, event, parsed[i]) || sets
		s.state.revision = max(s.state.revision, event.Kv.ModRevision)
	}
	s.state.notify(sets)
	s.state.mu.Unlock()
	if sets {
		s.forget()
	}
}

// parse reads the records among events, and their secrets.
func (s *Server) parse(events []*clientv3.Event) []*stored {
	parsed := make([]*stored, len(events))
	for i, event := range events {
		name, ok := nameOf(event.Kv.Key, s.keys.records())
		if ok && event.Type == mvccpb.Event_PUT {
			parsed[i] = s.parseRecord(name, event.Kv)
		}
	}
	return parsed
}

func (s *Server) parseRecord(name string, kv *mvccpb.KeyValue) *stored {
	found := &stored{revision: kv.ModRevision}
	var err error
	if found.record, err = decodeRecord(kv.Value); err == nil {
		err = s.vault.learn(string(kv.Key), found.record)
	}
	if err != nil {
		s.log.Error("keyring can't be read; edges keep the keys that they have", "keyring", name, "error", err)
	}
	found.problem = err
	return found
}

// forget zeroes the secrets that no record holds any more.
func (s *Server) forget() {
	keep := map[string]bool{}
	s.state.mu.Lock()
	for _, found := range s.state.records {
		if found.record == nil {
			continue
		}
		for _, e := range found.Epochs {
			keep[string(e.Sealed)] = true
		}
	}
	s.state.mu.Unlock()
	s.vault.retain(keep)
}

// backoff is a wait that doubles up to a limit, with jitter so that replicas
// don't move in step.
type backoff struct{ next time.Duration }

const (
	firstBackoff = 100 * time.Millisecond
	mostBackoff  = 3 * time.Second
)

func newBackoff() *backoff { return &backoff{firstBackoff} }

func (b *backoff) reset() { b.next = firstBackoff }

// sleep waits, but not beyond the end of ctx.
func (b *backoff) sleep(ctx context.Context) {
	timer := time.NewTimer(b.next/2 + rand.N(b.next/2+1))
	defer timer.Stop()
	b.next = min(2*b.next, mostBackoff)
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
