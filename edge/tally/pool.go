package tally

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Pool holds the counters of a backend pool. It is safe for concurrent use.
type Pool struct {
	leg
	requestSeconds prometheus.Observer
}

func (t *Tally) newPool(name string) *Pool {
	seconds := func(result string) prometheus.Observer {
		return t.handshakeSeconds.WithLabelValues(sideBackend, name, "", result)
	}
	return &Pool{
		leg: leg{
			name:        name,
			fullSeconds: seconds(resultFull), resumedSeconds: seconds(resultResumed), failedSeconds: seconds(resultFailed),
		},
		requestSeconds: t.backendRequestSeconds.WithLabelValues(name),
	}
}

// Request counts a finished request, or a connection for protocol tcp. Reused is
// whether its connection had served one before.
func (p *Pool) Request(reused bool, d time.Duration) {
	p.request(reused)
	p.requestSeconds.Observe(d.Seconds())
}
