package manifest

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

const (
	// diffContext is the number of equal lines around a change.
	diffContext = 3
	// maxEdits bounds the work to find the shortest difference. Texts further
	// apart are shown as replaced.
	maxEdits = 1000
)

// changedMarker stands for a write-only value that changed.
const changedMarker = "changed"

// Diff shows how before became after: a unified diff of their YAML, without the
// metadata that the control plane assigns, and "" when there is no difference. A
// nil before means created, a nil after deleted.
//
// Write-only values are never shown. One that changed is the single line
// "+  privateKeyPem: changed". Since a redacted value is always the same, name
// the paths of those that the control plane reports as changed
// (Change.changed_secrets).
func Diff(before, after *resealv1.Resource, changedSecrets ...string) string {
	before, after = hideSecrets(before, after, changedSecrets)
	oldName, newName := "/dev/null", "/dev/null"
	if before != nil {
		oldName = before.Ref().Key()
	}
	if after != nil {
		newName = after.Ref().Key()
	}
	edits := diffLines(diffText(before), diffText(after))
	if !slices.ContainsFunc(edits, func(e edit) bool { return e.op != ' ' }) {
		return ""
	}
	return fmt.Sprintf("--- %s\n+++ %s\n", oldName, newName) + unified(edits)
}

func diffText(r *resealv1.Resource) []string {
	if r == nil {
		return nil
	}
	var text bytes.Buffer
	// Writing to memory fails only for a resource without spec, which has no
	// text either.
	if err := (Format{OmitAssigned: true}).YAML(&text, r); err != nil {
		return nil
	}
	return strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n")
}

// hideSecrets copies both sides with their secrets replaced.
func hideSecrets(before, after *resealv1.Resource, changed []string) (hiddenBefore, hiddenAfter *resealv1.Resource) {
	hiddenBefore, hiddenAfter = proto.CloneOf(before), proto.CloneOf(after)
	secretsBefore, secretsAfter := secretsOf(hiddenBefore), secretsOf(hiddenAfter)
	for _, secret := range secretsBefore {
		secret.set(resealv1.SecretMarker)
	}
	for path, secret := range secretsAfter {
		old, both := secretsBefore[path]
		if both && (slices.Contains(changed, path) || isChanged(old.value, secret.value)) {
			// Only the new side keeps the line, so that there is one.
			old.clear()
			secret.set(changedMarker)
			continue
		}
		secret.set(resealv1.SecretMarker)
	}
	return hiddenBefore, hiddenAfter
}

// isChanged compares two secrets. A redacted one tells nothing.
func isChanged(before, after string) bool {
	return before != after && before != resealv1.SecretMarker && after != resealv1.SecretMarker
}

// secretField is a write-only field that holds a value.
type secretField struct {
	message protoreflect.Message
	field   protoreflect.FieldDescriptor
	value   string
}

func (s secretField) set(value string) { s.message.Set(s.field, protoreflect.ValueOfString(value)) }

func (s secretField) clear() { s.message.Clear(s.field) }

// secretsOf finds the secrets of a resource by path. They stand in the spec
// itself or in messages of it, never in lists or maps.
func secretsOf(r *resealv1.Resource) map[string]secretField {
	secrets := make(map[string]secretField)
	var walk func(m protoreflect.Message, path string)
	walk = func(m protoreflect.Message, path string) {
		for field, value := range m.Range {
			fieldPath := rules.FieldPath(path, field.JSONName())
			switch {
			case rules.IsSecret(field):
				secrets[fieldPath] = secretField{m, field, value.String()}
			case field.Message() != nil && !field.IsList() && !field.IsMap():
				walk(value.Message(), fieldPath)
			}
		}
	}
	if spec := r.SpecMessage(); spec != nil {
		walk(spec, "spec")
	}
	return secrets
}

// edit is one line of a diff: kept ' ', removed '-' or added '+'.
type edit struct {
	op   byte
	line string
}

// diffLines turns a into b.
func diffLines(a, b []string) []edit {
	var head, tail []edit
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		head = append(head, edit{' ', a[0]})
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		tail = append(tail, edit{' ', a[len(a)-1]})
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	slices.Reverse(tail)
	return slices.Concat(head, shortestEdits(a, b), tail)
}

