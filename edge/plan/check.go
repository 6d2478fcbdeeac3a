package plan

import (
	"fmt"
	"runtime/debug"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
)

// compiler is the state of one round of a Draft.
type compiler struct {
	draft        *Draft
	editions     map[string]*edition // by "Kind/name"
	snapshot     *resealv1.Snapshot
	broken       map[string]bool    // keys of resources with a violation
	policies     map[string]*policy // by name, "" for the default; nil when broken
	violations   []*resealv1.Violation
	warnings     []*resealv1.Violation
	certificates map[string]*certificate // by name, nil when broken
}

func (c *compiler) compile() *Plan {
	for _, resource := range c.snapshot.All() {
		c.report(c.editions[resource.Ref().Key()].rules())
	}
	c.report(rules.Selection(c.snapshot))
	pools := map[string]*exchange.Pool{}
	for _, resource := range c.snapshot.Kind("BackendPool") {
		c.guard(resource, func(o object) {
			if pool := o.compilePool(resource.GetBackendPool()); pool != nil {
				pools[pool.Name] = pool
			}
		})
	}
	listeners := c.listeners()
	return &Plan{
		Revision: c.snapshot.Revision(), Listeners: listeners, Pools: pools,
		Warnings: c.warnings, editions: c.editions,
	}
}

func (c *compiler) report(violations []*resealv1.Violation) {
	for _, violation := range violations {
		c.broken[violation.GetResource().Key()] = true
	}
	c.violations = append(c.violations, violations...)
}

// guard compiles a resource that no rule refuses. A panic is a fault of this
// program, but then the resource is what it can't serve, and the others are not.
func (c *compiler) guard(resource *resealv1.Resource, compile func(object)) {
	o := c.object(resource)
	if c.broken[o.ref.Key()] {
		return
	}
	defer func() {
		if reason := recover(); reason != nil {
			c.draft.panicked(o.ref, reason, debug.Stack())
			bug := exchange.NewBug("a resource was compiled", reason)
			o.refuse("", "this edge failed on it, which is a bug: %s [%s]; its log has the details", bug.Reason, bug.Stack)
		}
	}()
	compile(o)
}

// object is the resource that is being compiled.
type object struct {
	c       *compiler
	edition *edition
	ref     *resealv1.ResourceRef
	uid     string
}

func (c *compiler) object(r *resealv1.Resource) object {
	return object{c: c, edition: c.editions[r.Ref().Key()], ref: r.Ref(), uid: r.GetMetadata().GetUid()}
}

func (o object) refuse(field, format string, args ...any) {
	o.c.report([]*resealv1.Violation{o.violation(field, format, args...)})
}

func (o object) warn(field, format string, args ...any) {
	o.c.warnings = append(o.c.warnings, o.violation(field, format, args...))
}

func (o object) violation(field, format string, args ...any) *resealv1.Violation {
	return &resealv1.Violation{Resource: o.ref, Field: field, Description: fmt.Sprintf(format, args...)}
}

// file reads a file that field names.
func (o object) file(field, name string) ([]byte, bool) {
	data, err := o.c.draft.content(o.edition, name)
	if err != nil {
		o.refuse(field, "%q %s", name, fileProblem(err))
		return nil, false
	}
	return data, true
}

// duration is 0 for an absent field.
func duration(d *durationpb.Duration) time.Duration {
	if d == nil {
		return 0
	}
	return d.AsDuration()
}
