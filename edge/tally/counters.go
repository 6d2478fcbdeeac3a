package tally

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// side is a leg, as in the label of that name.
type side string

const (
	frontend side = "frontend"
	backend  side = "backend"
)

const (
	resultFull    = "full"
	resultResumed = "resumed"
	resultFailed  = "failed"
)

// metric is what shows a counter of this side.
func (s side) metric(c *exchange.Counter) exchange.Metric {
	if s == frontend {
		return c.Frontend
	}
	return c.Backend
}

// cells is how many numbers of the table this side needs.
func (s side) cells() int {
	size := 0
	for _, counter := range exchange.Table() {
		shown := s.metric(counter).Name != "" || counter.Report != nil
		if shown && (s == frontend || !counter.Listeners) {
			size = counter.Cells()[0].Index() + counter.Size()
		}
	}
	return size
}

var sizes = map[side]int{frontend: frontend.cells(), backend: backend.cells()}

// reported are the numbers that reports hold.
var reported = func() []exchange.Cell {
	var cells []exchange.Cell
	for _, counter := range exchange.Table() {
		if counter.Report != nil {
			cells = append(cells, counter.Cells()...)
		}
	}
	return cells
}()

// Counters are those of a pool or of a listener. It is safe for concurrent use.
type Counters struct {
	name   string
	side   side
	cells  []atomic.Int64 // by exchange.Cell.Index
	errors reasons
	epochs *epochs // of listeners

	fullSeconds, resumedSeconds, failedSeconds, requestSeconds prometheus.Observer
}

func (t *Tally) newPool(name string) *Counters {
	return t.newCounters(backend, name, name, "", t.backendRequestSeconds)
}

func (t *Tally) newListener(name string) *Counters {
	c := t.newCounters(frontend, name, "", name, t.requestSeconds)
	c.epochs = newEpochs()
	return c
}

func (t *Tally) newCounters(side side, name, pool, listener string, requests *prometheus.HistogramVec) *Counters {
	seconds := func(result string) prometheus.Observer {
		return t.handshakeSeconds.WithLabelValues(string(side), pool, listener, result)
	}
	return &Counters{
		name: name, side: side, cells: make([]atomic.Int64, sizes[side]),
		fullSeconds: seconds(resultFull), resumedSeconds: seconds(resultResumed), failedSeconds: seconds(resultFailed),
		requestSeconds: requests.WithLabelValues(name),
	}
}

// Add implements exchange.Counters. What this side has no room for is not counted.
func (c *Counters) Add(cell exchange.Cell, delta int64) {
	if i := cell.Index(); i < len(c.cells) {
		c.cells[i].Add(delta)
	}
}

// Handshake implements exchange.Counters.
func (c *Counters) Handshake(mechanism resealv1.Mechanism, miss resealv1.MissReason, version uint16, d time.Duration) {
	if mechanism > 0 && int(mechanism) < len(exchange.Resumed.Labels[0].Values) {
		c.Add(exchange.Resumed.At(int(mechanism), exchange.TLSVersion(version)), 1)
		c.resumedSeconds.Observe(d.Seconds())
		return
	}
	c.Add(exchange.Full.At(int(miss), exchange.TLSVersion(version)), 1)
	c.fullSeconds.Observe(d.Seconds())
}

// HandshakeFailed implements exchange.Counters.
func (c *Counters) HandshakeFailed(d time.Duration) {
	c.Add(exchange.Failed.At(), 1)
	c.failedSeconds.Observe(d.Seconds())
}

// Request implements exchange.Counters.
func (c *Counters) Request(reused bool, d time.Duration) {
	place := 0
	if reused {
		place = 1
	}
	c.Add(exchange.Requests.At(place), 1)
	c.requestSeconds.Observe(d.Seconds())
}

// Error implements exchange.Counters.
func (c *Counters) Error(reason string) { c.errors.count(reason) }

// reading is all numbers of Counters as they were read once: sums and shares in it
// fit each other, whatever is counted meanwhile.
type reading []int64

func (c *Counters) read() reading {
	read := make(reading, len(c.cells))
	for i := range c.cells {
		read[i] = c.cells[i].Load()
	}
	return read
}

// of is one number, 0 where this side has no room for it.
func (r reading) of(cell exchange.Cell) int64 {
	i := cell.Index()
	switch {
	case i >= len(r):
		return 0
	case cell.Counter.Gauge:
		return max(r[i], 0)
	}
	return r[i]
}

func (c *Counters) stats() *resealv1.Stats {
	stats := &resealv1.Stats{
		Name: c.name, Errors: c.errors.read(), Handshakes: &resealv1.Handshakes{}, Connections: &resealv1.ConnectionStats{},
		Misses: map[string]uint64{}, Closes: map[string]uint64{}, ClosesBy: map[string]uint64{},
		Answers: map[string]uint64{}, Waits: map[string]uint64{},
	}
	read := c.read()
	for _, cell := range reported {
		if n := read.of(cell); n != 0 {
			cell.Counter.Report(stats, cell.Places(), n)
		}
	}
	if c.epochs != nil {
		stats.Epochs = c.epochs.stats()
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

func (r *reasons) count(reason string) { r.counter(reason).Add(1) }

func (r *reasons) counter(reason string) *atomic.Uint64 {
	found, ok := r.counts.Load(reason)
	if !ok {
		found = r.add(reason)
	}
	return found.(*atomic.Uint64)
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
