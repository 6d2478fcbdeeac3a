package backend

import (
	"cmp"
	"slices"
	"time"
)

// available reports whether new requests should go to the endpoint.
func (e *endpoint) available(s *settings, now time.Time) bool {
	return !e.unhealthy(s) && !e.ejected(s, now)
}

// ejected reports whether the endpoint is out by the present settings: a change
// of them also holds for earlier ejections.
func (e *endpoint) ejected(s *settings, now time.Time) bool {
	since := e.ejectedAt.Load()
	return since != 0 && s.ejectAfter > 0 && now.Sub(time.Unix(0, since)) < s.ejectTime
}

// succeeded notes a request that the endpoint served.
func (e *endpoint) succeeded() {
	if e.failures.Load() != 0 {
		e.failures.Store(0)
	}
}

// failed notes a connect failure, reset, time-out or answer with one of the
// statuses that eject, and ejects the endpoint after enough of them in a row.
func (e *endpoint) failed() {
	s := e.settings()
	n := int(e.failures.Add(1))
	if s.ejectAfter == 0 || n < s.ejectAfter {
		return
	}
	if e.pool.eject(e) {
		e.failures.Store(0)
		e.pool.b.cfg.Logger.Warn("endpoint ejected", "pool", e.pool.name, "endpoint", e.address,
			"consecutive_errors", n, "for", s.ejectTime)
	}
}

// eject takes e out for ejectionTime unless too many endpoints are out already,
// or no available one would be left.
func (p *pool) eject(e *endpoint) bool {
	p.ejectMu.Lock()
	defer p.ejectMu.Unlock()
	state, now := p.state.Load(), time.Now()
	total, out, left := 0, 0, 0
	for _, m := range state.members {
		total++
		switch {
		case m.ejected(state.settings, now):
			out++
		case m.endpoint != e && m.weight > 0 && m.available(state.settings, now):
			left++
		}
	}
	if e.ejected(state.settings, now) || left == 0 || (out+1)*100 > total*state.settings.maxEjectShare {
		return false
	}
	e.ejectedAt.Store(now.UnixNano())
	return true
}

// readmit takes back what a new configuration would not have ejected, the
// earliest first.
func (p *pool) readmit() {
	p.ejectMu.Lock()
	defer p.ejectMu.Unlock()
	state, now := p.state.Load(), time.Now()
	var out []*endpoint
	for _, m := range state.members {
		if m.ejected(state.settings, now) {
			out = append(out, m.endpoint)
		} else {
			m.ejectedAt.Store(0)
		}
	}
	slices.SortFunc(out, func(a, b *endpoint) int { return cmp.Compare(a.ejectedAt.Load(), b.ejectedAt.Load()) })
	for len(out)*100 > len(state.members)*state.settings.maxEjectShare {
		out[0].ejectedAt.Store(0)
		out = out[1:]
	}
}
