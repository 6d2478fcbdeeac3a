package keyring

import (
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

var (
	epochAge = prometheus.NewDesc("reseal_keyring_epoch_age_seconds",
		"Time since the newest epoch of a state entered it.", []string{"keyring", "state"}, nil)
	epochCount = prometheus.NewDesc("reseal_keyring_epochs",
		"Epochs that this edge holds.", []string{"keyring", "state"}, nil)
	stale = prometheus.NewDesc("reseal_keyring_stale",
		"1 when no tickets are issued because no newer key has come for too long or none is active.", []string{"keyring"}, nil)
	connected = prometheus.NewDesc("reseal_keyring_connected",
		"1 while the control plane's stream of ticket keys lives.", nil, nil)
)

// collector reads the metrics from the keys in force.
type collector struct{ holder *Holder }

// Describe implements prometheus.Collector.
func (c collector) Describe(into chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{epochAge, epochCount, stale, connected} {
		into <- desc
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(into chan<- prometheus.Metric) {
	now := time.Now()
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		into <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	flag := func(desc *prometheus.Desc, value bool, labels ...string) {
		number := 0.0
		if value {
			number = 1
		}
		gauge(desc, number, labels...)
	}
	c.holder.mu.RLock()
	defer c.holder.mu.RUnlock()
	flag(connected, c.holder.connected)
	for _, ring := range c.holder.sorted() {
		flag(stale, !ring.issuing(now), ring.name)
		counts, entered := map[resealv1.EpochState]int{}, map[resealv1.EpochState]time.Time{}
		for _, e := range ring.epochs {
			counts[e.state]++
			if at := e.entered(); at.After(entered[e.state]) {
				entered[e.state] = at
			}
		}
		for _, state := range slices.Sorted(maps.Keys(counts)) {
			gauge(epochCount, float64(counts[state]), ring.name, resealv1.Label(state))
			gauge(epochAge, now.Sub(entered[state]).Seconds(), ring.name, resealv1.Label(state))
		}
	}
}

// entered is when the epoch entered its state.
func (e *epoch) entered() time.Time {
	switch e.state {
	case resealv1.EpochState_EPOCH_STATE_ACTIVE:
		return e.activatedAt
	case resealv1.EpochState_EPOCH_STATE_RETIRED:
		return e.retiredAt
	default:
		return e.preparedAt
	}
}
