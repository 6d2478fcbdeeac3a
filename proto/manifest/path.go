package manifest

import (
	"strconv"
	"strings"
)

// pathStep is one step down a document: a name, a map key or an index.
type pathStep struct {
	name  string
	index int // -1 for names
}

// splitPath takes a path apart. What is not well formed ends it: the steps
// before still lead to the nearest ancestor.
func splitPath(path string) []pathStep {
	var steps []pathStep
	for path != "" {
		if path[0] != '[' {
			path = strings.TrimPrefix(path, ".")
			end := strings.IndexAny(path, ".[")
			if end < 0 {
				end = len(path)
			}
			if end == 0 {
				return steps
			}
			steps = append(steps, pathStep{name: path[:end], index: -1})
			path = path[end:]
			continue
		}
		step, rest, ok := bracketStep(path[1:])
		if !ok {
			return steps
		}
		steps = append(steps, step)
		path = rest
	}
	return steps
}

// bracketStep reads what follows a "[".
func bracketStep(text string) (step pathStep, rest string, ok bool) {
	if quoted, err := strconv.QuotedPrefix(text); err == nil {
		key, err := strconv.Unquote(quoted)
		rest, closed := strings.CutPrefix(text[len(quoted):], "]")
		return pathStep{name: key, index: -1}, rest, err == nil && closed
	}
	inner, rest, closed := strings.Cut(text, "]")
	if !closed {
		return pathStep{}, "", false
	}
	if index, err := strconv.Atoi(inner); err == nil && index >= 0 {
		return pathStep{index: index}, rest, true
	}
	return pathStep{name: inner, index: -1}, rest, inner != ""
}

// isWithin says whether path is ancestor or below it.
func isWithin(path, ancestor string) bool {
	rest, ok := strings.CutPrefix(path, ancestor)
	return ok && (rest == "" || ancestor == "" || rest[0] == '.' || rest[0] == '[')
}
