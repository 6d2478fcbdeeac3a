// Package tally counts what an edge does, for the control plane and for
// Prometheus. Counting takes no lock, but for clients' tickets: the counters of a
// pool or listener are looked up once and are atomic.
package tally

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxNames bounds pools and listeners, each. What is counted under further names
// is counted under otherName.
const maxNames = 4096

// otherName is the name of what is over a bound.
const otherName = "other"

// Tally holds the counters of an edge since its start. It is safe for concurrent
// use.
type Tally struct {
	handshakeSeconds      *prometheus.HistogramVec
	requestSeconds        *prometheus.HistogramVec
	backendRequestSeconds *prometheus.HistogramVec

	mu        sync.Mutex
	pools     map[string]*Counters
	listeners map[string]*Counters
}

// New makes a tally and registers its metrics, unless registerer is nil. It
// panics when they are registered already.
func New(registerer prometheus.Registerer) *Tally {
	factory := promauto.With(registerer)
	seconds := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	t := &Tally{
		handshakeSeconds: factory.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "reseal_tls_handshake_seconds",
			Help:    "Duration of TLS handshakes.",
			Buckets: seconds,
		}, []string{"side", "pool", "listener", "result"}),
		requestSeconds: factory.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "reseal_request_seconds",
			Help:    "Duration of clients' requests, or connections for protocol tls.",
			Buckets: seconds,
		}, []string{"listener"}),
		backendRequestSeconds: factory.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "reseal_backend_request_seconds",
			Help:    "Duration of requests to backends, or connections for protocol tcp.",
			Buckets: seconds,
		}, []string{"pool"}),
		pools:     map[string]*Counters{},
		listeners: map[string]*Counters{},
	}
	if registerer != nil {
		registerer.MustRegister(&collector{t})
	}
	return t
}

// Pool returns the counters of a pool: the same until Forget.
func (t *Tally) Pool(name string) *Counters {
	t.mu.Lock()
	defer t.mu.Unlock()
	return lookUp(t.pools, name, t.newPool)
}

// Listener returns the counters of a listener: the same until Forget.
func (t *Tally) Listener(name string) *Counters {
	t.mu.Lock()
	defer t.mu.Unlock()
	return lookUp(t.listeners, name, t.newListener)
}

func lookUp(all map[string]*Counters, name string, create func(string) *Counters) *Counters {
	if found := all[name]; found != nil {
		return found
	}
	if len(all) >= maxNames {
		name = otherName
		if found := all[name]; found != nil {
			return found
		}
	}
	made := create(name)
	all[name] = made
	return made
}

// Forget drops the counters of all pools and listeners but those named: the ones
// of the configuration in force. What is still counted on the dropped ones is
// shown nowhere. A name that comes back starts at 0.
func (t *Tally) Forget(pools, listeners []string) {
	inForce := func(names []string) map[string]bool {
		set := map[string]bool{otherName: true}
		for _, name := range names {
			set[name] = true
		}
		return set
	}
	keepPools, keepListeners := inForce(pools), inForce(listeners)
	t.mu.Lock()
	defer t.mu.Unlock()
	for name := range t.pools {
		if !keepPools[name] {
			delete(t.pools, name)
			t.handshakeSeconds.DeletePartialMatch(prometheus.Labels{"pool": name, "side": string(backend)})
			t.backendRequestSeconds.DeleteLabelValues(name)
		}
	}
	for name := range t.listeners {
		if !keepListeners[name] {
			delete(t.listeners, name)
			t.handshakeSeconds.DeletePartialMatch(prometheus.Labels{"listener": name, "side": string(frontend)})
			t.requestSeconds.DeleteLabelValues(name)
		}
	}
}

// Report reads all counters. Answers is the newest request of the control plane
// that the report answers.
func (t *Tally) Report(edge, bootID string, answers uint64) *resealv1.ReportRequest {
	report := &resealv1.ReportRequest{Edge: edge, BootId: bootID, Answers: answers, Time: timestamppb.Now()}
	for _, pool := range t.allPools() {
		report.Pools = append(report.Pools, pool.stats())
	}
	for _, listener := range t.allListeners() {
		report.Listeners = append(report.Listeners, listener.stats())
	}
	return report
}

// allPools are the pools, sorted by name.
func (t *Tally) allPools() []*Counters {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.SortedFunc(maps.Values(t.pools), func(a, b *Counters) int { return cmp.Compare(a.name, b.name) })
}

// allListeners are the listeners, sorted by name.
func (t *Tally) allListeners() []*Counters {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.SortedFunc(maps.Values(t.listeners), func(a, b *Counters) int { return cmp.Compare(a.name, b.name) })
}
