package store

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Rollback makes the resources what they were at a kept revision, as a new
// revision. Secrets come back, too. A resource that was deleted meanwhile gets
// back its uid; generations only grow. Its errors are those of Apply, and
// ErrNotKept.
func (s *Store) Rollback(ctx context.Context, author string, req *resealv1.RollbackRequest) (*resealv1.RollbackResponse, error) {
	revision, p, err := s.mutate(ctx, mutation{
		author: author, message: req.GetMessage(), expected: req.GetExpectedRevision(), dryRun: req.GetDryRun(), now: req.GetNow(),
		allowLarge: req.GetAllowLargeChange(),
		plan:       func(st *state) (*plan, error) { return s.planRollback(st, req.GetToRevision()) },
	})
	if err != nil {
		return nil, err
	}
	return &resealv1.RollbackResponse{
		Revision: revision, Changes: s.report(p.effective()), RolledBackTo: p.rolledBackTo, LargeChange: p.large,
	}, nil
}

func (s *Store) planRollback(st *state, to int64) (*plan, error) {
	if to == 0 {
		if len(st.history) < 2 {
			return nil, fmt.Errorf("%w: there is none before the current one", ErrNotKept)
		}
		to = st.history[len(st.history)-2].revision
	}
	target, err := st.rewind(to)
	if err != nil {
		return nil, err
	}
	p, now := &plan{rolledBackTo: to}, timestamppb.Now()
	for _, key := range slices.Sorted(maps.Keys(target.resources)) {
		wanted := target.resources[key]
		before := st.snapshot.Get(wanted.Kind(), wanted.Ref().GetName())
		c, err := s.restore(before, wanted, target.generations, now)
		if err != nil {
			return nil, err
		}
		p.changes = append(p.changes, c)
	}
	for _, resource := range st.snapshot.All() {
		if target.resources[resource.Ref().Key()] == nil {
			p.changes = append(p.changes, change{ref: resource.Ref(), action: resealv1.Change_ACTION_DELETED, before: resource})
		}
	}
	return p, nil
}

// restore is the change from before, which may be nil, back to wanted.
func (s *Store) restore(before, wanted *resealv1.Resource, generations map[string]int64, now *timestamppb.Timestamp) (change, error) {
	after := proto.CloneOf(wanted)
	if err := s.sealAll(after, before); err != nil {
		return change{}, err
	}
	m := after.GetMetadata()
	m.Revision = 0
	if before.GetMetadata().GetUid() == m.GetUid() {
		return replace(after.Ref(), before, after, now), nil
	}
	c := change{ref: after.Ref(), action: actionOf(before, after), before: before, after: after}
	m.Generation, m.UpdatedAt = generations[m.GetUid()]+1, now
	return c, nil
}
