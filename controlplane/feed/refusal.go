package feed

import resealv1 "github.com/reseal/reseal/proto/reseal/v1"

// answer notes what an edge said to a revision, nil for an ack.
func (e *edge) answer(revision int64, nack *resealv1.Nack) {
	if e.answered != revision {
		e.before, e.answered = e.nack, revision
	}
	e.nack = nack
}

// refusedNewly says whether the newest answer refuses what the one to the revision before
// did not.
func (e *edge) refusedNewly() bool {
	if e.nack == nil {
		return false
	}
	if e.before == nil || e.before.GetPartly() && !e.nack.GetPartly() {
		return true
	}
	before := map[string]bool{}
	for _, violation := range e.before.GetViolations() {
		before[violation.GetResource().Key()+" "+violation.GetField()] = true
	}
	for _, violation := range e.nack.GetViolations() {
		if !before[violation.GetResource().Key()+" "+violation.GetField()] {
			return true
		}
	}
	return false
}
