package balance

import "time"

// Health is what a process knows of an endpoint and hands over to the one that takes
// its place.
type Health struct {
	// Failed is the health check that the endpoint fails, as one text; empty: none.
	Failed string `json:"failed,omitempty"`
	// EjectedAt is when it was ejected last; zero: never.
	EjectedAt time.Time `json:"ejected_at,omitzero"`
	// Errors are those of requests, in a row.
	Errors int32 `json:"errors,omitempty"`
}

// text tells questions apart.
func (q *question) text() string {
	return q.method + " " + q.path + " " + q.serverName + " " + q.statuses
}

// Health is what is known of the endpoints, by address, but for those of which nothing
// is.
func (b *Balancer) Health() map[string]Health {
	b.mu.Lock()
	defer b.mu.Unlock()
	known := map[string]Health{}
	for address, e := range b.endpoints {
		health := Health{Errors: e.failures.Load()}
		if failed := e.sick.Load(); failed != nil {
			health.Failed = failed.text()
		}
		if at := e.ejectedAt.Load(); at != 0 {
			health.EjectedAt = time.Unix(0, at)
		}
		if health != (Health{}) {
			known[address] = health
		}
	}
	return known
}

// Inherit takes over what another process knew. It counts for endpoints that come with
// the next look-up, too. A verdict counts if the present health check is the one that
// it is of. Call it before the endpoints are used.
func (b *Balancer) Inherit(known map[string]Health) {
	b.mu.Lock()
	b.inherited = known
	if view := b.view.Load(); view != nil {
		for _, m := range view.members {
			b.restore(m.Endpoint, view.rules)
		}
	}
	b.mu.Unlock()
}

// restore gives an endpoint what was inherited of it, once. b.mu is held.
func (b *Balancer) restore(e *Endpoint, rules *Rules) {
	health, ok := b.inherited[e.Address]
	if !ok {
		return
	}
	delete(b.inherited, e.Address)
	e.failures.Store(health.Errors)
	if !health.EjectedAt.IsZero() && !health.EjectedAt.After(time.Now()) {
		e.ejectedAt.Store(health.EjectedAt.UnixNano())
	}
	if rules.question != nil && rules.question.text() == health.Failed {
		e.sick.Store(rules.question)
	}
}
