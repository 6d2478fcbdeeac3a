package feed

import (
	"crypto/sha256"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Bounds on what edges say. Lengths are in bytes.
const (
	maxLabels      = fleet.MaxLabels
	maxText        = fleet.MaxText
	maxCrashed     = 16
	maxViolations  = 100
	maxField       = 512
	maxDescription = 2048
	maxReport      = 512 << 10
)

// checkHello admits the Hello of the edge whose certificate names id.
func checkHello(hello *resealv1.Hello, id string) error {
	if hello == nil {
		return status.Error(codes.InvalidArgument, "the first message must be a Hello")
	}
	if err := fleet.CheckID(hello.GetEdge(), id); err != nil {
		return err
	}
	for _, text := range []string{hello.GetBootId(), hello.GetVersion(), hello.GetClusterId(), string(hello.GetHash())} {
		if len(text) > maxText {
			return status.Errorf(codes.InvalidArgument, "a text in Hello has %d bytes, at most %d are allowed", len(text), maxText)
		}
	}
	for field, text := range map[string]string{"boot_id": hello.GetBootId(), "version": hello.GetVersion(), "cluster_id": hello.GetClusterId()} {
		if !resealv1.Legible(text) {
			return status.Errorf(codes.InvalidArgument, "hello.%s holds a control character", field)
		}
	}
	if n := len(hello.GetCrashed()); n > maxCrashed {
		return status.Errorf(codes.InvalidArgument, "hello.crashed: there are %d, at most %d are allowed", n, maxCrashed)
	}
	for _, crashed := range hello.GetCrashed() {
		if len(crashed.GetHash()) > maxText {
			return status.Errorf(codes.InvalidArgument, "hello.crashed: a hash has %d bytes, at most %d are allowed", len(crashed.GetHash()), maxText)
		}
	}
	return fleet.CheckLabels("hello.labels", hello.GetLabels())
}

// boundNack copies what of a Nack is worth keeping.
func boundNack(nack *resealv1.Nack) *resealv1.Nack {
	kept := &resealv1.Nack{Revision: nack.GetRevision(), ServingRevision: nack.GetServingRevision(), Partly: nack.GetPartly(), RunningHash: boundHash(nack.GetRunningHash())}
	for _, violation := range nack.GetViolations() {
		if len(kept.Violations) == maxViolations {
			break
		}
		kept.Violations = append(kept.Violations, &resealv1.Violation{
			Resource:    boundRef(violation.GetResource()),
			Field:       shown(violation.GetField(), maxField),
			Description: shown(violation.GetDescription(), maxDescription),
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
	return &resealv1.ResourceRef{Kind: shown(ref.GetKind(), maxText), Name: shown(ref.GetName(), maxText)}
}

// shown is a text of an edge for people, of at most limit bytes.
func shown(text string, limit int) string {
	return fleet.Cut(resealv1.Visible(fleet.Cut(text, limit)), limit)
}

// boundReport checks and changes a report of a probe so that it can be shown to
// people. Texts of several lines, such as PEM, remain such.
func boundReport(report *resealv1.ProbeReport) error {
	if size := proto.Size(report); size > maxReport {
		return fmt.Errorf("its report has %d bytes, at most %d are allowed", size, maxReport)
	}
	makeVisible(report.ProtoReflect())
	return nil
}

// makeVisible goes through all texts of a message.
func makeVisible(message protoreflect.Message) {
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap():
			makeMapVisible(field, value.Map())
		case field.IsList():
			list := value.List()
			for i := range list.Len() {
				if text, ok := visibleValue(field, list.Get(i)); ok {
					list.Set(i, text)
				}
			}
		default:
			if text, ok := visibleValue(field, value); ok {
				message.Set(field, text)
			}
		}
		return true
	})
}

func makeMapVisible(field protoreflect.FieldDescriptor, entries protoreflect.Map) {
	entries.Range(func(key protoreflect.MapKey, value protoreflect.Value) bool {
		name, changed := visibleValue(field.MapKey(), key.Value())
		if changed {
			entries.Clear(key)
		} else {
			name = key.Value()
		}
		if text, ok := visibleValue(field.MapValue(), value); ok {
			value, changed = text, true
		}
		if changed {
			entries.Set(name.MapKey(), value)
		}
		return true
	})
}

// visibleValue returns what a text must be replaced by, if it must. In a message
// it does so itself.
func visibleValue(field protoreflect.FieldDescriptor, value protoreflect.Value) (protoreflect.Value, bool) {
	switch {
	case field.Message() != nil:
		makeVisible(value.Message())
	case field.Kind() == protoreflect.StringKind && resealv1.VisibleLines(value.String()) != value.String():
		return protoreflect.ValueOfString(resealv1.VisibleLines(value.String())), true
	}
	return value, false
}

// boundHash is nil for what can't be a hash.
func boundHash(hash []byte) []byte {
	if len(hash) != sha256.Size {
		return nil
	}
	return hash
}

// shortHash is a hash for people.
func shortHash(hash []byte) string { return fmt.Sprintf("%.6x", hash) }
