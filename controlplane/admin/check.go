package admin

import (
	"fmt"
	"slices"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// requestError is a fault of the request itself, not of a resource in it.
type requestError struct {
	field       string // of the request message
	description string
}

func (e *requestError) Error() string { return e.field + ": " + e.description }

func (s *server) checkApply(req *resealv1.ApplyRequest) error {
	if err := checkCommon(len(req.GetResources()), req.GetExpectedRevision(), req.GetMessage()); err != nil {
		return err
	}
	var violations []*resealv1.Violation
	for i, resource := range req.GetResources() {
		if resource.Kind() == "" {
			violations = append(violations, nameless(i, resource.Ref(), "no spec of a known kind is set; the kinds are "+kinds()))
			continue
		}
		if resource.GetMetadata().GetName() == "" {
			violations = append(violations, nameless(i, resource.Ref(), "metadata.name is empty"))
			continue
		}
		violations = append(violations, s.cfg.Validate(resource)...)
	}
	return asError(violations)
}

// nameless is a violation of a resource that can't be found by kind and name.
func nameless(i int, ref *resealv1.ResourceRef, description string) *resealv1.Violation {
	return &resealv1.Violation{Resource: ref, Description: fmt.Sprintf("resource %d of the request: %s", i+1, description)}
}

func checkDelete(req *resealv1.DeleteRequest) error {
	if err := checkCommon(len(req.GetResources()), req.GetExpectedRevision(), req.GetMessage()); err != nil {
		return err
	}
	return checkRefs(req.GetResources())
}

func checkRollback(req *resealv1.RollbackRequest) error {
	if req.GetToRevision() < 0 {
		return &requestError{field: "to_revision", description: "a revision is not negative; 0 means the one before the current"}
	}
	return checkCommon(1, req.GetExpectedRevision(), req.GetMessage())
}

func checkListRevisions(req *resealv1.ListRevisionsRequest) error {
	if req.GetLimit() < 0 {
		return &requestError{field: "limit", description: "it is negative; 0 means all"}
	}
	if req.GetRevision() < 0 {
		return &requestError{field: "revision", description: "a revision is not negative; 0 means any"}
	}
	return nil
}

// checkCommon checks what all changes have in common.
func checkCommon(resources int, expected int64, message string) error {
	switch {
	case resources == 0:
		return &requestError{field: "resources", description: "it is empty; name at least one resource"}
	case resources > maxResources:
		return &requestError{field: "resources", description: fmt.Sprintf("it has %d members, at most %d are taken; apply them in parts", resources, maxResources)}
	case expected < 0:
		return &requestError{field: "expected_revision", description: "a revision is not negative; 0 means any"}
	case len(message) > maxMessage:
		return &requestError{field: "message", description: fmt.Sprintf("it has %d bytes, at most %d are taken", len(message), maxMessage)}
	}
	return nil
}

func checkKind(kind string) error {
	if kind != "" && !slices.Contains(resealv1.Kinds, kind) {
		return &requestError{field: "kind", description: fmt.Sprintf("%q is not a kind; the kinds are %s", kind, kinds())}
	}
	return nil
}

func checkRefs(refs []*resealv1.ResourceRef) error {
	var violations []*resealv1.Violation
	for i, ref := range refs {
		switch {
		case !slices.Contains(resealv1.Kinds, ref.GetKind()):
			violations = append(violations, nameless(i, ref, fmt.Sprintf("%q is not a kind; the kinds are %s", ref.GetKind(), kinds())))
		case ref.GetName() == "":
			violations = append(violations, nameless(i, ref, "its name is empty"))
		}
	}
	return asError(violations)
}

func kinds() string { return strings.Join(resealv1.Kinds, ", ") }

func asError(violations []*resealv1.Violation) error {
	if len(violations) == 0 {
		return nil
	}
	return &resealv1.ViolationsError{Violations: violations}
}
