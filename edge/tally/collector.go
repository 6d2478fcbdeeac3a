package tally

import (
	"github.com/prometheus/client_golang/prometheus"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// The label pool is empty on the frontend, listener on the backend.
var (
	handshakesDesc = prometheus.NewDesc("reseal_tls_handshakes_total",
		"TLS handshakes, health checks included.", []string{"side", "pool", "listener", "result", "mechanism", "version"}, nil)
	missesDesc = prometheus.NewDesc("reseal_tls_resumption_misses_total",
		"Full TLS handshakes by the reason why they were not resumed.", []string{"side", "pool", "listener", "reason"}, nil)
	backendOpenedDesc = prometheus.NewDesc("reseal_backend_connections_opened_total",
		"Connections opened to backends.", []string{"pool"}, nil)
	backendClosedDesc = prometheus.NewDesc("reseal_backend_connections_closed_total",
		"Connections to backends by how they ended and who closed first.", []string{"pool", "how", "by"}, nil)
	backendConnectionsDesc = prometheus.NewDesc("reseal_backend_connections",
		"Open connections to backends.", []string{"pool", "state"}, nil)
	backendRequestsDesc = prometheus.NewDesc("reseal_backend_requests_total",
		"Requests to backends, by whether the connection had served one before.", []string{"pool", "reused"}, nil)
	backendErrorsDesc = prometheus.NewDesc("reseal_backend_errors_total",
		"Requests that failed on the backend leg.", []string{"pool", "reason"}, nil)
	backendPrivateDesc = prometheus.NewDesc("reseal_backend_connections_private_total",
		"Connections to backends that became one client's own, because NTLM or Negotiate authenticates them.", []string{"pool"}, nil)
	frontendOpenedDesc = prometheus.NewDesc("reseal_frontend_connections_opened_total",
		"Connections accepted from clients.", []string{"listener"}, nil)
	frontendConnectionsDesc = prometheus.NewDesc("reseal_frontend_connections",
		"Open connections of clients.", []string{"listener", "state"}, nil)
	frontendErrorsDesc = prometheus.NewDesc("reseal_frontend_errors_total",
		"Requests that failed on the frontend leg.", []string{"listener", "reason"}, nil)
	requestsDesc = prometheus.NewDesc("reseal_requests_total",
		"Requests of clients by status code; 0 is a connection of protocol tls that ended well.", []string{"listener", "code"}, nil)
)

// collector reads the counters for a scrape.
type collector struct{ tally *Tally }

func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		handshakesDesc, missesDesc, backendOpenedDesc, backendClosedDesc, backendConnectionsDesc, backendRequestsDesc,
		backendErrorsDesc, backendPrivateDesc, frontendOpenedDesc, frontendConnectionsDesc, frontendErrorsDesc, requestsDesc,
	} {
		descs <- desc
	}
}

func (c *collector) Collect(metrics chan<- prometheus.Metric) {
	out := sink{metrics}
	for _, pool := range c.tally.allPools() {
		out.handshakes(pool.handshakes(), sideBackend, pool.name, "")
		out.pool(pool)
	}
	for _, listener := range c.tally.allListeners() {
		out.handshakes(listener.handshakes(), sideFrontend, "", listener.name)
		out.listener(listener)
	}
}

type sink struct{ metrics chan<- prometheus.Metric }

func (s sink) counter(desc *prometheus.Desc, value uint64, labels ...string) {
	s.metrics <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value), labels...)
}

func (s sink) gauge(desc *prometheus.Desc, value int64, labels ...string) {
	s.metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(max(value, 0)), labels...)
}

// handshakes shows the usual counters even at 0, so that the first
// handshake shows as an increase. Others show when they count something.
func (s sink) handshakes(read *handshakes, side, pool, listener string) {
	for version := range versions {
		label := versionLabels[version]
		if count := read.fullIn(version); count > 0 || version != versionOther {
			s.counter(handshakesDesc, count, side, pool, listener, resultFull, "none", label)
		}
		for mechanism := 1; mechanism < mechanisms; mechanism++ {
			count := read.resumed[mechanism][version]
			if count > 0 || usual(resealv1.Mechanism(mechanism), version) {
				s.counter(handshakesDesc, count, side, pool, listener, resultResumed, resealv1.Label(resealv1.Mechanism(mechanism)), label)
			}
		}
	}
	s.counter(handshakesDesc, read.failed, side, pool, listener, resultFailed, "none", "")
	for miss := range read.full {
		if count := read.fullBy(miss); count > 0 {
			s.counter(missesDesc, count, side, pool, listener, missLabel(miss))
		}
	}
}

func usual(mechanism resealv1.Mechanism, version int) bool {
	switch version {
	case version12:
		return mechanism != resealv1.Mechanism_MECHANISM_PSK
	case version13:
		return mechanism == resealv1.Mechanism_MECHANISM_PSK
	default:
		return false
	}
}

func (s sink) pool(pool *Pool) {
	s.counter(backendOpenedDesc, pool.opened.Load(), pool.name)
	for kind := 1; kind < closeKinds; kind++ {
		for by := range closers {
			if count := pool.closed[kind][by].Load(); count > 0 {
				s.counter(backendClosedDesc, count, pool.name, resealv1.Label(resealv1.CloseKind(kind)), closerLabels[by])
			}
		}
	}
	s.gauge(backendConnectionsDesc, pool.active.Load(), pool.name, "active")
	s.gauge(backendConnectionsDesc, pool.idle.Load(), pool.name, "idle")
	// Read in this order, reused is never more than all.
	reused := pool.reused.Load()
	s.counter(backendRequestsDesc, reused, pool.name, "true")
	s.counter(backendRequestsDesc, pool.requests.Load()-reused, pool.name, "false")
	s.counter(backendPrivateDesc, pool.private.Load(), pool.name)
	for reason, count := range pool.errors.read() {
		s.counter(backendErrorsDesc, count, pool.name, reason)
	}
}

func (s sink) listener(listener *Listener) {
	s.counter(frontendOpenedDesc, listener.opened.Load(), listener.name)
	s.gauge(frontendConnectionsDesc, listener.active.Load(), listener.name, "active")
	s.gauge(frontendConnectionsDesc, listener.idle.Load(), listener.name, "idle")
	for code := range listener.codes {
		if count := listener.codes[code].Load(); count > 0 {
			s.counter(requestsDesc, count, listener.name, codeLabel(code))
		}
	}
	for reason, count := range listener.errors.read() {
		s.counter(frontendErrorsDesc, count, listener.name, reason)
	}
}
