package resealv1

import "strings"

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

// Text is "Kind/name: path: description", without the parts that are empty.
func (v *Violation) Text() string {
	var parts []string
	if v.GetResource() != nil {
		parts = append(parts, v.GetResource().Key())
	}
	for _, part := range []string{v.GetField(), v.GetDescription()} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ": ")
}
