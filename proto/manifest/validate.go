package manifest

import (
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
)

// Validate checks all fields of one resource as far as that can be done without
// other resources, by the rules that edges apply as well (package rules). The
// description of a violation never holds a secret. At most 100 violations are
// returned.
//
// A Certificate with certificatePem and without privateKeyPem is valid here: the
// store may hold the key.
func Validate(r *resealv1.Resource) []*resealv1.Violation { return rules.Written(r) }

// ValidateSnapshot checks what holds between the resources of a whole
// configuration. It does not look at write-only values, which may be sealed. It
// reports at most 100 violations per resource.
func ValidateSnapshot(s *resealv1.Snapshot) []*resealv1.Violation { return rules.Configuration(s) }
