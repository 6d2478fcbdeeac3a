package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Apply creates and replaces resources, all of them in one revision or none.
// When every resource is already as wanted there is no new revision. Its
// errors are *resealv1.ViolationsError, *ConflictError, ErrTooLarge, ErrLargeChange,
// ErrUnavailable or the error of ctx.
//
// The server-assigned metadata of the resources is ignored. A Certificate without
// a private key keeps the stored one while its certificatePem is unchanged. What is
// wrong with stored resources that it leaves as they are is a warning.
func (s *Store) Apply(ctx context.Context, author string, req *resealv1.ApplyRequest) (*resealv1.ApplyResponse, error) {
	revision, p, err := s.mutate(ctx, mutation{
		author: author, message: req.GetMessage(), expected: req.GetExpectedRevision(), dryRun: req.GetDryRun(), now: req.GetNow(),
		allowLarge: req.GetAllowLargeChange(),
		plan:       func(st *state) (*plan, error) { return s.planApply(st, req.GetResources()) },
	})
	if err != nil {
		return nil, err
	}
	return &resealv1.ApplyResponse{Revision: revision, Changes: s.report(p.changes), Warnings: p.warnings, LargeChange: p.large}, nil
}

// Delete removes resources, all of them in one revision or none. Its errors
// are those of Apply, and ErrNotFound when one does not exist.
func (s *Store) Delete(ctx context.Context, author string, req *resealv1.DeleteRequest) (*resealv1.DeleteResponse, error) {
	revision, p, err := s.mutate(ctx, mutation{
		author: author, message: req.GetMessage(), expected: req.GetExpectedRevision(), dryRun: req.GetDryRun(), now: req.GetNow(),
		allowLarge: req.GetAllowLargeChange(), shrinks: true,
		plan: func(st *state) (*plan, error) { return planDelete(st, req.GetResources()) },
	})
	if err != nil {
		return nil, err
	}
	return &resealv1.DeleteResponse{Revision: revision, Changes: s.report(p.changes), LargeChange: p.large}, nil
}

// Candidate is the configuration that an Apply would lead to, secrets sealed. Nothing
// changes. Its errors are those of Apply.
func (s *Store) Candidate(ctx context.Context, req *resealv1.ApplyRequest) (*resealv1.Snapshot, error) {
	_, p, err := s.mutate(ctx, mutation{
		expected: req.GetExpectedRevision(), dryRun: true, edges: &[]map[string]string{},
		plan: func(st *state) (*plan, error) { return s.planApply(st, req.GetResources()) },
	})
	switch {
	case err != nil:
		return nil, err
	case p.after == nil: // nothing would change
		return s.Snapshot(), nil
	}
	return p.after, nil
}

func (s *Store) planApply(st *state, wanted []*resealv1.Resource) (*plan, error) {
	p, violations := &plan{}, []*resealv1.Violation(nil)
	now, named := timestamppb.Now(), map[string]bool{}
	for _, resource := range wanted {
		ref := resource.Ref()
		if violation := checkRef(ref, named); violation != nil {
			violations = append(violations, violation)
			continue
		}
		before := st.snapshot.Get(ref.GetKind(), ref.GetName())
		after, found, err := s.prepare(resource, before)
		if err != nil {
			return nil, err
		}
		violations = append(violations, found...)
		p.changes = append(p.changes, replace(ref, before, after, now))
	}
	if len(violations) > 0 {
		return nil, &resealv1.ViolationsError{Violations: violations}
	}
	return p, nil
}

// checkRef refuses what can't be a key, and what is named a second time.
func checkRef(ref *resealv1.ResourceRef, named map[string]bool) *resealv1.Violation {
	description, field := "", ""
	switch {
	case !slices.Contains(resealv1.Kinds, ref.GetKind()):
		description = "the kind is not one of " + strings.Join(resealv1.Kinds, ", ")
	case ref.GetName() == "" || strings.Contains(ref.GetName(), "/"):
		description, field = "a name is needed, without \"/\"", "metadata.name"
	case named[ref.Key()]:
		description = "the request names it twice"
	default:
		named[ref.Key()] = true
		return nil
	}
	return &resealv1.Violation{Resource: ref, Field: field, Description: description}
}

// prepare is what is stored of a wanted resource: without server-assigned
// metadata, secrets sealed.
func (s *Store) prepare(wanted, before *resealv1.Resource) (*resealv1.Resource, []*resealv1.Violation, error) {
	violations := s.checkSecrets(wanted)
	after := proto.CloneOf(wanted)
	after.Metadata = &resealv1.Metadata{
		Name:        after.GetMetadata().GetName(),
		Labels:      after.GetMetadata().GetLabels(),
		Annotations: after.GetMetadata().GetAnnotations(),
	}
	if violation := carryKey(after, before); violation != nil {
		violations = append(violations, violation)
	}
	if len(violations) > 0 {
		return after, violations, nil
	}
	return after, nil, s.sealAll(after, before)
}

// replace is the change from before, which may be nil, to after. It assigns
// after's metadata.
func replace(ref *resealv1.ResourceRef, before, after *resealv1.Resource, now *timestamppb.Timestamp) change {
	c := change{ref: ref, action: resealv1.Change_ACTION_CREATED, before: before, after: after}
	m := after.GetMetadata()
	if before == nil {
		m.Uid, m.Generation, m.CreatedAt, m.UpdatedAt = uuid.NewString(), 1, now, now
		return c
	}
	sameSpec := sameSpec(before, after)
	if sameSpec && sameLabels(before, after) {
		c.action, c.after = resealv1.Change_ACTION_UNCHANGED, before
		return c
	}
	c.action = resealv1.Change_ACTION_CONFIGURED
	old := before.GetMetadata()
	m.Uid, m.Generation, m.CreatedAt, m.UpdatedAt = old.GetUid(), old.GetGeneration(), old.GetCreatedAt(), now
	if !sameSpec {
		m.Generation++
	}
	return c
}

func sameSpec(a, b *resealv1.Resource) bool {
	return proto.Equal(a.SpecMessage().Interface(), b.SpecMessage().Interface())
}

func sameLabels(a, b *resealv1.Resource) bool {
	return maps.Equal(a.GetMetadata().GetLabels(), b.GetMetadata().GetLabels()) &&
		maps.Equal(a.GetMetadata().GetAnnotations(), b.GetMetadata().GetAnnotations())
}

func planDelete(st *state, refs []*resealv1.ResourceRef) (*plan, error) {
	p, violations, missing := &plan{}, []*resealv1.Violation(nil), []string(nil)
	named := map[string]bool{}
	for _, ref := range refs {
		violation := checkRef(ref, named)
		if violation == nil && ref.GetKind() == keyringKind && ref.GetName() == resealv1.DefaultKeyring {
			violation = &resealv1.Violation{Resource: ref, Description: "the default Keyring always exists and can't be deleted"}
		}
		if violation != nil {
			violations = append(violations, violation)
			continue
		}
		before := st.snapshot.Get(ref.GetKind(), ref.GetName())
		if before == nil {
			missing = append(missing, ref.Key())
			continue
		}
		p.changes = append(p.changes, change{ref: ref, action: resealv1.Change_ACTION_DELETED, before: before})
	}
	if len(violations) > 0 {
		return nil, &resealv1.ViolationsError{Violations: violations}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("%w: %s", ErrNotFound, strings.Join(missing, ", "))
	}
	return p, nil
}
