package keyring

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// pageSize bounds the keys of one answer while loading.
	pageSize = 500
	// reloadInterval is how often everything is read anew: a watch that
	// reconnects to a restored etcd waits for a revision that is far off and
	// says nothing.
	reloadInterval = 30 * time.Second
)

// follow keeps the state up to date until ctx ends. When etcd fails, that is
// logged and tried again; the state stands meanwhile.
func (s *Server) follow(ctx context.Context) error {
	wait := newBackoff()
	gap := true
	for {
		err := s.pass(ctx, gap)
		if ctx.Err() != nil {
			return nil
		}
		if gap = err != nil; gap {
			s.log.Warn("lost track of the keyrings in etcd, loading again", "error", err)
			wait.sleep(ctx)
			continue
		}
		wait.reset()
	}
}

// pass loads everything and follows the watch for some time. A gap says that
// events may have been missed for longer than a load takes.
func (s *Server) pass(ctx context.Context, gap bool) error {
	revision, err := s.load(ctx, gap)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	// One range, so that events of all keys come in the order of revisions.
	answers := s.config.Client.Watch(ctx, s.keys.all(), clientv3.WithPrefix(), clientv3.WithRev(revision+1))
	reload := time.NewTimer(s.reload)
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
			s.take(answer.Events)
		}
	}
}

// load reads everything at one etcd revision, which it returns.
func (s *Server) load(ctx context.Context, gap bool) (int64, error) {
	var events []*clientv3.Event
	var header struct {
		revision int64
		cluster  uint64
	}
	from, end := s.keys.all(), clientv3.GetPrefixRangeEnd(s.keys.all())
	for more := true; more; {
		page, cancel := context.WithTimeout(ctx, s.config.RequestTimeout)
		answer, err := s.config.Client.Get(page, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(header.revision))
		cancel()
		if err != nil {
			return 0, fmt.Errorf("read the keyrings: %w", err)
		}
		if header.revision == 0 {
			header.revision, header.cluster = answer.Header.Revision, answer.Header.ClusterId
		}
		for _, kv := range answer.Kvs {
			events = append(events, &clientv3.Event{Type: mvccpb.Event_PUT, Kv: kv})
			from = string(kv.Key) + "\x00"
		}
		more = answer.More && len(answer.Kvs) > 0
	}
	parsed := s.parse(events)
	st := s.state
	st.mu.Lock()
	if st.loaded && (header.revision < st.revision || header.cluster != s.cluster) {
		s.log.Warn("etcd was restored or replaced, edges are asked again what they hold", "revision", header.revision, "before", st.revision)
		st.era++
		gap = true
	}
	s.cluster = header.cluster
	if gap {
		st.since = time.Now()
	}
	st.loaded, st.revision = true, header.revision
	clear(st.records)
	clear(st.covers)
	clear(st.offices)
	for i, event := range events {
		st.take(s.keys, event, parsed[i])
	}
	st.notify(true)
	st.mu.Unlock()
	s.forget()
	return header.revision, nil
}

// take brings events of the watch into the state.
func (s *Server) take(events []*clientv3.Event) {
	if len(events) == 0 {
		return
	}
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
