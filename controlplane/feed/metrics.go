package feed

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

type metrics struct {
	resources   *prometheus.CounterVec // by kind
	updates     *prometheus.CounterVec // by type
	nacks       prometheus.Counter
	repairs     prometheus.Counter
	convergence prometheus.Histogram
}

func newMetrics(registerer prometheus.Registerer, s *Server) *metrics {
	factory := promauto.With(registerer)
	m := &metrics{
		resources: factory.NewCounterVec(prometheus.CounterOpts{
			Name: "reseal_feed_resources_sent_total",
			Help: "Resources sent to edges, by the kind of the update that held them.",
		}, []string{"kind"}),
		updates: factory.NewCounterVec(prometheus.CounterOpts{
			Name: "reseal_feed_updates_total",
			Help: "Updates sent to edges.",
		}, []string{"type"}),
		nacks: factory.NewCounter(prometheus.CounterOpts{
			Name: "reseal_feed_nacks_total",
			Help: "Updates that edges refused.",
		}),
		repairs: factory.NewCounter(prometheus.CounterOpts{
			Name: "reseal_feed_repairs_total",
			Help: "Configurations sent again to edges that served something else than they had acked.",
		}),
		convergence: factory.NewHistogram(prometheus.HistogramOpts{
			Name:    "reseal_convergence_seconds",
			Help:    "From the moment this replica learned of a revision to the last ack of the live edges.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
		}),
	}
	for _, kind := range []string{"full", "delta"} {
		m.resources.WithLabelValues(kind)
		m.updates.WithLabelValues(kind)
	}
	m.updates.WithLabelValues("empty")
	if registerer != nil {
		registerer.MustRegister(&stateCollector{s})
	}
	return m
}

var (
	edgesDesc = prometheus.NewDesc("reseal_edges",
		"Live edges by state.", []string{"state"}, nil)
	driftedDesc = prometheus.NewDesc("reseal_edges_drifted",
		"Live edges that serve something else than they acked.", nil, nil)
	revisionDesc = prometheus.NewDesc("reseal_config_revision",
		"The newest revision that edges should serve.", nil, nil)
)

// stateCollector reads what is true at the moment of the scrape.
type stateCollector struct{ server *Server }

func (c *stateCollector) Describe(descs chan<- *prometheus.Desc) {
	descs <- edgesDesc
	descs <- driftedDesc
	descs <- revisionDesc
}

func (c *stateCollector) Collect(metrics chan<- prometheus.Metric) {
	counts := c.server.table.countStates()
	for number := range resealv1.Edge_State_name {
		if state := resealv1.Edge_State(number); state != resealv1.Edge_STATE_UNSPECIFIED {
			metrics <- prometheus.MustNewConstMetric(edgesDesc, prometheus.GaugeValue, float64(counts[state]), resealv1.Label(state))
		}
	}
	metrics <- prometheus.MustNewConstMetric(driftedDesc, prometheus.GaugeValue, float64(c.server.table.countDrifted()))
	var revision int64
	if newest, _ := c.server.current(); newest != nil {
		revision = newest.revision()
	}
	metrics <- prometheus.MustNewConstMetric(revisionDesc, prometheus.GaugeValue, float64(revision))
}
