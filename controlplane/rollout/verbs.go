package rollout

import (
	"errors"
	"fmt"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// errNothing means that an order does not fit where the rollout stands.
var errNothing = errors.New("there is nothing to do")

// Pause holds the candidate where it is.
func (r *Record) Pause(now time.Time, by, reason string) (*Record, error) {
	if r.Phase != resealv1.Rollout_PHASE_RUNNING {
		return nil, fmt.Errorf("%w: no change is on its way, revision %d is %s", errNothing, r.Candidate, resealv1.Label(r.Phase))
	}
	return r.ordered(now, resealv1.Rollout_PHASE_PAUSED, by, reason), nil
}

// Resume lets the candidate go on, one that was undone from the start.
func (r *Record) Resume(now time.Time, by string) (*Record, error) {
	switch r.Phase {
	case resealv1.Rollout_PHASE_PAUSED, resealv1.Rollout_PHASE_HALTED:
	case resealv1.Rollout_PHASE_UNDONE:
		// Stage 0 has nobody, and ends at once.
		next := r.ordered(now, resealv1.Rollout_PHASE_RUNNING, by, "")
		next.Stage, next.Until, next.All, next.Moved, next.Soak, next.Begun, next.Retried = 0, 0, false, 0, 0, now, now
		return next, nil
	default:
		return nil, fmt.Errorf("%w: revision %d is %s", errNothing, r.Candidate, resealv1.Label(r.Phase))
	}
	next := r.ordered(now, resealv1.Rollout_PHASE_RUNNING, by, "")
	if r.Phase == resealv1.Rollout_PHASE_HALTED {
		next.Retried = now
	}
	return next, nil
}

// Undo takes the candidate back.
func (r *Record) Undo(now time.Time, by, reason string) (*Record, error) {
	if !r.underWay() {
		return nil, fmt.Errorf("%w: revision %d is %s; to take back a change that all edges have, use rollback",
			errNothing, r.Candidate, resealv1.Label(r.Phase))
	}
	if reason == "" {
		reason = "undone by " + by
	}
	next := r.ordered(now, resealv1.Rollout_PHASE_UNDONE, by, reason)
	next.verdict()
	return next, nil
}

func (r *Record) ordered(now time.Time, phase resealv1.Rollout_Phase, by, reason string) *Record {
	next := *r
	next.Phase, next.Entered, next.By, next.Reason = phase, now, by, reason
	return &next
}
