package balance

import (
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Rules are what a BackendPool says of the choice of endpoints.
type Rules struct {
	endpoints     []*resealv1.Endpoint
	dns           *resealv1.DNSEndpoints
	dnsRefresh    time.Duration
	algorithm     resealv1.LoadBalancing_Algorithm
	hash          hashSource
	ejectAfter    int
	ejectStatuses []int
	ejectTime     time.Duration
	maxEjectShare int // percent
	question      *question
	checkInterval time.Duration
	threshold     struct{ up, down int }
}

// NewRules reads a spec with defaults applied.
func NewRules(spec *resealv1.BackendPool) *Rules {
	outlier, check := spec.GetOutlierDetection(), spec.GetHealthCheck()
	r := &Rules{
		endpoints:     spec.GetEndpoints(),
		dns:           spec.GetDns(),
		dnsRefresh:    spec.GetDns().GetRefreshInterval().AsDuration(),
		algorithm:     spec.GetLoadBalancing().GetAlgorithm(),
		hash:          parseHashSource(spec.GetLoadBalancing().GetHashOn()),
		ejectAfter:    int(outlier.GetConsecutiveErrors()),
		ejectTime:     outlier.GetEjectionTime().AsDuration(),
		maxEjectShare: int(outlier.GetMaxEjectionPercent()),
		question:      questionOf(check),
		checkInterval: check.GetInterval().AsDuration(),
	}
	for _, status := range outlier.GetStatuses() {
		r.ejectStatuses = append(r.ejectStatuses, int(status))
	}
	r.threshold.up = int(check.GetHealthyThreshold())
	r.threshold.down = int(check.GetUnhealthyThreshold())
	return r
}

// LooksUp reports whether the endpoints come from DNS, so that ResolveLoop has
// something to do.
func (r *Rules) LooksUp() bool { return r.dns != nil }

// Checks reports whether there are health checks, so that CheckLoop has something
// to do.
func (r *Rules) Checks() bool { return r.question != nil }

// looksUp reports whether the rules ask for the addresses of dns.
func (r *Rules) looksUp(dns *resealv1.DNSEndpoints) bool {
	return r.dns != nil && dns != nil && r.dns.GetName() == dns.GetName() && r.dns.GetPort() == dns.GetPort()
}

// LoopsDiffer reports whether ResolveLoop and CheckLoop must start anew when other
// takes the place of r.
func (r *Rules) LoopsDiffer(other *Rules) bool {
	if r.LooksUp() != other.LooksUp() || r.Checks() != other.Checks() {
		return true
	}
	return r.LooksUp() && (!r.looksUp(other.dns) || r.dnsRefresh != other.dnsRefresh) ||
		r.Checks() && r.checkInterval != other.checkInterval
}
