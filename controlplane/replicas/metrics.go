package replicas

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	unanswered prometheus.Counter
	moved      prometheus.Counter
}

func newMetrics(registerer prometheus.Registerer, g *Group) *metrics {
	factory := promauto.With(registerer)
	factory.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "reseal_replicas",
		Help: "Replicas of the control plane that this one knows, itself included.",
	}, func() float64 { return float64(len(g.known()) + 1) })
	return &metrics{
		moved: factory.NewCounter(prometheus.CounterOpts{
			Name: "reseal_replicas_moved_total",
			Help: "Edges that were asked to move to a replica that has fewer.",
		}),
		unanswered: factory.NewCounter(prometheus.CounterOpts{
			Name: "reseal_replicas_unanswered_total",
			Help: "Questions that another replica of the control plane did not answer in time.",
		}),
	}
}
