package feed

import (
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Bounds on what edges say. Lengths are in bytes.
const (
	maxLabels      = 64
	maxText        = 253
	maxViolations  = 100
	maxField       = 512
	maxDescription = 2048
)

// checkHello admits the Hello of the edge whose certificate names id.
func checkHello(hello *resealv1.Hello, id string) error {
	if hello == nil {
		return status.Error(codes.InvalidArgument, "the first message must be a Hello")
	}
	if hello.GetEdge() != id {
		return status.Errorf(codes.PermissionDenied, "edge %q can't speak as %q", id, cut(hello.GetEdge(), maxText))
	}
	for _, text := range []string{hello.GetBootId(), hello.GetVersion(), hello.GetClusterId(), string(hello.GetHash())} {
		if len(text) > maxText {
			return status.Errorf(codes.InvalidArgument, "a text in Hello has %d bytes, at most %d are allowed", len(text), maxText)
		}
	}
	if len(hello.GetLabels()) > maxLabels {
		return status.Errorf(codes.InvalidArgument, "Hello has %d labels, at most %d are allowed", len(hello.GetLabels()), maxLabels)
	}
	for name, value := range hello.GetLabels() {
		if len(name) > maxText || len(value) > maxText {
			return status.Errorf(codes.InvalidArgument, "a label has more than %d bytes", maxText)
		}
	}
	return nil
}

// boundNack copies what of a Nack is worth keeping.
func boundNack(nack *resealv1.Nack) *resealv1.Nack {
	kept := &resealv1.Nack{Revision: nack.GetRevision(), ServingRevision: nack.GetServingRevision(), Partly: nack.GetPartly()}
	for _, violation := range nack.GetViolations() {
		if len(kept.Violations) == maxViolations {
			break
		}
		kept.Violations = append(kept.Violations, &resealv1.Violation{
			Resource:    boundRef(violation.GetResource()),
			Field:       cut(violation.GetField(), maxField),
			Description: cut(violation.GetDescription(), maxDescription),
		})
	}
	for _, ref := range nack.GetHeldBack() {
		if len(kept.HeldBack) == maxViolations {
			break
		}
		kept.HeldBack = append(kept.HeldBack, boundRef(ref))
	}
	return kept
}

// boundRef is nil for a nil ref, that of a violation of the whole configuration.
func boundRef(ref *resealv1.ResourceRef) *resealv1.ResourceRef {
	if ref == nil {
		return nil
	}
	return &resealv1.ResourceRef{Kind: cut(ref.GetKind(), maxText), Name: cut(ref.GetName(), maxText)}
}

// cut shortens a text to at most limit bytes, at the border of a character.
func cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	for limit > 0 && !utf8.RuneStart(text[limit]) {
		limit--
	}
	return text[:limit]
}
