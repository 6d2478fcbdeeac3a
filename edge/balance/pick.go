package balance

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Pick chooses the endpoint of a request. tried are endpoints that failed it
// already. Endpoints that are unhealthy, ejected or tried come in only when no
// better one is left, so a pool with endpoints never refuses a request for want
// of one. req is nil for tunnels. nil means that no endpoint has a weight.
func (v *View) Pick(x *exchange.Exchange, req *exchange.Request, tried []*Endpoint) *Endpoint {
	now := time.Now()
	available := func(e *Endpoint) bool { return v.Available(e, now) }
	preferences := []func(*Endpoint) bool{available, func(*Endpoint) bool { return true }}
	if len(tried) > 0 {
		fresh := func(e *Endpoint) bool { return !slices.Contains(tried, e) }
		preferences = []func(*Endpoint) bool{
			func(e *Endpoint) bool { return available(e) && fresh(e) }, available, fresh, preferences[1],
		}
	}
	for _, ok := range preferences {
		if e := v.choose(x, req, ok); e != nil {
			return e
		}
	}
	return nil
}

// choose applies the pool's algorithm to the endpoints that are ok and have a
// weight.
func (v *View) choose(x *exchange.Exchange, req *exchange.Request, ok func(*Endpoint) bool) *Endpoint {
	switch v.rules.algorithm {
	case resealv1.LoadBalancing_ALGORITHM_ROUND_ROBIN:
		return v.rotate(ok)
	case resealv1.LoadBalancing_ALGORITHM_RING_HASH:
		return v.ring.find(v.rules.hash.of(x, req), ok)
	default:
		return leastLoaded(v.members, ok)
	}
}

// leastLoaded returns the endpoint with the fewest requests in flight per
// weight, a random one of several.
func leastLoaded(members []*member, ok func(*Endpoint) bool) *Endpoint {
	var best *member
	var bestLoad int64
	ties := 0
	for _, m := range members {
		if m.weight == 0 || !ok(m.Endpoint) {
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
	return best.Endpoint
}

// rotate is smooth weighted round robin: each endpoint gains its weight, the
// one with the most goes and pays the sum.
func (v *View) rotate(ok func(*Endpoint) bool) *Endpoint {
	v.turns.Lock()
	defer v.turns.Unlock()
	var best *member
	total := 0
	for _, m := range v.members {
		if m.weight == 0 || !ok(m.Endpoint) {
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
	return best.Endpoint
}
