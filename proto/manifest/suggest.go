package manifest

import (
	"fmt"
	"slices"
	"strings"
)

// maxShown bounds how much of a value an error repeats.
const maxShown = 64

// quote shows a value in an error. A value of several lines is never shown: it
// may be key material in the wrong place.
func quote(value string) string {
	if strings.ContainsAny(value, "\r\n") {
		return "the value"
	}
	return fmt.Sprintf("%q", shorten(value))
}

func shorten(value string) string {
	runes := 0
	for i := range value {
		if runes == maxShown {
			return value[:i] + "…"
		}
		runes++
	}
	return value
}

// didYouMean is a hint that starts with "; ", or "" when no name is like the
// given one.
func didYouMean(given string, names []string) string {
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

// oneOf lists names for an error: "a, b or c".
func oneOf(names []string) string {
	names = slices.Clone(names)
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}
