package keyring

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

type metrics struct {
	rotations *prometheus.CounterVec // by keyring
	leader    prometheus.Gauge
}

func newMetrics(registerer prometheus.Registerer, st *state) *metrics {
	factory := promauto.With(registerer)
	m := &metrics{
		rotations: factory.NewCounterVec(prometheus.CounterOpts{
			Name: "reseal_keyring_rotations_total",
			Help: "Epochs that this replica made active.",
		}, []string{"keyring"}),
		leader: factory.NewGauge(prometheus.GaugeOpts{
			Name: "reseal_keyring_leader",
			Help: "1 while this replica is the one that rotates.",
		}),
	}
	if registerer != nil {
		registerer.MustRegister(&ageCollector{st})
	}
	return m
}

var ageDesc = prometheus.NewDesc("reseal_keyring_epoch_age_seconds",
	"Time since an epoch entered its state. Of the retired ones: the oldest.", []string{"keyring", "state"}, nil)

// ageCollector reads what is true at the moment of the scrape.
type ageCollector struct{ state *state }

func (c *ageCollector) Describe(descs chan<- *prometheus.Desc) { descs <- ageDesc }

func (c *ageCollector) Collect(metrics chan<- prometheus.Metric) {
	now := time.Now()
	c.state.mu.Lock()
	defer c.state.mu.Unlock()
	for _, k := range c.state.specs {
		found := c.state.current(k)
		if found == nil || found.record == nil {
			continue
		}
		ages := map[resealv1.EpochState]time.Duration{}
		for _, e := range found.Epochs {
			ages[e.State] = max(ages[e.State], now.Sub(e.entered()), 0)
		}
		for state, age := range ages {
			metrics <- prometheus.MustNewConstMetric(ageDesc, prometheus.GaugeValue, age.Seconds(), k.name, resealv1.Label(state))
		}
	}
}

// entered is when the epoch came into its state.
func (e Epoch) entered() time.Time {
	switch e.State {
	case resealv1.EpochState_EPOCH_STATE_ACTIVE:
		return e.ActivatedAt
	case resealv1.EpochState_EPOCH_STATE_RETIRED:
		return e.RetiredAt
	}
	return e.PreparedAt
}
