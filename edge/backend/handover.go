package backend

import "github.com/reseal/reseal/edge/balance"

// Health is what is known of the pools' endpoints, by pool and address, for the process
// that takes this one's place.
func (b *Backend) Health() map[string]map[string]balance.Health {
	all := map[string]map[string]balance.Health{}
	for name, p := range *b.pools.Load() {
		if known := p.balancer.Health(); len(known) > 0 {
			all[name] = known
		}
	}
	return all
}

// Inherit takes over what another process knew of endpoints of the present pools. It is
// called before Run.
func (b *Backend) Inherit(all map[string]map[string]balance.Health) {
	pools := *b.pools.Load()
	for name, known := range all {
		if p := pools[name]; p != nil {
			p.balancer.Inherit(known)
		}
	}
}
