package manifest

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// maxErrors bounds the errors that one call returns; the rest is counted.
const maxErrors = 100

// Error is one thing that is wrong in a manifest.
type Error struct {
	// File is the name as given to Parse or Load, "stdin" for the path "-".
	// Empty when the place is not known.
	File string
	// Line and Column count from 1, columns in characters. 0: not known.
	Line, Column int
	// Resource is "Kind/name". Empty when it is not known.
	Resource string
	// Path of the field, for example "spec.endpoints[0].address". Empty when
	// the document as a whole is meant.
	Path string
	// Message says what is wrong and what would be right.
	Message string
}

// Error is "file:line:column: Kind/name: path: message", without the parts that
// are not known.
func (e Error) Error() string {
	var parts []string
	if e.File != "" {
		place := e.File
		if e.Line > 0 {
			place += fmt.Sprintf(":%d", e.Line)
			if e.Column > 0 {
				place += fmt.Sprintf(":%d", e.Column)
			}
		}
		parts = append(parts, place)
	}
	for _, part := range []string{e.Resource, e.Path, e.Message} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ": ")
}

// Errors are all errors of a call, in the order of the files and of the lines in
// them. When there are more than 100, the last one has only a message, "and N
// more errors".
type Errors []Error

// Error is one error a line.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i := range e {
		lines[i] = e[i].Error()
	}
	return strings.Join(lines, "\n")
}

// errorList collects errors up to maxErrors.
type errorList struct {
	kept    Errors
	dropped int
}

func (l *errorList) add(e Error) {
	if len(l.kept) >= maxErrors {
		l.dropped++
		return
	}
	l.kept = append(l.kept, e)
}

// sortFrom sorts the errors from index start on by line and column. They belong
// to one file.
func (l *errorList) sortFrom(start int) {
	slices.SortStableFunc(l.kept[start:], func(a, b Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// err is nil, or Errors.
func (l *errorList) err() error {
	if len(l.kept) == 0 {
		return nil
	}
	all := slices.Clone(l.kept)
	switch {
	case l.dropped == 1:
		all = append(all, Error{Message: "and 1 more error"})
	case l.dropped > 1:
		all = append(all, Error{Message: fmt.Sprintf("and %d more errors", l.dropped)})
	}
	return all
}
