package backend

import (
	"math/rand/v2"
	"net/http"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// pick chooses the endpoint of a request. tried are endpoints that failed it
// already. Endpoints that are unhealthy, ejected or tried come in only when no
// better one is left, so a pool with endpoints never refuses a request for want
// of one. req is nil for tunnels. nil means that the pool has no endpoint with a
// weight.
func (p *pool) pick(state *poolState, call *exchange.Exchange, req *http.Request, tried []*endpoint) *endpoint {
	now := time.Now()
	available := func(e *endpoint) bool { return e.available(state.settings, now) }
	preferences := []func(*endpoint) bool{available, func(*endpoint) bool { return true }}
	if len(tried) > 0 {
		fresh := func(e *endpoint) bool { return !slices.Contains(tried, e) }
		preferences = []func(*endpoint) bool{
			func(e *endpoint) bool { return available(e) && fresh(e) }, available, fresh, preferences[1],
		}
	}
	for _, ok := range preferences {
		if e := p.choose(state, call, req, ok); e != nil {
			return e
		}
	}
	return nil
}

// choose applies the pool's algorithm to the endpoints that are ok and have a
// weight.
func (p *pool) choose(state *poolState, call *exchange.Exchange, req *http.Request, ok func(*endpoint) bool) *endpoint {
	switch state.settings.algorithm {
	case resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN:
		return p.rotate(state.members, ok)
	case resealv1.LoadBalancing_ALGORITHM_RING_HASH:
		return state.ring.find(state.settings.hash.of(call, req), ok)
	default:
		return leastLoaded(state.members, ok)
	}
}

// leastLoaded returns the endpoint with the fewest requests in flight per
// weight, a random one of several.
func leastLoaded(members []*member, ok func(*endpoint) bool) *endpoint {
	var best *member
	var bestLoad int64
	ties := 0
	for _, m := range members {
		if m.weight == 0 || !ok(m.endpoint) {
			continue
		}
		load := m.inFlight.Load()
		var order int64
		if best != nil {
			order = load*int64(best.weight) - bestLoad*int64(m.weight)
		}
		switch {
		case best == nil || order < 0:
			best, bestLoad, ties = m, load, 1
		case order == 0:
			ties++
			if rand.IntN(ties) == 0 {
				best, bestLoad = m, load
			}
		}
	}
	if best == nil {
		return nil
	}
	return best.endpoint
}

// rotate is smooth weighted round robin: each endpoint gains its weight, the
// one with the most goes and pays the sum.
func (p *pool) rotate(members []*member, ok func(*endpoint) bool) *endpoint {
	p.turns.Lock()
	defer p.turns.Unlock()
	var best *member
	total := 0
	for _, m := range members {
		if m.weight == 0 || !ok(m.endpoint) {
			continue
		}
		total += m.weight
		m.turn += m.weight
		if best == nil || m.turn > best.turn {
			best = m
		}
	}
	if best == nil {
		return nil
	}
	best.turn -= total
	return best.endpoint
}
