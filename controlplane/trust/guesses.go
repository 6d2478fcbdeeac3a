package trust

import (
	"context"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/peer"
)

const (
	// Failed enrolments a second from one address (IPv6: from one /64), and how many
	// may come at once. Successful ones don't count, and tokens that this replica
	// knows are never held up by others' failures.
	failuresPerSecond = 5
	failuresBurst     = 50
	// For all addresses together, since each of these asks the store.
	allFailuresPerSecond = 50
	allFailuresBurst     = 500
	// maxSources bounds the addresses that are remembered.
	maxSources = 4096
)

// guesses bounds the enrolments with tokens that are not known here. Each costs a
// look into the store, as another replica may have made the token a moment ago.
type guesses struct {
	all *rate.Limiter

	mu      sync.Mutex
	sources map[netip.Prefix]*rate.Limiter
}

func newGuesses() *guesses {
	return &guesses{all: rate.NewLimiter(allFailuresPerSecond, allFailuresBurst), sources: map[netip.Prefix]*rate.Limiter{}}
}

// allow tells whether one more may be looked at.
func (g *guesses) allow(source netip.Prefix) bool {
	g.mu.Lock()
	limiter := g.sources[source]
	if limiter == nil {
		if len(g.sources) >= maxSources {
			g.forgetLocked()
		}
		limiter = rate.NewLimiter(failuresPerSecond, failuresBurst)
		g.sources[source] = limiter
	}
	g.mu.Unlock()
	return limiter.Allow() && g.all.Allow()
}

// forgetLocked makes room: those that may fail a whole burst again, or else any.
func (g *guesses) forgetLocked() {
	looked := 0
	for source, limiter := range g.sources { // in a random order
		if looked++; limiter.Tokens() >= failuresBurst || looked > 16 {
			delete(g.sources, source)
			return
		}
	}
}

// sourceOf is where a call comes from: an IPv4 address, or the /64 of an IPv6 one,
// since that is what one customer has.
func sourceOf(ctx context.Context) netip.Prefix {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return netip.Prefix{}
	}
	tcp, ok := p.Addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	address, _ := netip.AddrFromSlice(tcp.IP)
	address = address.Unmap()
	bits := address.BitLen()
	if address.Is6() {
		bits = 64
	}
	prefix, _ := address.Prefix(bits)
	return prefix
}
