package backend

// Usage is what a pool holds at the moment.
type Usage struct {
	// Open are the connections, and dials under way, by endpoint.
	Open map[string]int
	// Places are those of the pool's session identities.
	Places []string
	// Shared says that all endpoints share their sessions: there is one place.
	Shared bool
}

// Usage tells of a pool in force. It is empty when there is no such pool.
func (b *Backend) Usage(name string) Usage {
	p := (*b.pools.Load())[name]
	if p == nil {
		return Usage{}
	}
	state := p.state.Load()
	usage := Usage{Open: make(map[string]int, len(state.endpoints)), Shared: state.settings.poolScope}
	if usage.Shared {
		usage.Places = []string{poolPlace(state.spec.UID)}
	}
	for address, e := range state.endpoints {
		e.mu.Lock()
		usage.Open[address] = e.open
		e.mu.Unlock()
		if !usage.Shared {
			usage.Places = append(usage.Places, address)
		}
	}
	return usage
}
