package rules

import (
	"fmt"
	"slices"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxShown bounds how much of a value an error repeats.
const maxShown = 64

// Quote shows a value in an error. A value of several lines is never shown: it
// may be key material in the wrong place.
func Quote(value string) string {
	if strings.ContainsAny(value, "\r\n") {
		return "the value"
	}
	return fmt.Sprintf("%q", Shorten(value))
}

// Shorten cuts a value for an error.
func Shorten(value string) string {
	runes := 0
	for i := range value {
		if runes == maxShown {
			return value[:i] + "…"
		}
		runes++
	}
	return value
}

// DidYouMean is a hint that starts with "; ", or "" when no name is like the
// given one.
func DidYouMean(given string, names []string) string {
	if best := nearest(given, names); best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	return ""
}

// nearest is the name that was probably meant, or "".
func nearest(given string, names []string) string {
	if len(given) > maxShown {
		return ""
	}
	fold := func(s string) string {
		return strings.ToLower(strings.NewReplacer("_", "", "-", "", ".", "").Replace(s))
	}
	best, bestDistance := "", 1+max(1, min(3, len(given)/3))
	for _, name := range names {
		if distance := editDistance(fold(given), fold(name)); distance < bestDistance {
			best, bestDistance = name, distance
		}
	}
	return best
}

// editDistance counts the bytes to insert, delete or replace (Levenshtein).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// OneOf lists names for an error: "a, b or c".
func OneOf(names []string) string {
	names = slices.Clone(names)
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// EnumLabels are the values of an enum as they are written in manifests.
func EnumLabels(enum protoreflect.EnumDescriptor) []string {
	var labels []string
	for i := range enum.Values().Len() {
		if value := enum.Values().Get(i); value.Number() != 0 {
			labels = append(labels, resealv1.ValueLabel(value))
		}
	}
	return labels
}

// DurationText is the shortest form that reads back equal: "1h", not "1h0m0s".
func DurationText(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}
