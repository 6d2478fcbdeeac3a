package resealv1

import (
	"fmt"
	"strings"
)

// ViolationsError is the error of resources that are not valid.
type ViolationsError struct {
	// Violations are what is wrong, all of it. Not empty.
	Violations []*Violation
}

// Error names every violation, one a line.
func (e *ViolationsError) Error() string {
	lines := make([]string, len(e.Violations))
	for i, violation := range e.Violations {
		lines[i] = violation.Text()
	}
	return strings.Join(lines, "\n")
}

// Text is "Kind/name: path: description", without the path when there is none.
func (v *Violation) Text() string {
	if v.GetField() == "" {
		return fmt.Sprintf("%s: %s", v.GetResource().Key(), v.GetDescription())
	}
	return fmt.Sprintf("%s: %s: %s", v.GetResource().Key(), v.GetField(), v.GetDescription())
}
