package edge

import (
	"context"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/probe"
	"github.com/reseal/reseal/edge/session"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// probe finds out what an endpoint can do, if a pool in force has it. It uses
// sessions of its own, so that no session of the pool is lost to it.
func (e *Edge) probe(ctx context.Context, order *resealv1.ProbeOrder) *resealv1.ProbeReport {
	var pool *exchange.Pool
	if now := e.apply.inForce.Load(); now != nil {
		for i := range now.pools {
			if now.pools[i].Name == order.GetPool() {
				pool = &now.pools[i]
			}
		}
	}
	return probe.CarryOut(ctx, order, pool, func() probe.Handshaker { return session.New(session.Config{}) })
}
