package rollout

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

type metrics struct {
	leader   prometheus.Gauge
	failures prometheus.Counter
}

func newMetrics(registerer prometheus.Registerer, s *Server) *metrics {
	factory := promauto.With(registerer)
	m := &metrics{
		leader: factory.NewGauge(prometheus.GaugeOpts{
			Name: "reseal_rollout_leader",
			Help: "1 while this replica rolls changes out.",
		}),
		failures: factory.NewCounter(prometheus.CounterOpts{
			Name: "reseal_rollout_failures_total",
			Help: "Changes that this replica stopped on their way to the edges.",
		}),
	}
	if registerer != nil {
		registerer.MustRegister(&collector{s})
	}
	return m
}

var (
	phaseDesc = prometheus.NewDesc("reseal_rollout_phase",
		"1 for the phase in which the newest rollout is.", []string{"phase"}, nil)
	stageDesc = prometheus.NewDesc("reseal_rollout_stage",
		"Number of the rollout's stage, from 1. 0: it needed none.", nil, nil)
	revisionDesc = prometheus.NewDesc("reseal_rollout_revision",
		"The revision that went to all edges (base) and the one on its way (candidate).", []string{"which"}, nil)
	edgesDesc = prometheus.NewDesc("reseal_rollout_edges",
		"Live edges that have the candidate (moved), and all (total). The leader tells, while a change is on its way.", []string{"which"}, nil)
)

// collector reads what is true at the moment of the scrape.
type collector struct{ server *Server }

func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{phaseDesc, stageDesc, revisionDesc, edgesDesc} {
		descs <- desc
	}
}

func (c *collector) Collect(out chan<- prometheus.Metric) {
	r := c.server.Record()
	if r == nil {
		return
	}
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	for number := range resealv1.Rollout_Phase_name {
		if phase := resealv1.Rollout_Phase(number); phase != resealv1.Rollout_PHASE_UNSPECIFIED {
			value := 0.0
			if phase == r.Phase {
				value = 1
			}
			gauge(phaseDesc, value, resealv1.Label(phase))
		}
	}
	gauge(stageDesc, float64(r.Stage))
	gauge(revisionDesc, float64(r.Base), "base")
	gauge(revisionDesc, float64(r.Candidate), "candidate")
	c.server.mu.Lock()
	seen := c.server.moved
	c.server.mu.Unlock()
	if r.underWay() {
		gauge(edgesDesc, float64(seen.moved), "moved")
		gauge(edgesDesc, float64(seen.edges), "total")
	}
}
