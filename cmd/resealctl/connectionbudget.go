package main

import (
	"context"
	"fmt"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// connectionBudget is how a pool's connections.maxPerFleet is shared out. All numbers
// are of connections to one endpoint.
type connectionBudget struct {
	MaxPerFleet uint32           `json:"maxPerFleet"`
	SharedOut   int64            `json:"sharedOut"`
	Shares      map[string]int64 `json:"shares"` // by edge
}

// budgetOf is nil without a limit.
func budgetOf(name string, pool *resealv1.BackendPool, stats *resealv1.GetStatsResponse) *connectionBudget {
	limit := pool.GetConnections().GetMaxPerFleet()
	if limit == 0 {
		return nil
	}
	b := &connectionBudget{MaxPerFleet: limit, Shares: map[string]int64{}}
	for _, edge := range stats.GetEdges() {
		if share := poolStats(edge.GetPools(), name).GetConnections().GetShare(); share > 0 {
			b.Shares[edge.GetEdge()] = share
			b.SharedOut += share
		}
	}
	return b
}

// exceeded says whether there are more edges than connections for them.
func (b *connectionBudget) exceeded() bool { return len(b.Shares) > int(b.MaxPerFleet) }

func (b *connectionBudget) String() string {
	if len(b.Shares) == 0 {
		return "no edge has told its share yet"
	}
	var least, most int64
	for _, share := range b.Shares {
		most = max(most, share)
		if least == 0 || share < least {
			least = share
		}
	}
	each := fmt.Sprint(least)
	if most > least {
		each = fmt.Sprintf("%d to %d", least, most)
	}
	text := fmt.Sprintf("%d of %d per endpoint shared out: %s each to %s", b.SharedOut, b.MaxPerFleet, each, plural(uint64(len(b.Shares)), "edge"))
	if b.exceeded() {
		text += "; exceeded, since each edge has at least 1"
	}
	return text
}

// connectionBudget asks for a pool's. Without an answer, or a limit, it is nil.
func (g *getter) connectionBudget(ctx context.Context, r *resealv1.Resource) *connectionBudget {
	name, pool := r.GetMetadata().GetName(), r.GetBackendPool()
	if pool.GetConnections().GetMaxPerFleet() == 0 {
		return nil
	}
	stats, err := g.client.tally.GetStats(ctx, &resealv1.GetStatsRequest{Name: name})
	if err != nil {
		return nil
	}
	return budgetOf(name, pool, stats)
}
