package backend

import (
	"maps"

	"github.com/reseal/reseal/edge/exchange"
)

// Of connections.maxPerFleet an edge has a share, which the control plane tells beside
// the configuration. It bounds an endpoint's connections as maxPerEndpoint does.

// Share says how many connections to each endpoint pools may have of their
// connections.maxPerFleet, by the pool's name, in place of what was said before. Pools
// that are not named keep to what they had. Connections beyond a share are closed when
// they are idle.
func (b *Backend) Share(shares map[string]int) {
	b.updating.Lock()
	defer b.updating.Unlock()
	b.shares = maps.Clone(shares)
	if b.closed.Load() {
		return
	}
	for name, p := range *b.pools.Load() {
		state := p.state.Load()
		if told := shares[name]; told > 0 && state.settings.maxPerFleet > 0 && told != p.share {
			p.update(state.spec)
		}
	}
}

// entitle bounds settings by the pool's share. Backend.updating is held.
func (p *pool) entitle(next *settings) {
	told := p.b.shares[p.name]
	switch {
	case next.maxPerFleet == 0:
		p.setShare(0)
		return
	case told > 0:
		p.setShare(told)
	case p.state.Load() == nil:
		// What others have is not known. It will be, as a rule before there is a request.
		p.setShare(1)
	case p.share == 0:
		// Requests that are served now must not wait until a share is told.
		p.setShare(next.maxPerFleet)
	}
	next.maxOpen = min(next.maxOpen, next.maxPerFleet, p.share)
}

func (p *pool) setShare(share int) {
	if share != p.share {
		p.counters.Add(exchange.Share.At(), int64(share-p.share))
		p.share = share
	}
}
