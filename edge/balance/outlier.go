package balance

import (
	"cmp"
	"slices"
	"time"
)

// Available reports whether new requests should go to the endpoint.
func (v *View) Available(e *Endpoint, now time.Time) bool {
	return !v.Unhealthy(e) && !v.Ejected(e, now)
}

// Ejected reports whether the endpoint is out by the rules of now: a change of
// them also holds for ejections of before.
func (v *View) Ejected(e *Endpoint, now time.Time) bool {
	since := e.ejectedAt.Load()
	return since != 0 && v.rules.ejectAfter > 0 && now.Sub(time.Unix(0, since)) < v.rules.ejectTime
}

// Succeeded notes a request that the endpoint served.
func (e *Endpoint) Succeeded() {
	if e.failures.Load() != 0 {
		e.failures.Store(0)
	}
}

// Answered notes a response's status.
func (v *View) Answered(e *Endpoint, status int) {
	if slices.Contains(v.rules.ejectStatuses, status) {
		v.balancer.Failed(e)
	} else {
		e.Succeeded()
	}
}

// Failed notes a connect failure, reset, time-out or answer with one of the
// statuses that eject, and ejects the endpoint after so many in a row.
func (b *Balancer) Failed(e *Endpoint) {
	r := b.view.Load().rules
	n := int(e.failures.Add(1))
	if r.ejectAfter == 0 || n < r.ejectAfter {
		return
	}
	if b.eject(e) {
		e.failures.Store(0)
		b.cfg.Logger.Warn("endpoint ejected", "pool", b.cfg.Pool, "endpoint", e.Address,
			"consecutive_errors", n, "for", r.ejectTime)
	}
}

// eject takes e out for ejectionTime unless too many endpoints are out already,
// or no available one would be left.
func (b *Balancer) eject(e *Endpoint) bool {
	b.ejecting.Lock()
	defer b.ejecting.Unlock()
	view, now := b.view.Load(), time.Now()
	total, out, left := 0, 0, 0
	for _, m := range view.members {
		total++
		switch {
		case view.Ejected(m.Endpoint, now):
			out++
		case m.Endpoint != e && m.weight > 0 && view.Available(m.Endpoint, now):
			left++
		}
	}
	if view.Ejected(e, now) || left == 0 || (out+1)*100 > total*view.rules.maxEjectShare {
		return false
	}
	e.ejectedAt.Store(now.UnixNano())
	return true
}

// readmit takes back what a new configuration would not have ejected, the
// earliest first.
func (b *Balancer) readmit() {
	b.ejecting.Lock()
	defer b.ejecting.Unlock()
	view, now := b.view.Load(), time.Now()
	var out []*Endpoint
	for _, m := range view.members {
		if view.Ejected(m.Endpoint, now) {
			out = append(out, m.Endpoint)
		} else {
			m.ejectedAt.Store(0)
		}
	}
	slices.SortFunc(out, func(a, b *Endpoint) int { return cmp.Compare(a.ejectedAt.Load(), b.ejectedAt.Load()) })
	for len(out)*100 > len(view.members)*view.rules.maxEjectShare {
		out[0].ejectedAt.Store(0)
		out = out[1:]
	}
}
