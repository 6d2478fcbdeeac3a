package store

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// state is all that the store holds at one revision. It is immutable.
type state struct {
	snapshot *resealv1.Snapshot
	sequence int64   // of the newest change; 0 when there was none
	history  []entry // the kept changes, oldest first
}

// entry is a kept change. The value, a record, is decoded only when needed.
type entry struct {
	sequence int64
	revision int64
	value    []byte
}

// kept is what an entry costs.
type kept struct {
	sequence int64
	bytes    int
}

func sizesOf(history []entry) []kept {
	sizes := make([]kept, len(history))
	for i, e := range history {
		sizes[i] = kept{e.sequence, len(e.value)}
	}
	return sizes
}

func (st *state) revision() int64 { return st.snapshot.Revision() }

// errHeadDeleted means that somebody removed the head key.
var errHeadDeleted = errors.New("the head key was deleted")

// delta collects the events of one etcd revision.
type delta struct {
	revision int64
	head     *record
	upserts  []*resealv1.Resource
	deletes  []*resealv1.ResourceRef
	added    []entry
	removed  []int64 // sequences
}

// advance is the state that the events of one etcd revision lead to. It is st
// itself when none of them are the store's.
func (s *Store) advance(st *state, revision int64, events []*clientv3.Event) (*state, error) {
	d := &delta{revision: revision}
	for _, event := range events {
		if err := s.collect(d, event); err != nil {
			return nil, err
		}
	}
	changed := len(d.upserts)+len(d.deletes) > 0
	switch {
	case d.head == nil && !changed:
		return st, nil
	case d.head == nil:
		// Whoever wrote past the head key left no revision. What they wrote
		// becomes visible with the next change, as it would with a reload.
		s.log.Error("resources were changed in etcd without the store; the history can't tell",
			"etcd_revision", revision, "upserts", len(d.upserts), "deletes", len(d.deletes))
		return &state{
			snapshot: st.snapshot.With(st.revision(), d.upserts, d.deletes),
			sequence: st.sequence, history: st.history,
		}, nil
	}
	history := slices.DeleteFunc(slices.Clone(st.history), func(e entry) bool { return slices.Contains(d.removed, e.sequence) })
	return &state{
		snapshot: st.snapshot.With(revision, d.upserts, d.deletes),
		sequence: d.head.Sequence,
		history:  append(history, d.added...),
	}, nil
}

// collect adds an event to d. Keys of others below the prefix are ignored.
func (s *Store) collect(d *delta, event *clientv3.Event) error {
	key := string(event.Kv.Key)
	deleted := event.Type == clientv3.EventTypeDelete
	switch {
	case key == s.keys.head() && deleted:
		return errHeadDeleted
	case key == s.keys.head():
		head, err := decodeRecord(event.Kv.Value)
		d.head = head
		return err
	case strings.HasPrefix(key, s.keys.histories()):
		sequence, err := s.keys.sequence(key)
		if err != nil {
			return fmt.Errorf("damaged key %q: %w", key, err)
		}
		if deleted {
			d.removed = append(d.removed, sequence)
		} else {
			d.added = append(d.added, entry{sequence: sequence, revision: event.Kv.ModRevision, value: event.Kv.Value})
		}
	case strings.HasPrefix(key, s.keys.resources()):
		return s.collectResource(d, strings.TrimPrefix(key, s.keys.resources()), deleted, event)
	}
	return nil
}

func (s *Store) collectResource(d *delta, key string, deleted bool, event *clientv3.Event) error {
	if deleted {
		kind, name, _ := strings.Cut(key, "/")
		d.deletes = append(d.deletes, &resealv1.ResourceRef{Kind: kind, Name: name})
		return nil
	}
	resource, err := decodeResource(key, event.Kv.Value, event.Kv.ModRevision)
	if errors.Is(err, errUnknownKind) {
		s.log.Warn("ignored a resource", "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	d.upserts = append(d.upserts, resource)
	return nil
}
