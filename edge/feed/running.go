package feed

import (
	"bytes"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// ack says that held is in force, and what really is.
func (f *Feed) ack(held *holding) *resealv1.SyncRequest {
	ack := &resealv1.Ack{Revision: held.revision, RunningHash: f.running(held)}
	return &resealv1.SyncRequest{Message: &resealv1.SyncRequest_Ack{Ack: ack}}
}

// running is the hash of what is in force by the account of whoever serves it, not of
// this package. It is nil when that is not known.
func (f *Feed) running(held *holding) []byte {
	if f.config.Running == nil {
		return nil
	}
	running := f.config.Running()
	if running == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = running
	part, err := held.part(running.All(), f.inForce)
	if err != nil {
		return nil
	}
	return part.hash
}

// runs says whether held is what is really in force.
func (f *Feed) runs(held *holding) bool {
	return f.config.Running == nil || bytes.Equal(f.running(held), held.hash)
}

// tellRunning tells the control plane what is in force when that has changed without
// an answer. Whoever calls it holds applying, and nothing is refused.
func (f *Feed) tellRunning(held *holding) {
	if held == nil || f.config.Running == nil {
		return
	}
	f.mu.Lock()
	told, served := f.told, f.served == held.revision
	f.mu.Unlock()
	if served && f.config.Running() != told {
		f.tellLate(held, f.ack(held))
	}
}
