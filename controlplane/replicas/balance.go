package replicas

import (
	"cmp"
	"context"
	"slices"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// balanceInterval is the time between two looks at how edges are spread. It is
	// longer than numbers of edges take to be known to all.
	balanceInterval = 5 * time.Second
	// settled is how long a replica must have run to be given edges of others: those
	// that look for a replica by themselves find it meanwhile.
	settled = 15 * time.Second
	// A replica that stops asks its edges to move at this rate, per second, so that
	// the others are not overrun, and is done after moveOut however many they are.
	moveOutRate = 500
	moveOut     = 5 * time.Second
)

// Mover asks n of the edges that are connected to this replica to move, and returns
// how many were asked.
type Mover func(ctx context.Context, n int, move *resealv1.Move) int

// surplus is how many of its edges a replica asks to move now, when the others have
// so many: none unless it has a tenth more than its share, and some other two fewer;
// then at most a sixtieth of its share at a time, a fifth of it in a minute.
func surplus(own int, others []int) int {
	if len(others) == 0 {
		return 0
	}
	total := own
	for _, n := range others {
		total += n
	}
	share := (total + len(others)) / (len(others) + 1) // rounded up
	over := own - share
	if over < max(share/10, 1) || own-slices.Min(others) < 2 {
		return 0
	}
	return min(over, max(share/60, 1))
}

// Balance asks edges to move to replicas that have fewer, a few at a time, until ctx
// ends. It returns nil.
func (g *Group) Balance(ctx context.Context, move Mover) error {
	ticker := time.NewTicker(balanceInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		replicas := g.takers(time.Now())
		var counts []int
		for _, r := range replicas {
			counts = append(counts, r.Edges)
		}
		n := surplus(g.config.Edges(), counts)
		if n == 0 {
			continue
		}
		if asked := move(ctx, n, &resealv1.Move{Addresses: replicas[0].addresses(), Reason: "another replica has fewer edges"}); asked > 0 {
			g.metrics.moved.Add(float64(asked))
			g.config.Logger.Debug("edges are asked to move", "edges", asked, "to", replicas[0].ID)
		}
	}
}

// takers are the other replicas that may be given edges, those with the fewest first.
func (g *Group) takers(now time.Time) []record {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.self.Leaving {
		return nil
	}
	var found []record
	for _, p := range g.peers {
		if p.lost.IsZero() && !p.said.Leaving && now.Sub(p.said.StartedAt) >= settled {
			found = append(found, p.said)
		}
	}
	slices.SortFunc(found, func(a, b record) int { return cmp.Or(cmp.Compare(a.Edges, b.Edges), cmp.Compare(a.ID, b.ID)) })
	return found
}

// addresses are those under which edges may know a replica.
func (r *record) addresses() []string { return append([]string{r.Address}, r.Advertised...) }

// MoveOut tells the others that this replica is about to stop, and has its edges move
// to them, at a rate that they bear: it takes 5 s at most, and nothing when there is
// no other replica.
func (g *Group) MoveOut(ctx context.Context, move Mover) {
	g.Leave(ctx)
	g.moveOut(ctx, move)
}

func (g *Group) moveOut(ctx context.Context, move Mover) {
	ctx, cancel := context.WithTimeout(ctx, moveOut)
	defer cancel()
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	edges := g.config.Edges()
	batch := max(moveOutRate/10, edges/int(moveOut/(100*time.Millisecond)-10), 1)
	asked := 0
	for left := edges; left > 0 && g.served(); left = g.config.Edges() {
		if asked >= 3*edges {
			return // those that are left know no other replica
		}
		asked += move(ctx, min(batch, left), &resealv1.Move{Reason: "this replica stops"})
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// served tells whether there is another replica that serves.
func (g *Group) served() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.peers {
		if p.lost.IsZero() && !p.said.Leaving {
			return true
		}
	}
	return false
}
