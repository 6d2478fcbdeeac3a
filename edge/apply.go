package edge

import (
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/feed"
	"github.com/reseal/reseal/edge/frontend"
	"github.com/reseal/reseal/edge/plan"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// A request that was routed by the old plan may ask for its pool a moment
	// after the new plan is in force.
	leaveAfter = 5 * time.Second
	// maxAttempts bounds the plans of one candidate that turn out not to fit this
	// machine. Each takes back all that the one before found to be wrong.
	maxAttempts = 24
)

type leavingPool struct {
	pool  exchange.Pool
	until time.Time
}

// put makes as much of a candidate the configuration in force as this edge can
// serve. A panic is a fault of this program: it refuses the candidate, and what was
// in force stays. Only the owner calls it.
func (e *Edge) put(candidate feed.Candidate) (outcome feed.Outcome) {
	defer func() {
		if reason := recover(); reason != nil {
			bug := exchange.NewBug("a configuration was applied", reason)
			e.cfg.Logger.Error("a panic while a configuration was applied", "revision", candidate.Snapshot.Revision(), "reason", fmt.Sprint(reason), "stack", string(debug.Stack()))
			outcome = feed.Outcome{Violations: []*resealv1.Violation{{
				Description: fmt.Sprintf("this edge failed while it applied the configuration, which is a bug: %s [%s]; its log has the details", bug.Reason, bug.Stack),
			}}}
		}
	}()
	draft := plan.NewDraft(candidate.Snapshot, candidate.Unusable, plan.Env{ReadFile: e.files.Read}, e.apply.plan)
	defer func() {
		files := draft.Files()
		e.apply.files.Store(&files)
	}()
	compiled := e.fit(draft)
	for _, fault := range draft.Panics() {
		e.cfg.Logger.Error("a panic while a resource was compiled", "resource", fault.Resource.Key(), "reason", fmt.Sprint(fault.Reason), "stack", string(fault.Stack))
	}
	if compiled == nil {
		return feed.Outcome{Violations: draft.Violations(), HeldBack: draft.HeldBack()}
	}
	now := &inForce{pools: e.apply.pools, snapshot: compiled.Snapshot()}
	if before := e.apply.inForce.Load(); before != nil {
		now.revision = before.revision
	}
	if len(draft.Violations()) == 0 {
		now.revision = candidate.Snapshot.Revision()
	} else {
		outcome = feed.Outcome{
			Violations: draft.Violations(), HeldBack: draft.HeldBack(), InForce: compiled.Snapshot().All(),
		}
	}
	e.apply.plan = compiled
	e.apply.inForce.Store(now)
	e.cfg.Logger.Info("configuration applied", "revision", candidate.Snapshot.Revision(),
		"listeners", len(compiled.Listeners), "pools", len(compiled.Pools), "refused", len(outcome.Violations))
	return outcome
}

// fit puts the plan of a draft in force, as much of it as fits this machine, and
// returns it, or nil.
func (e *Edge) fit(draft *plan.Draft) *plan.Plan {
	for range maxAttempts {
		compiled := draft.Compile()
		if compiled == nil || draft.Unchanged() {
			return compiled
		}
		change, violations := e.frontend.Prepare(compiled.Listeners)
		if len(violations) == 0 {
			for _, warning := range compiled.Warnings {
				e.cfg.Logger.Warn("configuration", "warning", warning)
			}
			e.swap(compiled, change)
			return compiled
		}
		if !draft.Refuse(violations) {
			return nil
		}
	}
	return nil
}

// swap serves compiled from now on. When that fails by a panic, what was in force
// is served again.
func (e *Edge) swap(compiled *plan.Plan, change *frontend.Change) {
	last, pools, leaving := e.apply.plan, e.apply.pools, e.apply.leaving
	defer func() {
		if reason := recover(); reason != nil {
			e.swapBack(change, last, pools, leaving)
			panic(reason)
		}
	}()
	// New pools come before the routes that name them, old ones go after.
	next := make([]exchange.Pool, 0, len(compiled.Pools))
	for _, name := range slices.Sorted(maps.Keys(compiled.Pools)) {
		next = append(next, *compiled.Pools[name])
	}
	e.shareSessions(next)
	e.retirePools(next)
	e.apply.pools = next
	e.updateBackend()
	change.Commit()
	e.apply.listeners = listenerNames(compiled)
	e.forgetCounters()
}

// swapBack serves again what was in force before a change that failed, wherever it
// failed. A panic leaves the rest undone, and is logged.
func (e *Edge) swapBack(change *frontend.Change, last *plan.Plan, pools []exchange.Pool, leaving []leavingPool) {
	e.guarded("what a configuration had bound was given up", change.Abort)
	e.apply.pools, e.apply.leaving = pools, leaving
	e.guarded("pools went back to what they were", e.updateBackend)
	e.guarded("listeners went back to what they were", func() {
		var listeners []exchange.Listener
		if last != nil {
			listeners = last.Listeners
		}
		back, violations := e.frontend.Prepare(listeners)
		if len(violations) > 0 {
			e.cfg.Logger.Error("listeners can't go back to what they were", "error", &resealv1.ViolationsError{Violations: violations})
			return
		}
		back.Commit()
	})
}

// retirePools notes the pools that next no longer holds.
func (e *Edge) retirePools(next []exchange.Pool) {
	named := func(name string) func(exchange.Pool) bool {
		return func(pool exchange.Pool) bool { return pool.Name == name }
	}
	leaving := slices.Clone(e.apply.leaving)
	for _, pool := range e.apply.pools {
		if !slices.ContainsFunc(next, named(pool.Name)) {
			leaving = append(leaving, leavingPool{pool, time.Now().Add(leaveAfter)})
		}
	}
	e.apply.leaving = slices.DeleteFunc(leaving, func(leaving leavingPool) bool {
		return slices.ContainsFunc(next, named(leaving.pool.Name))
	})
}

func (e *Edge) updateBackend() {
	pools := slices.Clone(e.apply.pools)
	for _, leaving := range e.apply.leaving {
		pools = append(pools, leaving.pool)
	}
	e.backend.Update(pools)
	var identities []string
	for _, pool := range pools {
		identities = append(identities, pool.Identity)
	}
	e.sessions.Retain(identities...) // those of an older configuration end
}

func (e *Edge) endLeavingPools() {
	before := len(e.apply.leaving)
	e.apply.leaving = slices.DeleteFunc(e.apply.leaving, func(leaving leavingPool) bool {
		return time.Now().After(leaving.until)
	})
	if len(e.apply.leaving) != before {
		e.updateBackend()
		e.forgetCounters()
	}
}

// forgetCounters drops the counters of pools and listeners that are gone. Pools
// that are leaving still count how their connections close.
func (e *Edge) forgetCounters() {
	var pools []string
	for _, pool := range e.apply.pools {
		pools = append(pools, pool.Name)
	}
	for _, leaving := range e.apply.leaving {
		pools = append(pools, leaving.pool.Name)
	}
	e.tally.Forget(pools, e.apply.listeners)
}

func listenerNames(compiled *plan.Plan) []string {
	var names []string
	for _, listener := range compiled.Listeners {
		names = append(names, listener.Name)
	}
	return names
}
