package edge

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/feed"
	"github.com/reseal/reseal/edge/plan"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// How often files that the configuration names are looked at.
	fileInterval = 5 * time.Second
	// lookAtOnce bounds the files that are looked at at a time.
	lookAtOnce = 16
)

// configuration is what the edge serves. One goroutine owns it, since an apply may
// take its time: it reads files, binds addresses, waits for sessions. Whoever wants
// to know what is in force reads what the owner published, and never waits.
type configuration struct {
	jobs    chan func()
	ended   chan struct{} // closed when the owner has ended
	inForce atomic.Pointer[inForce]
	files   atomic.Pointer[map[string]plan.Sum] // what the last apply read

	// The fields below belong to the owner.

	plan      *plan.Plan      // nil: none yet
	pools     []exchange.Pool // those of the plan
	leaving   []leavingPool   // no longer in the plan
	listeners []string        // names of those of the plan
}

// inForce is what readers may know. It is immutable.
type inForce struct {
	revision int64 // the newest that was in force as a whole, 0: none
	pools    []exchange.Pool
	snapshot *resealv1.Snapshot // what the plan was made of
}

func newConfiguration() configuration {
	return configuration{jobs: make(chan func()), ended: make(chan struct{})}
}

// own runs the owner until ctx ends.
func (e *Edge) own(ctx context.Context) error {
	defer close(e.apply.ended)
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case job := <-e.apply.jobs:
			e.guarded("a configuration was applied", job)
		case <-ticker.C:
			e.guarded("pools were ended", e.endLeavingPools)
		}
	}
}

// guarded logs a panic of f and goes on: what is served is worth more.
func (e *Edge) guarded(when string, f func()) {
	defer func() {
		if reason := recover(); reason != nil {
			e.cfg.Logger.Error("a panic while "+when, "reason", fmt.Sprint(reason), "stack", string(debug.Stack()))
		}
	}()
	f()
}

// do has the owner run a job and waits for its end. It reports false when there is
// no owner any more.
func (c *configuration) do(job func()) bool {
	done := make(chan struct{})
	select {
	case c.jobs <- func() { defer close(done); job() }:
		<-done
		return true
	case <-c.ended:
		return false
	}
}

// Apply makes a candidate the configuration in force, as much of it as this edge
// can serve, and says what it can't.
func (e *Edge) Apply(_ context.Context, candidate feed.Candidate) feed.Outcome {
	outcome := feed.Outcome{Violations: []*resealv1.Violation{{Description: "this edge is stopping"}}}
	if e.handover.given.Load() {
		return outcome
	}
	e.apply.do(func() { outcome = e.put(candidate) })
	return outcome
}

// unchanged moves the revision of the configuration in force: the newer one
// holds the same for this edge.
func (e *Edge) unchanged(revision int64) {
	e.apply.do(func() {
		now := &inForce{revision: revision, pools: e.apply.pools}
		if before := e.apply.inForce.Load(); before != nil {
			now.snapshot = before.snapshot
		}
		e.apply.inForce.Store(now)
	})
}

// running is what is in force, nil before anything is.
func (e *Edge) running() *resealv1.Snapshot {
	if now := e.apply.inForce.Load(); now != nil {
		return now.snapshot
	}
	return nil
}

// watchFiles looks at the files that the configuration names, and has it applied
// again when one is no longer as it was read.
func (e *Edge) watchFiles(ctx context.Context) error {
	ticker := time.NewTicker(fileInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-e.reload:
		}
		if name := e.changedFile(); name != "" {
			e.cfg.Logger.Info("a file of the configuration has changed", "file", name)
			e.feed.Again()
		}
	}
}

// changedFile is the name of a file that changed, or "".
func (e *Edge) changedFile() string {
	read := e.apply.files.Load()
	if read == nil {
		return ""
	}
	var found atomic.Pointer[string]
	var group errgroup.Group
	group.SetLimit(lookAtOnce)
	for name, sum := range *read {
		group.Go(func() error {
			e.guarded("a file was looked at", func() {
				if plan.SumOf(e.files.Read(name)) != sum {
					found.Store(&name)
				}
			})
			return nil
		})
	}
	_ = group.Wait() // no function fails
	if name := found.Load(); name != nil {
		return *name
	}
	return ""
}