// shortestEdits finds the fewest removed and added lines (Myers, "An O(ND)
// Difference Algorithm and Its Variations", 1986).
func shortestEdits(a, b []string) []edit {
	limit := min(len(a)+len(b), maxEdits)
	// reach[k+limit+1] is how far into a the furthest path on diagonal k came;
	// trace holds it as it was before each round.
	reach := make([]int, 2*limit+3)
	var trace [][]int
	for round := range limit + 1 {
		trace = append(trace, slices.Clone(reach[limit-round:limit+round+3]))
		for k := -round; k <= round; k += 2 {
			at := k + limit + 1
			x := reach[at-1] + 1
			if k == -round || k != round && reach[at-1] < reach[at+1] {
				x = reach[at+1]
			}
			for x < len(a) && x-k < len(b) && a[x] == b[x-k] {
				x++
			}
			reach[at] = x
			if x >= len(a) && x-k >= len(b) {
				return backtrack(a, b, trace)
			}
		}
	}
	edits := make([]edit, 0, len(a)+len(b))
	for _, line := range a {
		edits = append(edits, edit{'-', line})
	}
	for _, line := range b {
		edits = append(edits, edit{'+', line})
	}
	return edits
}

// backtrack walks the rounds of shortestEdits back from the ends of a and b.
func backtrack(a, b []string, trace [][]int) []edit {
	var edits []edit
	x, y := len(a), len(b)
	for round := len(trace) - 1; round >= 0; round-- {
		before, k := trace[round], x-y
		at := k + round + 1
		previous := k - 1
		if k == -round || k != round && before[at-1] < before[at+1] {
			previous = k + 1
		}
		fromX := before[previous+round+1]
		fromY := fromX - previous
		for x > fromX && y > fromY && x > 0 && y > 0 {
			x, y = x-1, y-1
			edits = append(edits, edit{' ', a[x]})
		}
		switch {
		case round == 0:
		case x > fromX:
			x--
			edits = append(edits, edit{'-', a[x]})
		default:
			y--
			edits = append(edits, edit{'+', b[y]})
		}
	}
	slices.Reverse(edits)
	return edits
}

// unified groups edits into hunks with context.
func unified(edits []edit) string {
	var out strings.Builder
	oldLine, newLine := 1, 1
	for at := 0; at < len(edits); {
		start, end := hunk(edits, at)
		for _, e := range edits[at:start] {
			oldLine, newLine = advance(e, oldLine, newLine)
		}
		oldEnd, newEnd := oldLine, newLine
		for _, e := range edits[start:end] {
			oldEnd, newEnd = advance(e, oldEnd, newEnd)
		}
		if start < end {
			fmt.Fprintf(&out, "@@ -%s +%s @@\n", lineRange(oldLine, oldEnd), lineRange(newLine, newEnd))
		}
		for _, e := range edits[start:end] {
			fmt.Fprintf(&out, "%c%s\n", e.op, e.line)
		}
		at, oldLine, newLine = end, oldEnd, newEnd
	}
	return out.String()
}

// hunk finds the next changes from index at on, with their context. Changes
// whose contexts touch are one hunk.
func hunk(edits []edit, at int) (start, end int) {
	isChange := func(e edit) bool { return e.op != ' ' }
	first := slices.IndexFunc(edits[at:], isChange)
	if first < 0 {
		return len(edits), len(edits)
	}
	start, end = max(at, at+first-diffContext), at+first
	for {
		next := slices.IndexFunc(edits[end:], isChange)
		if next < 0 || next > 2*diffContext {
			return start, min(end+diffContext, len(edits))
		}
		end += next + 1
	}
}

func advance(e edit, oldLine, newLine int) (nextOld, nextNew int) {
	switch e.op {
	case '-':
		return oldLine + 1, newLine
	case '+':
		return oldLine, newLine + 1
	}
	return oldLine + 1, newLine + 1
}

// lineRange is a range as unified diffs write it: start,count, where an empty
// range starts one line earlier.
func lineRange(start, end int) string {
	switch end - start {
	case 0:
		return fmt.Sprintf("%d,0", start-1)
	case 1:
		return fmt.Sprint(start)
	}
	return fmt.Sprintf("%d,%d", start, end-start)
}
