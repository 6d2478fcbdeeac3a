package backend

import "time"

// available reports whether new requests should go to the endpoint.
func (e *endpoint) available(now time.Time) bool {
	return !e.unhealthy.Load() && !e.ejected(now)
}

func (e *endpoint) ejected(now time.Time) bool {
	until := e.ejectedUntil.Load()
	return until != 0 && now.UnixNano() < until
}

// succeeded notes a request that the endpoint served.
func (e *endpoint) succeeded() {
	if e.failures.Load() != 0 {
		e.failures.Store(0)
	}
}

// failed notes a connect failure, reset, time-out or 5xx answer, and ejects the
// endpoint after so many in a row.
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
		case m.ejected(now):
			out++
		case m.endpoint != e && m.weight > 0 && m.available(now):
			left++
		}
	}
	if e.ejected(now) || left == 0 || (out+1)*100 > total*state.settings.maxEjectShare {
		return false
	}
	e.ejectedUntil.Store(now.Add(state.settings.ejectTime).UnixNano())
	return true
}
