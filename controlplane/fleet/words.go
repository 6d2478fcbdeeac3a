package fleet

import (
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Bounds on what edges say.
const (
	// MaxText is the longest name, in bytes.
	MaxText = 253
	// MaxLabels is how many labels an edge may have.
	MaxLabels = 64
)

// Selects says whether a selector selects an edge with these labels.
func Selects(selector *resealv1.EdgeSelector, labels map[string]string) bool {
	return selector.Selects(labels)
}

// CheckLabels admits labels that an edge says it has. The error, a gRPC status, names
// field.
func CheckLabels(field string, labels map[string]string) error {
	if len(labels) > MaxLabels {
		return status.Errorf(codes.InvalidArgument, "%s: there are %d, at most %d are allowed", field, len(labels), MaxLabels)
	}
	for name, value := range labels {
		if len(name) > MaxText || len(value) > MaxText {
			return status.Errorf(codes.InvalidArgument, "%s: one has more than %d bytes", field, MaxText)
		}
		if !resealv1.Legible(name) || !resealv1.Legible(value) {
			return status.Errorf(codes.InvalidArgument, "%s: one of them holds a control character", field)
		}
	}
	return nil
}

// CheckID admits an edge's id that is that of its certificate.
func CheckID(said, id string) error {
	if said != id {
		return status.Errorf(codes.PermissionDenied, "edge %q can't speak as %q", id, Cut(said, MaxText))
	}
	return nil
}

// Superseded is the status of a conversation of which the edge has started another.
func Superseded(id string) error {
	return status.Errorf(codes.Aborted, "edge %q has started another stream; if it was not this process, two edges use one id", id)
}

// Cut shortens a text to at most limit bytes, at the border of a character.
func Cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	for limit > 0 && !utf8.RuneStart(text[limit]) {
		limit--
	}
	return text[:limit]
}

// Member is an edge that lives, connected to whichever replica.
type Member struct {
	// ID is the edge's.
	ID string
	// Labels are those of its labels that some selector asks for.
	Labels map[string]string
	// Vague says that Labels are not known yet.
	Vague bool
}

// Key is a text that members have in common whom the same selectors select.
func (m Member) Key() string {
	if m.Vague {
		return "?"
	}
	var key strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m.Labels)) {
		key.WriteString(name + "\x00" + m.Labels[name] + "\x00")
	}
	return key.String()
}

// Selectable are the labels as selectors want them: nil, which is any, while they are
// not known.
func (m Member) Selectable() map[string]string {
	switch {
	case m.Vague:
		return nil
	case m.Labels == nil:
		return map[string]string{}
	}
	return m.Labels
}
