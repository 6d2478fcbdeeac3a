package tally

import (
	"crypto/tls"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	sideFrontend = "frontend"
	sideBackend  = "backend"

	resultFull    = "full"
	resultResumed = "resumed"
	resultFailed  = "failed"
)

// TLS versions, as far as they are told apart.
const (
	versionOther = iota
	version12
	version13
	versions
)

var versionLabels = [versions]string{
	versionOther: "other",
	version12:    "tls1.2",
	version13:    "tls1.3",
}

func versionIndex(version uint16) int {
	switch version {
	case tls.VersionTLS12:
		return version12
	case tls.VersionTLS13:
		return version13
	default:
		return versionOther
	}
}

// Numbers of the contract's enums, zero value included.
const (
	mechanisms = int(resealv1.Mechanism_MECHANISM_PSK) + 1
	misses     = int(resealv1.MissReason_MISS_REASON_REFUSED) + 1
	closeKinds = int(resealv1.CloseKind_CLOSE_KIND_TIMEOUT) + 1
)

// Who closed a connection first.
const (
	byUs = iota
	byPeer
	closers
)

var closerLabels = [closers]string{byUs: "us", byPeer: "peer"}

// unspecified is the label of a full handshake whose reason was not told.
const unspecified = "unspecified"

// leg is what both legs count. There is no counter of full handshakes: they are
// the sum of the misses, so the two can't differ.
type leg struct {
	name string

	full    [misses][versions]atomic.Uint64 // by reason
	resumed [mechanisms][versions]atomic.Uint64
	failed  atomic.Uint64

	opened atomic.Uint64
	closed [closeKinds][closers]atomic.Uint64
	active atomic.Int64
	idle   atomic.Int64

	requests atomic.Uint64
	reused   atomic.Uint64
	errors   reasons
	private  atomic.Uint64

	fullSeconds, resumedSeconds, failedSeconds prometheus.Observer
}

// Handshake counts a completed handshake. A zero mechanism means a full one, of
// which miss is the reason.
func (l *leg) Handshake(mechanism resealv1.Mechanism, miss resealv1.MissReason, version uint16, d time.Duration) {
	v := versionIndex(version)
	if mechanism > 0 && int(mechanism) < mechanisms {
		l.resumed[mechanism][v].Add(1)
		l.resumedSeconds.Observe(d.Seconds())
		return
	}
	if miss < 0 || int(miss) >= misses {
		miss = resealv1.MissReason_MISS_REASON_UNSPECIFIED
	}
	l.full[miss][v].Add(1)
	l.fullSeconds.Observe(d.Seconds())
}

// HandshakeFailed counts a handshake that did not complete.
func (l *leg) HandshakeFailed(d time.Duration) {
	l.failed.Add(1)
	l.failedSeconds.Observe(d.Seconds())
}

// Opened counts a connection.
func (l *leg) Opened() { l.opened.Add(1) }

// Closed counts the end of a connection and whether the peer began it. An
// unspecified kind counts nothing: such connections show in the gauges alone.
func (l *leg) Closed(kind resealv1.CloseKind, peer bool) {
	if kind <= 0 || int(kind) >= closeKinds {
		return
	}
	by := byUs
	if peer {
		by = byPeer
	}
	l.closed[kind][by].Add(1)
}

// Active moves the number of connections in use.
func (l *leg) Active(delta int) { l.active.Add(int64(delta)) }

// Idle moves the number of connections that are open and not in use.
func (l *leg) Idle(delta int) { l.idle.Add(int64(delta)) }

// Private counts a connection that became its client's own.
func (l *leg) Private() { l.private.Add(1) }

// Error counts a request that failed for a reason on this leg.
func (l *leg) Error(reason string) { l.errors.count(reason) }

func (l *leg) request(reused bool) {
	l.requests.Add(1)
	if reused {
		l.reused.Add(1)
	}
}

