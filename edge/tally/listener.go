package tally

import (
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxCode is the first number that is not an HTTP status code.
const maxCode = 600

// Listener holds the counters of a listener. It is safe for concurrent use.
type Listener struct {
	leg
	epochs         *epochs
	codes          [maxCode + 1]atomic.Uint64 // the last is everything else
	requestSeconds prometheus.Observer
}

func (t *Tally) newListener(name string) *Listener {
	seconds := func(result string) prometheus.Observer {
		return t.handshakeSeconds.WithLabelValues(sideFrontend, "", name, result)
	}
	return &Listener{
		leg: leg{
			name:        name,
			fullSeconds: seconds(resultFull), resumedSeconds: seconds(resultResumed), failedSeconds: seconds(resultFailed),
		},
		epochs:         newEpochs(),
		requestSeconds: t.requestSeconds.WithLabelValues(name),
	}
}

// Request counts a finished request by its status code (RFC 9110 section 15),
// or a connection of protocol tls by the code that its end amounts to, 0 when
// all went well. Reused is whether the client's connection had served a request
// before.
func (l *Listener) Request(code int, reused bool, d time.Duration) {
	if code < 0 || code > maxCode {
		code = maxCode
	}
	l.codes[code].Add(1)
	l.request(reused)
	l.requestSeconds.Observe(d.Seconds())
}

func (l *Listener) stats() *resealv1.Stats {
	stats := l.leg.stats()
	stats.Epochs = l.epochs.stats()
	return stats
}

func codeLabel(code int) string {
	if code == maxCode {
		return otherName
	}
	return strconv.Itoa(code)
}
