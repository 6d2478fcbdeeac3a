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
	all := s.parse(events)
	st := s.state
	st.mu.Lock()
	restored := st.loaded && (found.Revision < st.revision || found.Cluster != st.cluster)
	if restored {
		s.log.Warn("etcd was restored or replaced, edges are asked again what they hold", "revision", found.Revision, "before", st.revision)
		st.era++
		st.ledger = newLedger(st.ledger.self)
	}
	st.cluster, st.revision, st.newest = found.Cluster, found.Revision, 0
	clear(st.records)
	clear(st.offices)
	superseded := st.ledger.replace(all, events)
	for i, event := range events {
		if all[i].news == nil {
			st.take(s.keys, event, all[i])
		}
	}
	if restored || found.Gap {
		// Where no keyring has ever been, no edge has keys.
		fresh := !st.loaded && len(st.records) == 0
		st.since, st.inherited = time.Now(), fresh || !restored && st.ledger.complete(found.Cluster)
	}
	if !st.loaded {
		st.loaded = true
		close(st.known)
	}
	st.notify(true)
	st.mu.Unlock()
	if restored {
		s.roster.forget()
	}
	s.roster.lose(superseded)
	s.roster.nudge()
	s.forget()
}

// take brings events of the watch into the state.
func (s *Server) take(events []*clientv3.Event) {
	all := s.parse(events)
	s.state.mu.Lock()
	sets := false
	var superseded []stream
	for i, event := range events {
		concerned, lost := s.state.take(s.keys, event, all[i])
		sets, superseded = sets || concerned, append(superseded, lost...)
		s.state.revision = max(s.state.revision, event.Kv.ModRevision)
	}
	ended := s.state.ledger.ended()
	s.state.notify(sets)
	s.state.mu.Unlock()
	s.roster.lose(superseded)
	if ended {
		s.roster.contradict()
	}
	if sets {
		s.roster.nudge() // the head tells what is known
		s.forget()
	}
}

// parsed is what an event says: a record, a part of a digest, or neither.
type parsed struct {
	*stored
	news *news
}

// parse reads the records among events, with their secrets, and the digests.
func (s *Server) parse(events []*clientv3.Event) []parsed {
	all := make([]parsed, len(events))
	for i, event := range events {
		if event.Type != mvccpb.Event_PUT {
			continue
		}
		if name, ok := nameOf(event.Kv.Key, s.keys.records()); ok {
			all[i].stored = s.parseRecord(name, event.Kv)
		} else if name, ok := nameOf(event.Kv.Key, s.keys.covers()); ok {
			all[i].news = s.parseNews(name, event.Kv.Value)
		}
	}
	return all
}

// parseNews is nil for what is no digest.
func (s *Server) parseNews(name string, value []byte) *news {
	n, ok, err := readNews(name, value)
	if err != nil {
		s.log.Error("what a replica tells of its edges can't be read", "replica", n.replica, "error", err)
	}
	if !ok {
		return nil
	}
	return &n
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
