package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// pageSize bounds the resources of one answer while loading, historyPage the
	// changes, each of which may have close to 10 MiB.
	pageSize    = 500
	historyPage = 16
	// checkInterval is how often a quiet watch is compared with etcd.
	checkInterval = 30 * time.Second
)

// errReload marks what a reload cures at once: it says nothing about etcd being
// in trouble.
var errReload = errors.New("loading again")

// follow loads everything and then follows the watch until that fails or ctx
// ends.
func (s *Store) follow(ctx context.Context) error {
	st, from, err := s.load(ctx)
	if err != nil {
		return err
	}
	if st.sequence == 0 {
		if err := s.bootstrap(ctx); err != nil {
			return err
		}
		if st, from, err = s.load(ctx); err != nil {
			return err
		}
		if st.sequence == 0 {
			return errHeadDeleted
		}
	}
	s.publish(st)
	s.log.Info("loaded the configuration", "revision", st.revision(), "resources", st.snapshot.Len())
	return s.watch(ctx, st, from+1)
}

// load reads everything at one etcd revision, which it returns. Neither a
// change nor a member that lags can tear the result.
func (s *Store) load(ctx context.Context) (*state, int64, error) {
	resp, err := s.get(ctx, s.keys.head())
	if err != nil {
		return nil, 0, fmt.Errorf("read the head: %w", err)
	}
	at := resp.Header.Revision
	st := &state{}
	var revision int64
	if len(resp.Kvs) > 0 {
		head, err := decodeRecord(resp.Kvs[0].Value)
		if err != nil {
			return nil, 0, err
		}
		st.sequence, revision = head.Sequence, resp.Kvs[0].ModRevision
	}
	d := &delta{revision: at}
	for prefix, page := range map[string]int64{s.keys.resources(): pageSize, s.keys.histories(): historyPage} {
		err := s.scan(ctx, prefix, page, at, func(kv *mvccpb.KeyValue) error {
			return s.collect(d, &clientv3.Event{Type: clientv3.EventTypePut, Kv: kv})
		})
		if err != nil {
			return nil, 0, fmt.Errorf("read %s: %w", prefix, err)
		}
	}
	st.snapshot = resealv1.NewSnapshot(fmt.Sprintf("%x", resp.Header.ClusterId), revision, d.upserts)
	// There may be more, from an earlier limit. The next change removes it.
	oldest := s.oldestKept(sizesOf(d.added), st.sequence, 0)
	st.history = slices.DeleteFunc(d.added, func(e entry) bool { return e.sequence < oldest })
	return st, at, nil
}

// scan yields the keys below prefix as they were at an etcd revision, sorted.
func (s *Store) scan(ctx context.Context, prefix string, page, at int64, yield func(*mvccpb.KeyValue) error) error {
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	for {
		resp, err := s.get(ctx, from, clientv3.WithRange(end), clientv3.WithRev(at), clientv3.WithLimit(page))
		if err != nil {
			return err
		}
		for _, kv := range resp.Kvs {
			if err := yield(kv); err != nil {
				return err
			}
		}
		if !resp.More || len(resp.Kvs) == 0 {
			return nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

func (s *Store) get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	return s.client.Get(ctx, key, opts...)
}

// watch follows st from an etcd revision on. It returns when the watch ended:
// etcd compacted what comes next, the member lost its leader, or the data is
// not what it was. The client library itself reconnects where that suffices.
func (s *Store) watch(ctx context.Context, st *state, from int64) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	// One range, so that the keys of a transaction arrive in one answer: head,
	// history and resources, and what others keep between them.
	answers := s.client.Watch(ctx, s.keys.head(),
		clientv3.WithRange(clientv3.GetPrefixRangeEnd(s.keys.resources())),
		clientv3.WithRev(from), clientv3.WithProgressNotify())
	ticker := time.NewTicker(checkInterval)
	defer ticker.Stop()
	check := &quietCheck{cluster: st.snapshot.ClusterID()}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case answer, ok := <-answers:
			if !ok {
				return errors.New("the watch ended")
			}
			var err error
			if st, err = s.handle(st, answer); err != nil {
				return err
			}
		case <-ticker.C:
			if err := s.check(ctx, check, st); err != nil {
				return err
			}
		}
	}
}

// handle publishes what an answer of the watch leads to. etcd never spreads a
// revision over two answers.
func (s *Store) handle(st *state, answer clientv3.WatchResponse) (*state, error) {
	if answer.CompactRevision > 0 {
		return st, fmt.Errorf("%w: etcd was compacted at %d", errReload, answer.CompactRevision)
	}
	if err := answer.Err(); err != nil {
		return st, fmt.Errorf("watch: %w", err)
	}
	for events := answer.Events; len(events) > 0; {
		revision, n := events[0].Kv.ModRevision, 1
		for n < len(events) && events[n].Kv.ModRevision == revision {
			n++
		}
		next, err := s.advance(st, revision, events[:n])
		if err != nil {
			return st, err
		}
		if next.revision() > st.revision() {
			s.publish(next)
		}
		st, events = next, events[n:]
	}
	return st, nil
}

// quietCheck remembers what the last check of the watch saw.
type quietCheck struct {
	cluster string
	behind  int64 // a revision that the watch had not reached
}

// check compares the state with etcd. A watch that reconnects to a restored or
// replaced etcd waits for a revision that is far off and says nothing.
func (s *Store) check(ctx context.Context, last *quietCheck, st *state) error {
	resp, err := s.get(ctx, s.keys.head())
	if err != nil {
		s.log.Warn("etcd does not answer; the configuration stays as it is", "error", err)
		return nil //nolint:nilerr // a reload would not get further
	}
	var revision int64
	if len(resp.Kvs) > 0 {
		revision = resp.Kvs[0].ModRevision
	}
	switch cluster := fmt.Sprintf("%x", resp.Header.ClusterId); {
	case cluster != last.cluster:
		return fmt.Errorf("%w: this is another etcd cluster, %s instead of %s", errReload, cluster, last.cluster)
	case revision < st.revision():
		return fmt.Errorf("%w: etcd went back to revision %d", errReload, revision)
	case last.behind > st.revision():
		return fmt.Errorf("%w: the watch is stuck, etcd is at revision %d", errReload, revision)
	}
	last.behind = revision
	return nil
}
