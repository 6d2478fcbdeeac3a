package feed

import (
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// sharing is what an edge is told of its shares of connections.maxPerFleet. It is
// immutable.
type sharing struct {
	of    *generation          // that the edge is to serve
	pools []*resealv1.Resource // of it, that the edge has and that have a limit, by name
	told  *resealv1.ConnectionShares
}

func budgetOf(pool *resealv1.Resource) uint32 {
	return pool.GetBackendPool().GetConnections().GetMaxPerFleet()
}

// limitedPools are those of found that have a limit, sorted by name.
func limitedPools(found map[string]*resealv1.Resource) []*resealv1.Resource {
	var pools []*resealv1.Resource
	for _, key := range slices.Sorted(maps.Keys(found)) {
		if budgetOf(found[key]) > 0 {
			pools = append(pools, found[key])
		}
	}
	return pools
}

// shares are those of an edge that are known, nil when none are.
func (s *Server) shares(edge string, pools []*resealv1.Resource) *resealv1.ConnectionShares {
	var all *resealv1.ConnectionShares
	for _, pool := range pools {
		name := pool.GetMetadata().GetName()
		share, ok := s.config.Share(edge, name, budgetOf(pool))
		if !ok {
			continue
		}
		if all == nil {
			all = &resealv1.ConnectionShares{}
		}
		all.Pools = append(all.Pools, &resealv1.ConnectionShare{Pool: name, Connections: share})
	}
	return all
}

// shares is what the edge has to be told of its shares, before it gets the generation
// that is wanted; nil when it knows.
func (c *session) shares(wanted *generation) *resealv1.SyncResponse {
	now := sharing{}
	if before := c.sharing.Load(); before != nil {
		now = *before
	}
	if c.server.config.Share == nil || now.of == nil && !wanted.limited {
		return nil
	}
	if now.of != wanted {
		held, err := c.view(wanted)
		if err != nil {
			return nil // the update will tell
		}
		now.of, now.pools = wanted, held.limited
	}
	next := c.server.shares(c.id, now.pools)
	news := next != nil && !proto.Equal(next, now.told)
	if news {
		now.told = next
	}
	c.sharing.Store(&now)
	if c.outdated(&now) {
		c.line.Wake() // they have changed since, and Reshare did not see what was told
	}
	if !news {
		return nil
	}
	return &resealv1.SyncResponse{Message: &resealv1.SyncResponse_ConnectionShares{ConnectionShares: next}}
}

// outdated says whether the edge's shares are others than it was told.
func (c *session) outdated(known *sharing) bool {
	next := c.server.shares(c.id, known.pools)
	return next != nil && !proto.Equal(next, known.told)
}

// Reshare has the edges told of their shares whose shares are others than they were
// told. It does not block.
func (s *Server) Reshare() {
	for _, stream := range s.table.streams() {
		if known := stream.sharing.Load(); known != nil && stream.outdated(known) {
			stream.line.Wake()
		}
	}
}
