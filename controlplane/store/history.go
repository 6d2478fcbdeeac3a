package store

import (
	"context"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxReported bounds the resources in one ListRevisions answer, so that it
// stays below the 4 MiB that gRPC clients take by default.
const maxReported = 3 << 20

// At is the configuration as it was at a kept revision, metadata included,
// with secrets sealed. It fails with ErrNotKept for any other revision. It
// needs no etcd.
func (s *Store) At(ctx context.Context, revision int64) (*resealv1.Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := s.published.Load()
	if revision == p.state.revision() {
		return p.state.snapshot, nil
	}
	if p.state.kept(revision) {
		for _, snapshot := range p.recent {
			if snapshot.Revision() == revision {
				return snapshot, nil
			}
		}
	}
	past, err := p.state.rewind(revision)
	if err != nil {
		return nil, err
	}
	return past.snapshot(p.state.snapshot.ClusterID()), nil
}

func (st *state) kept(revision int64) bool {
	return slices.ContainsFunc(st.history, func(e entry) bool { return e.revision == revision })
}

// past is a state that is being rewound.
type past struct {
	revision  int64
	resources map[string]*resealv1.Resource // by "Kind/name"
	// generations are the highest generations, by uid, that were met on the
	// way, those of resources that no longer exist included.
	generations map[string]int64
}

// rewind goes back to a kept revision, one change after the other.
func (st *state) rewind(revision int64) (*past, error) {
	if !st.kept(revision) {
		return nil, st.notKept(revision)
	}
	p := &past{revision: revision, resources: map[string]*resealv1.Resource{}, generations: map[string]int64{}}
	for _, resource := range st.snapshot.All() {
		p.set(resource.Ref().Key(), resource)
	}
	next := st.sequence
	for _, entry := range slices.Backward(st.history) {
		if entry.revision <= revision {
			break
		}
		if entry.sequence != next {
			return nil, fmt.Errorf("%w: %d; the history has a gap at change %d", ErrNotKept, revision, next)
		}
		next--
		r, err := decodeRecord(entry.value)
		if err != nil {
			return nil, fmt.Errorf("revision %d: %w", entry.revision, err)
		}
		for _, u := range r.Undo {
			before, err := u.resource()
			if err != nil {
				return nil, fmt.Errorf("revision %d: %w", entry.revision, err)
			}
			p.set(u.ref().Key(), before)
		}
	}
	return p, nil
}

func (p *past) set(key string, resource *resealv1.Resource) {
	if resource == nil {
		delete(p.resources, key)
		return
	}
	p.resources[key] = resource
	m := resource.GetMetadata()
	p.generations[m.GetUid()] = max(p.generations[m.GetUid()], m.GetGeneration())
}

func (p *past) snapshot(clusterID string) *resealv1.Snapshot {
	resources := make([]*resealv1.Resource, 0, len(p.resources))
	for _, resource := range p.resources {
		resources = append(resources, resource)
	}
	return resealv1.NewSnapshot(clusterID, p.revision, resources)
}

// notKept says which revisions are.
func (st *state) notKept(revision int64) error {
	if len(st.history) == 0 {
		return fmt.Errorf("%w: %d; the history is empty", ErrNotKept, revision)
	}
	return fmt.Errorf("%w: %d; there are %d kept revisions from %d to %d",
		ErrNotKept, revision, len(st.history), st.history[0].revision, st.revision())
}

// Revisions lists the kept revisions, newest first. When their changes are
// large, those of older ones come without the resources before and after; ask
// for such a revision alone to see them. Asking for one that is not kept is
// ErrNotKept. It needs no etcd.
func (s *Store) Revisions(ctx context.Context, req *resealv1.ListRevisionsRequest) (*resealv1.ListRevisionsResponse, error) {
	st := s.published.Load().state
	if req.GetRevision() != 0 && !st.kept(req.GetRevision()) {
		return nil, st.notKept(req.GetRevision())
	}
	resp := &resealv1.ListRevisionsResponse{}
	later := map[string]*resealv1.Resource{} // what older changes led to
	size := 0
	for _, entry := range slices.Backward(st.history) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		revision, err := s.describe(st, entry, later)
		if err != nil {
			return nil, fmt.Errorf("revision %d: %w", entry.revision, err)
		}
		if req.GetRevision() != 0 && req.GetRevision() != entry.revision {
			continue
		}
		if size += proto.Size(revision); size > maxReported && len(resp.Revisions) > 0 {
			for _, c := range revision.Changes {
				c.Before, c.After = nil, nil
			}
		}
		resp.Revisions = append(resp.Revisions, revision)
		if req.GetRevision() != 0 || int(req.GetLimit()) == len(resp.Revisions) {
			break
		}
	}
	return resp, nil
}

// Origin says how a kept revision was made: its number in the history, from 1, by whom,
// and whether with ApplyRequest.now. The number is 0 when it is not kept.
func (s *Store) Origin(revision int64) (change int64, by string, now bool) {
	for _, entry := range slices.Backward(s.published.Load().state.history) {
		if entry.revision != revision {
			continue
		}
		r, err := decodeRecord(entry.value)
		if err != nil {
			return 0, "", false
		}
		return entry.sequence, r.Author, r.Now
	}
	return 0, "", false
}

// RevisionOf is the revision of a number in the history, 0 when it is not kept.
func (s *Store) RevisionOf(change int64) int64 {
	for _, entry := range s.published.Load().state.history {
		if entry.sequence == change {
			return entry.revision
		}
	}
	return 0
}

// describe is an entry of the history as callers see it. later holds, and is
// given, the resources that differ from the newest state.
func (s *Store) describe(st *state, e entry, later map[string]*resealv1.Resource) (*resealv1.Revision, error) {
	r, err := decodeRecord(e.value)
	if err != nil {
		return nil, err
	}
	changes := make([]change, len(r.Undo))
	for i, u := range r.Undo {
		before, err := u.resource()
		if err != nil {
			return nil, err
		}
		after, known := later[u.ref().Key()]
		if !known {
			after = st.snapshot.Get(u.Kind, u.Name)
		}
		later[u.ref().Key()] = before
		changes[i] = change{ref: u.ref(), action: actionOf(before, after), before: before, after: after}
	}
	return &resealv1.Revision{
		Revision: e.revision, Author: r.Author, Message: r.Message, Time: timestamppb.New(r.Time),
		Changes: s.report(changes), RolledBackTo: r.RolledBackTo, LargeChangeAllowed: r.LargeAllowed, Now: r.Now,
	}, nil
}

func actionOf(before, after *resealv1.Resource) resealv1.Change_Action {
	switch {
	case before == nil:
		return resealv1.Change_ACTION_CREATED
	case after == nil:
		return resealv1.Change_ACTION_DELETED
	}
	return resealv1.Change_ACTION_CONFIGURED
}