// handshakes is one reading of a leg's handshakes. Totals and shares in it fit
// each other, whatever is counted meanwhile.
type handshakes struct {
	full    [misses][versions]uint64
	resumed [mechanisms][versions]uint64
	failed  uint64
}

func (l *leg) handshakes() *handshakes {
	read := &handshakes{failed: l.failed.Load()}
	for miss := range l.full {
		for version := range l.full[miss] {
			read.full[miss][version] = l.full[miss][version].Load()
		}
	}
	for mechanism := range l.resumed {
		for version := range l.resumed[mechanism] {
			read.resumed[mechanism][version] = l.resumed[mechanism][version].Load()
		}
	}
	return read
}

// fullBy is the number of full handshakes for a reason.
func (h *handshakes) fullBy(miss int) uint64 { return sum(h.full[miss]) }

func (h *handshakes) resumedBy(mechanism resealv1.Mechanism) uint64 { return sum(h.resumed[mechanism]) }

// fullIn is the number of full handshakes of a version.
func (h *handshakes) fullIn(version int) uint64 {
	var total uint64
	for miss := range h.full {
		total += h.full[miss][version]
	}
	return total
}

func sum(counts [versions]uint64) uint64 {
	var total uint64
	for _, count := range counts {
		total += count
	}
	return total
}

func missLabel(miss int) string {
	if miss == 0 {
		return unspecified
	}
	return resealv1.Label(resealv1.MissReason(miss))
}

func (l *leg) stats() *resealv1.Stats {
	read := l.handshakes()
	// Read before requests, reused is never more than they are.
	reused := l.reused.Load()
	stats := &resealv1.Stats{
		Name:     l.name,
		Requests: l.requests.Load(),
		Errors:   l.errors.read(),
		Handshakes: &resealv1.Handshakes{
			ResumedSessionId: read.resumedBy(resealv1.Mechanism_MECHANISM_SESSION_ID),
			ResumedTicket:    read.resumedBy(resealv1.Mechanism_MECHANISM_TICKET),
			ResumedPsk:       read.resumedBy(resealv1.Mechanism_MECHANISM_PSK),
			Failed:           read.failed,
		},
		Misses: map[string]uint64{},
		Connections: &resealv1.ConnectionStats{
			Opened: l.opened.Load(),
			Reused: reused,
			Active: max(l.active.Load(), 0),
			Idle:   max(l.idle.Load(), 0),
		},
		Closes:   map[string]uint64{},
		ClosesBy: map[string]uint64{},
	}
	for miss := range read.full {
		if count := read.fullBy(miss); count > 0 {
			stats.Misses[missLabel(miss)] = count
			stats.Handshakes.Full += count
		}
	}
	for kind := 1; kind < closeKinds; kind++ {
		for by := range closers {
			if count := l.closed[kind][by].Load(); count > 0 {
				stats.Closes[resealv1.Label(resealv1.CloseKind(kind))] += count
				stats.ClosesBy[closerLabels[by]] += count
			}
		}
	}
	return stats
}

// maxReasons bounds the reasons of a leg.
const maxReasons = 64

// reasons counts by reason. Known ones are counted without a lock.
type reasons struct {
	counts sync.Map // string to *atomic.Uint64
	mu     sync.Mutex
	size   int
}

func (r *reasons) count(reason string) {
	found, ok := r.counts.Load(reason)
	if !ok {
		found = r.add(reason)
	}
	found.(*atomic.Uint64).Add(1)
}

func (r *reasons) add(reason string) any {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.size >= maxReasons {
		reason = otherName
	}
	found, ok := r.counts.LoadOrStore(reason, new(atomic.Uint64))
	if !ok {
		r.size++
	}
	return found
}

func (r *reasons) read() map[string]uint64 {
	read := map[string]uint64{}
	r.counts.Range(func(reason, count any) bool {
		read[reason.(string)] = count.(*atomic.Uint64).Load()
		return true
	})
	return read
}
