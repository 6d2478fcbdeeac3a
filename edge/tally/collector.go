package tally

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Metrics that are not of one counter of the table. The label pool is empty on the
// frontend, listener on the backend.
var (
	handshakesDesc = prometheus.NewDesc("reseal_tls_handshakes_total",
		"TLS handshakes, health checks included.", []string{"side", "pool", "listener", "result", "mechanism", "version"}, nil)
	missesDesc = prometheus.NewDesc("reseal_tls_resumption_misses_total",
		"Full TLS handshakes by the reason why they were not resumed.", []string{"side", "pool", "listener", "reason"}, nil)
	errorDescs = map[side]*prometheus.Desc{
		frontend: prometheus.NewDesc("reseal_frontend_errors_total",
			"Requests that failed on the frontend leg.", []string{"listener", "reason"}, nil),
		backend: prometheus.NewDesc("reseal_backend_errors_total",
			"Requests that failed on the backend leg.", []string{"pool", "reason"}, nil),
	}
)

// shown is a counter with the metric that shows it.
type shown struct {
	counter *exchange.Counter
	cells   []exchange.Cell
	desc    *prometheus.Desc
	kind    prometheus.ValueType
}

// shownOf are the counters of a side that have a metric.
func shownOf(side side, owner string) []shown {
	var all []shown
	for _, counter := range exchange.Table() {
		metric := side.metric(counter)
		if metric.Name == "" {
			continue
		}
		labels := []string{owner}
		for _, label := range counter.Labels {
			labels = append(labels, label.Name)
		}
		kind := prometheus.CounterValue
		if counter.Gauge {
			kind = prometheus.GaugeValue
		}
		all = append(all, shown{counter, counter.Cells(), prometheus.NewDesc(metric.Name, metric.Help, labels, nil), kind})
	}
	return all
}

var shownBy = map[side][]shown{frontend: shownOf(frontend, "listener"), backend: shownOf(backend, "pool")}

// collector reads the counters for a scrape.
type collector struct{ tally *Tally }

func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	descs <- handshakesDesc
	descs <- missesDesc
	for side, all := range shownBy {
		descs <- errorDescs[side]
		for _, shown := range all {
			descs <- shown.desc
		}
	}
}

func (c *collector) Collect(metrics chan<- prometheus.Metric) {
	out := sink{metrics}
	for _, pool := range c.tally.allPools() {
		read := pool.read()
		out.handshakes(read, backend, pool.name, "")
		out.counters(pool, read)
	}
	for _, listener := range c.tally.allListeners() {
		read := listener.read()
		out.handshakes(read, frontend, "", listener.name)
		out.counters(listener, read)
	}
}

type sink struct{ metrics chan<- prometheus.Metric }

func (s sink) counter(desc *prometheus.Desc, value int64, labels ...string) {
	s.metrics <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value), labels...)
}

// counters shows the counters of the table, and the errors.
func (s sink) counters(c *Counters, read reading) {
	for _, shown := range shownBy[c.side] {
		for _, cell := range shown.cells {
			n := read.of(cell)
			if n == 0 && shown.counter.Rare {
				continue
			}
			if labels, ok := labelsOf(cell); ok {
				s.metrics <- prometheus.MustNewConstMetric(shown.desc, shown.kind, float64(n), append([]string{c.name}, labels...)...)
			}
		}
	}
	for reason, count := range c.errors.read() {
		s.counter(errorDescs[c.side], int64(count), c.name, reason)
	}
}

// labelsOf are the values of a cell's labels. It reports false for one that is not
// shown.
func labelsOf(cell exchange.Cell) (labels []string, ok bool) {
	for i, place := range cell.Places() {
		value := cell.Counter.Labels[i].Values[place]
		if value == "" {
			return nil, false
		}
		labels = append(labels, value)
	}
	return labels, true
}

// handshakes shows counters that are usual also at 0, so that the first
// handshake shows as an increase. Others show when they count something.
func (s sink) handshakes(read reading, side side, pool, listener string) {
	var fullIn [3]int64 // by version
	byReason := map[string]int64{}
	for _, cell := range exchange.Full.Cells() {
		n, at := read.of(cell), cell.Places()
		fullIn[at[1]] += n
		byReason[exchange.Full.Labels[0].Values[at[0]]] += n
	}
	for version, count := range fullIn {
		if count > 0 || version != exchange.TLSOther {
			s.counter(handshakesDesc, count, string(side), pool, listener, resultFull, "none", exchange.Full.Labels[1].Values[version])
		}
	}
	for _, cell := range exchange.Resumed.Cells() {
		n, at := read.of(cell), cell.Places()
		labels, ok := labelsOf(cell)
		if ok && (n > 0 || usual(resealv1.Mechanism(at[0]), at[1])) {
			s.counter(handshakesDesc, n, string(side), pool, listener, resultResumed, labels[0], labels[1])
		}
	}
	s.counter(handshakesDesc, read.of(exchange.Failed.At()), string(side), pool, listener, resultFailed, "none", "")
	for reason, count := range byReason {
		if count > 0 {
			s.counter(missesDesc, count, string(side), pool, listener, reason)
		}
	}
}

func usual(mechanism resealv1.Mechanism, version int) bool {
	switch version {
	case exchange.TLS12:
		return mechanism != resealv1.Mechanism_MECHANISM_PSK
	case exchange.TLS13:
		return mechanism == resealv1.Mechanism_MECHANISM_PSK
	default:
		return false
	}
}
