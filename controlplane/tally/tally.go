// Package tally gathers the counters of the edges: the newest report of each,
// the totals of the fleet, and a short history.
package tally

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxEdges bounds the edges that are remembered.
	maxEdges = 16384
	// lingerFor is how long an edge counts after its stream ended, if Live does
	// not say otherwise.
	lingerFor = 30 * time.Second
	// expireInterval is how often edges that left are looked for.
	expireInterval = 10 * time.Second
	// rememberFor is how long what an edge that left has counted is kept apart: when
	// the same process comes back later than that, it is counted twice.
	rememberFor = 24 * time.Hour
)

// Config is what the tally needs. It is read once, by New.
type Config struct {
	// Edge names the caller of a stream. An error that carries no gRPC status
	// is PERMISSION_DENIED. Required.
	Edge func(ctx context.Context) (id string, err error)
	// Assigned returns the names of the pools and listeners that the caller of a stream
	// may report. What has another name is ignored, and counted as such. Nil: any.
	Assigned func(ctx context.Context) (pools, listeners map[string]bool)
	// Live returns the ids of the edges that should report. Nil: those that do.
	Live func() []string
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// Registerer takes the metrics. Nil: none.
	Registerer prometheus.Registerer
}

// Server implements TallyService. Counters live in memory only: edges report
// all of theirs to whichever replica they come to.
type Server struct {
	resealv1.UnimplementedTallyServiceServer

	config  Config
	words   *vocabularies
	lines   *fleet.Lines
	stopped chan struct{} // closed when Run has ended

	mu    sync.Mutex
	edges map[string]*edge
	gone  carried // of the edges that were forgotten
	cells int     // in all histories

	ignored prometheus.Counter
}

// edge is what is known of an edge. It outlives streams, for the windows.
type edge struct {
	id      string
	stream  *stream // nil: not connected
	ended   time.Time
	newest  *report
	before  carried // what its earlier processes counted
	absent  absent
	history history
}

// New makes a tally. It panics when its metrics are on the Registerer already.
func New(config Config) *Server {
	s := &Server{
		config:  config,
		words:   newVocabularies(),
		lines:   fleet.NewLines(),
		stopped: make(chan struct{}),
		edges:   map[string]*edge{},
		gone:    newCarried(),
		ignored: promauto.With(config.Registerer).NewCounter(prometheus.CounterOpts{
			Name: "reseal_fleet_reports_ignored_total",
			Help: "Pools and listeners in edges' reports that the edge does not have.",
		}),
	}
	if config.Registerer != nil {
		config.Registerer.MustRegister(&collector{s})
	}
	return s
}

// Run forgets edges that left, until ctx ends, and then ends all streams. It may
// be called once and returns nil.
func (s *Server) Run(ctx context.Context) error {
	defer s.lines.End(fleet.ErrStopping)
	defer close(s.stopped)
	ticker := time.NewTicker(expireInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			s.expire()
		case <-ctx.Done():
			return nil
		}
	}
}

// expire forgets edges that left long ago, and of others what no window can reach.
func (s *Server) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.edges {
		switch away := time.Since(e.newest.at); {
		case e.stream != nil:
		case away > rememberFor:
			s.forgetLocked(e)
		case away > maxSince:
			s.dropHistoryLocked(e)
		}
	}
}

func (s *Server) forgetLocked(e *edge) {
	s.dropHistoryLocked(e)
	sum := newCarried()
	e.addPast(sum)
	sum.addReport(s.words, e.newest, false)
	s.gone.pools.addLasting(sum.pools)
	s.gone.listeners.addLasting(sum.listeners)
	delete(s.edges, e.id)
}

func (s *Server) dropHistoryLocked(e *edge) {
	for _, r := range e.history {
		s.cells -= r.cells
	}
	e.history = nil
}

// evictLocked makes room by forgetting the edge that has not been heard of for
// the longest time.
func (s *Server) evictLocked() bool {
	var first *edge
	for _, e := range s.edges {
		if e.stream == nil && (first == nil || e.newest.at.Before(first.newest.at)) {
			first = e
		}
	}
	if first == nil {
		return false
	}
	s.forgetLocked(first)
	return true
}

// take makes a report the newest of its edge. The first on a stream makes the
// stream the one of its edge.
func (s *Server) take(from *stream, h heard, pools, listeners []*packed) error {
	made := newReport(h, pools, listeners, time.Now(), from.last, s.lastKept(from.id))
	from.last = made
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.edges[from.id]
	if e == nil {
		if len(s.edges) >= maxEdges && !s.evictLocked() {
			return resealv1.ErrTooManyEdges
		}
		e = &edge{id: from.id, before: newCarried(), absent: newCarried()}
		s.edges[from.id] = e
	}
	switch {
	case e.stream == from:
	case from.counted:
		return nil // a newer stream took over
	default:
		if e.stream != nil {
			e.stream.line.End(fleet.Superseded(e.id))
		}
		e.stream, from.counted = from, true
	}
	before, kept := e.newest, e.history.last()
	e.newest = made
	e.carry(s.words, before, e.newest)
	if before != nil && before != kept && before.bootID != e.newest.bootID {
		// The last that the earlier process said.
		e.history = append(e.history, before)
		s.cells += before.cells
	}
	s.keepLocked(e)
	from.answeredLocked(h.answers)
	return nil
}

func (s *Server) keepLocked(e *edge) {
	var cells int
	e.history, cells = e.history.keep(e.newest)
	s.cells += cells
	var dropped history
	e.history, dropped = e.history.trim(time.Now())
	for _, r := range dropped {
		s.cells -= r.cells
	}
	for s.cells > maxCells && len(e.history) > 1 {
		s.cells -= e.history[0].cells
		e.history = e.history[1:]
	}
}

// lastKept is the newest report in an edge's history, nil for none.
func (s *Server) lastKept(id string) *report {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.edges[id]; e != nil {
		return e.history.last()
	}
	return nil
}

// leave notes the end of a stream.
func (s *Server) leave(from *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.edges[from.id]; e != nil && e.stream == from {
		e.stream, e.ended = nil, time.Now()
	}
}

// presentLocked are the edges that count, sorted: those that report, did a
// moment ago, or should.
func (s *Server) presentLocked(live []string) []string {
	present := slices.Clone(live)
	for id, e := range s.edges {
		if e.stream != nil || time.Since(e.ended) < lingerFor {
			present = append(present, id)
		}
	}
	slices.Sort(present)
	return slices.Compact(present)
}

func (s *Server) live() []string {
	if s.config.Live == nil {
		return nil
	}
	return s.config.Live()
}

// fleet are the totals of the fleet: all that this control plane has heard of,
// from edges that left and from processes that ended too.
func (s *Server) fleet() (pools, listeners totals) {
	sum := newCarried()
	for newest, present := range s.past(sum) {
		sum.addReport(s.words, newest, present)
	}
	return sum.pools, sum.listeners
}

// past adds what no newest report holds, and returns the newest ones, which don't
// change: adding them up takes no lock. True are those of edges that are present.
func (s *Server) past(sum carried) map[*report]bool {
	live := s.live()
	s.mu.Lock()
	defer s.mu.Unlock()
	present := map[string]bool{}
	for _, id := range s.presentLocked(live) {
		present[id] = true
	}
	sum.pools.addTotals(s.gone.pools)
	sum.listeners.addTotals(s.gone.listeners)
	newest := make(map[*report]bool, len(s.edges))
	for id, e := range s.edges {
		e.addPast(sum)
		newest[e.newest] = present[id]
	}
	return newest
}
