package frontend

import (
	"sync/atomic"

	"github.com/reseal/reseal/edge/exchange"
)

// What connections and requests are reckoned to hold, in bytes, rather too much
// than too little.
const (
	// connectionBytes are of an idle connection: TLS, buffers, goroutines.
	connectionBytes = 48 << 10
	// requestBase is of a request besides its header: goroutines and buffers on
	// both legs.
	requestBase = 64 << 10
	// headerFactor and fieldBytes are for the header, of which there are copies.
	headerFactor = 4
	fieldBytes   = 512
)

// memoryShare is the level up to which something is admitted, in percent of the
// limit: of what connections and requests are reckoned to hold, and of what the
// process is measured to use.
type memoryShare struct{ held, used int64 }

// Connections are refused first, so that a flood of them leaves the requests of
// those that are there alone. The first of those that are refused are told why,
// with a 503; the rest are closed.
var (
	forConnection = memoryShare{held: 60, used: 75}
	forRefusal    = memoryShare{held: 70, used: 85}
	forRequest    = memoryShare{held: 85, used: 90}
)

// memory bounds what connections and requests hold together. What is refused
// are the newest; those that are admitted notice nothing.
type memory struct {
	limit int64        // 0: none
	used  func() int64 // measured, nil: not at all
	held  atomic.Int64
}

// take admits something that holds that many bytes. A caller to whom it reports
// true must give them back.
func (m *memory) take(bytes int64, share memoryShare) bool {
	held := m.held.Add(bytes)
	if m.limit <= 0 || held <= m.limit/100*share.held && (m.used == nil || m.used() <= m.limit/100*share.used) {
		return true
	}
	m.held.Add(-bytes)
	return false
}

func (m *memory) give(bytes int64) { m.held.Add(-bytes) }

// requestBytes is what a request is reckoned to hold.
func requestBytes(r *exchange.Request) int64 {
	return requestBase + headerFactor*int64(headerBytes(r)) + fieldBytes*int64(1+len(r.Fields))
}
