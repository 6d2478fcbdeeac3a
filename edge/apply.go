package edge

import (
	"context"
	"crypto/sha256"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/backend"
	"github.com/reseal/reseal/edge/frontend"
	"github.com/reseal/reseal/edge/plan"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// A request that was routed by the old plan may ask for its pool a moment
	// after the new plan is in force.
	leaveAfter = 5 * time.Second
	// How often files that the plan read are looked at.
	fileInterval = 5 * time.Second
)

type leavingPool struct {
	pool  backend.Pool
	until time.Time
}

// Apply makes snapshot the configuration in force, or says what is wrong with
// it and changes nothing. It is safe for concurrent use.
func (e *Edge) Apply(_ context.Context, snapshot *resealv1.Snapshot) []*resealv1.Violation {
	e.apply.mu.Lock()
	defer e.apply.mu.Unlock()
	e.apply.snapshot = snapshot
	return e.applyLocked(snapshot)
}

// unchanged moves the revision of the configuration in force: the newer one
// holds the same for this edge.
func (e *Edge) unchanged(revision int64) {
	e.apply.mu.Lock()
	defer e.apply.mu.Unlock()
	e.apply.serving = revision
}

// applyLastGood applies a kept snapshot unless the feed was faster.
func (e *Edge) applyLastGood(_ context.Context, snapshot *resealv1.Snapshot) {
	e.apply.mu.Lock()
	defer e.apply.mu.Unlock()
	if e.apply.serving != 0 {
		return
	}
	if violations := e.applyLocked(snapshot); len(violations) > 0 {
		e.cfg.Logger.Error("the kept configuration is refused", "error", &resealv1.ViolationsError{Violations: violations})
		return
	}
	if e.apply.snapshot == nil {
		e.apply.snapshot = snapshot
	}
	e.cfg.Logger.Warn("serving the kept configuration: the control plane can't be reached", "revision", snapshot.Revision())
}

func (e *Edge) applyLocked(snapshot *resealv1.Snapshot) []*resealv1.Violation {
	compiled, violations := plan.Compile(snapshot, plan.Env{ReadFile: os.ReadFile})
	if compiled != nil {
		// Also of a refused plan: a file that was wrong may be mended.
		e.apply.files.watch(compiled.Files)
	}
	if len(violations) > 0 {
		return violations
	}
	for _, warning := range compiled.Warnings {
		e.cfg.Logger.Warn("configuration", "warning", warning)
	}
	change, violations := e.frontend.Prepare(frontendListeners(compiled))
	if len(violations) > 0 {
		return violations
	}
	// New pools come before the routes that name them, old ones go after.
	next := backendPools(compiled)
	e.shareSessions(next)
	e.retirePools(next)
	e.apply.pools = next
	e.updateBackend()
	change.Commit()
	e.apply.listeners = listenerNames(compiled)
	e.forgetCounters()
	e.apply.serving = snapshot.Revision()
	e.cfg.Logger.Info("configuration applied", "revision", snapshot.Revision(),
		"listeners", len(compiled.Listeners), "pools", len(compiled.Pools))
	return nil
}

// retirePools notes the pools that next no longer holds.
func (e *Edge) retirePools(next []backend.Pool) {
	named := func(name string) func(backend.Pool) bool {
		return func(pool backend.Pool) bool { return pool.Name == name }
	}
	for _, pool := range e.apply.pools {
		if !slices.ContainsFunc(next, named(pool.Name)) {
			e.apply.leaving = append(e.apply.leaving, leavingPool{pool, time.Now().Add(leaveAfter)})
		}
	}
	e.apply.leaving = slices.DeleteFunc(e.apply.leaving, func(leaving leavingPool) bool {
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

// tend ends pools that left the plan and applies the configuration again when a
// file that it read has changed.
func (e *Edge) tend(ctx context.Context) error {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	lastFiles := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-e.reload:
			lastFiles = time.Time{}
		}
		e.apply.mu.Lock()
		e.endLeavingPools()
		if time.Since(lastFiles) >= fileInterval {
			lastFiles = time.Now()
			e.reloadFiles()
		}
		e.apply.mu.Unlock()
	}
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

func (e *Edge) reloadFiles() {
	if e.apply.snapshot == nil || !e.apply.files.changed() {
		return
	}
	e.cfg.Logger.Info("a file of the configuration has changed")
	if violations := e.applyLocked(e.apply.snapshot); len(violations) > 0 {
		e.cfg.Logger.Error("the changed file is refused, the old content stays in force", "error", &resealv1.ViolationsError{Violations: violations})
	}
}

// fileWatch remembers the content of files, as hashes.
type fileWatch struct {
	sums map[string][sha256.Size]byte
}

func (w *fileWatch) watch(files []string) {
	w.sums = make(map[string][sha256.Size]byte, len(files))
	for _, file := range files {
		w.sums[file] = fileSum(file)
	}
}

func (w *fileWatch) changed() bool {
	for file, sum := range w.sums {
		if fileSum(file) != sum {
			return true
		}
	}
	return false
}

// fileSum is zero for a file that can't be read.
func fileSum(file string) (sum [sha256.Size]byte) {
	data, err := os.ReadFile(file)
	if err != nil {
		return sum
	}
	return sha256.Sum256(data)
}

func backendPools(compiled *plan.Plan) []backend.Pool {
	var pools []backend.Pool
	for _, name := range slices.Sorted(maps.Keys(compiled.Pools)) {
		pool := compiled.Pools[name]
		pools = append(pools, backend.Pool{Name: pool.Name, UID: pool.UID, Spec: pool.Spec, TLS: pool.TLS, Identity: pool.Identity})
	}
	return pools
}

func frontendListeners(compiled *plan.Plan) []frontend.Listener {
	var listeners []frontend.Listener
	for _, listener := range compiled.Listeners {
		listeners = append(listeners, frontend.Listener{
			Name:           listener.Name,
			UID:            listener.UID,
			Spec:           listener.Spec,
			TLS:            listener.TLS,
			PolicyKey:      listener.PolicyKey,
			Keyring:        listener.Keyring,
			TicketLifetime: listener.TicketLifetime,
			AllowsHost:     listener.AllowsHost,
			Route: func(host, path string) (frontend.Match, bool) {
				match, ok := listener.Route(host, path)
				return frontend.Match(match), ok
			},
		})
	}
	return listeners
}

func listenerNames(compiled *plan.Plan) []string {
	var names []string
	for _, listener := range compiled.Listeners {
		names = append(names, listener.Name)
	}
	return names
}
