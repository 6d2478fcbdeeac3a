// Package plan compiles a snapshot of configuration into what an edge needs to
// serve it: listeners with their TLS configuration and routes, and pools with
// theirs. A plan is immutable; the edge swaps plans atomically.
//
// What the plan relies on is checked here again, by the rules that the control
// plane applies (package rules). A resource that this edge can't serve does not
// keep the others from their changes: see Draft.
package plan

import (
	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Env is what a compilation may use of the machine.
type Env struct {
	// ReadFile reads a file that a resource names. Each file is read once per
	// Draft, several at a time. Nil: files are violations.
	ReadFile func(name string) ([]byte, error)
}

// Plan is a compiled snapshot. It and everything in it is immutable.
type Plan struct {
	// Revision is the snapshot's.
	Revision int64
	// Listeners are sorted by name.
	Listeners []exchange.Listener
	// Pools by name: all of the snapshot, also those that no route names.
	Pools map[string]*exchange.Pool
	// Warnings are worth a log line but no reason to refuse the snapshot, for
	// example an expired certificate.
	Warnings []*resealv1.Violation

	editions map[string]*edition // what it was made of, by "Kind/name"
}

// Compile makes a plan of all of s, or returns every violation that it found.
//
// A Route's listeners that s does not hold are not served by this edge and are
// skipped; so is a Route without any listener here. Every other reference must
// resolve.
func Compile(s *resealv1.Snapshot, env Env) (*Plan, []*resealv1.Violation) {
	d := NewDraft(s, nil, env, nil)
	compiled, violations := d.compile()
	if len(violations) > 0 {
		return nil, violations
	}
	return compiled, nil
}

// Snapshot is what the plan was made of. Its resources are the very objects that
// drafts were given.
func (p *Plan) Snapshot() *resealv1.Snapshot {
	resources := make([]*resealv1.Resource, 0, len(p.editions))
	for _, e := range p.editions {
		resources = append(resources, e.resource)
	}
	return resealv1.NewSnapshot("", p.Revision, resources)
}
