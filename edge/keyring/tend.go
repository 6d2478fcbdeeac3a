package keyring

import (
	"context"
	"time"
)

const (
	// clockGrace is how much later an edge with a control plane erases by its own
	// clock: the control plane's word comes first then, and the clock only counts
	// when the control plane has stopped rotating.
	clockGrace = 5 * time.Minute
	// maxPause bounds how long tend sleeps: the wall clock, which it must
	// follow, may be set.
	maxPause = time.Minute
)

// tend erases what is due and says when the issuing of tickets stops and starts.
func (h *Holder) tend(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.woken:
		case <-timer.C:
		}
		now := time.Now()
		timer.Reset(min(max(h.sweep(now).Sub(now), 0), maxPause))
	}
}

// sweep erases what is due at now and returns when the next is.
func (h *Holder) sweep(now time.Time) (next time.Time) {
	next = now.Add(maxPause)
	soonest := func(t time.Time) {
		if t.After(now) && t.Before(next) {
			next = t
		}
	}
	h.mu.Lock()
	var said notes
	erased := false
	for _, ring := range h.sorted() {
		if ring.active != nil {
			soonest(ring.staleAt())
		}
		said = append(said, h.noteStale(ring, now)...)
		for _, number := range ring.numbers() {
			e := ring.epochs[number]
			if !h.ended(ring, e, now) {
				soonest(h.end(ring, e))
				continue
			}
			ring.remove(e)
			erased = true
			said = append(said, func() {
				h.config.Logger.Info("a ticket key is erased: its time is up by the edge's own clock", "keyring", ring.name, "epoch", number)
			})
		}
	}
	h.mu.Unlock()
	if erased {
		h.keeper.changed()
	}
	if len(said) > 0 {
		notify(h.expired)
	}
	said.log()
	return next
}

// end is when an epoch ends without the control plane's word. h.mu is held.
func (h *Holder) end(r *ring, e *epoch) time.Time {
	if h.connected {
		return r.due(e).Add(clockGrace)
	}
	return r.due(e)
}

// ended tells whether an epoch must not be used at now. h.mu is held.
func (h *Holder) ended(r *ring, e *epoch, now time.Time) bool {
	return !now.Before(h.end(r, e))
}

// noteStale notes when a ring stops issuing tickets or starts again. h.mu is
// held.
func (h *Holder) noteStale(r *ring, now time.Time) notes {
	stale := !r.issuing(now)
	if stale == r.stale {
		return nil
	}
	r.stale = stale
	log, active := h.config.Logger.With("keyring", r.name), r.activeNumber()
	if !stale {
		return notes{func() { log.Info("tickets are issued again", "active_epoch", active) }}
	}
	if active == 0 {
		return notes{func() { log.Error("no tickets are issued: no epoch of the keyring is active") }}
	}
	age, limit := now.Sub(r.active.activatedAt).Round(time.Second), r.maxActiveAge
	return notes{func() {
		log.Error("no tickets are issued any more: no newer key has come from the control plane for too long; tickets that clients hold are still accepted",
			"active_epoch", active, "age", age, "max_active_age", limit)
	}}
}
