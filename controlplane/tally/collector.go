package tally

import (
	"github.com/prometheus/client_golang/prometheus"
)

// The metrics are sums over the fleet, and so have names of their own: with those of
// the edges' metrics, whoever scrapes both would count everything twice.
var (
	handshakesDesc = prometheus.NewDesc("reseal_fleet_tls_handshakes_total",
		"TLS handshakes of the fleet, health checks included.", []string{"side", "pool", "listener", "result", "mechanism"}, nil)
	missesDesc = prometheus.NewDesc("reseal_fleet_tls_resumption_misses_total",
		"Full TLS handshakes of the fleet by the reason why they were not resumed.", []string{"side", "pool", "listener", "reason"}, nil)
	closedDesc = prometheus.NewDesc("reseal_fleet_backend_connections_closed_total",
		"Connections of the fleet to backends by how they ended.", []string{"pool", "how"}, nil)
	connectionsDesc = prometheus.NewDesc("reseal_fleet_backend_connections",
		"Open connections of the fleet to backends.", []string{"pool", "state"}, nil)
	requestsDesc = prometheus.NewDesc("reseal_fleet_backend_requests_total",
		"Requests of the fleet to backends, by whether the connection had served one before.", []string{"pool", "reused"}, nil)
)

// collector shows the totals of the fleet, since the start of this control plane and
// of the edges that it knows.
type collector struct{ server *Server }

func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{handshakesDesc, missesDesc, closedDesc, connectionsDesc, requestsDesc} {
		descs <- desc
	}
}

func (c *collector) Collect(metrics chan<- prometheus.Metric) {
	out := sink{metrics}
	pools, listeners := c.server.fleet()
	for name, total := range pools {
		out.handshakes(total, "backend", name, "")
		out.pool(total)
	}
	for name, total := range listeners {
		out.handshakes(total, "frontend", "", name)
	}
}

type sink struct{ metrics chan<- prometheus.Metric }

func (s sink) counter(desc *prometheus.Desc, value uint64, labels ...string) {
	s.metrics <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value), labels...)
}

func (s sink) handshakes(c *counters, side, pool, listener string) {
	for _, row := range []struct {
		place             int
		result, mechanism string
	}{
		{full, "full", "none"},
		{resumedSessionID, "resumed", "session_id"},
		{resumedTicket, "resumed", "ticket"},
		{resumedPSK, "resumed", "psk"},
		{failed, "failed", "none"},
	} {
		s.counter(handshakesDesc, c.plain[row.place], side, pool, listener, row.result, row.mechanism)
	}
	for _, miss := range c.shares[byMiss] {
		s.counter(missesDesc, miss.count, side, pool, listener, miss.key)
	}
}

func (s sink) pool(c *counters) {
	for _, kind := range c.shares[byClose] {
		s.counter(closedDesc, kind.count, c.name, kind.key)
	}
	for state, value := range map[string]int64{"active": c.active, "idle": c.idle} {
		s.metrics <- prometheus.MustNewConstMetric(connectionsDesc, prometheus.GaugeValue, float64(value), c.name, state)
	}
	again := min(c.plain[reused], c.plain[requests])
	s.counter(requestsDesc, again, c.name, "true")
	s.counter(requestsDesc, c.plain[requests]-again, c.name, "false")
}
