package feed

import (
	"cmp"
	"errors"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// liveFor is how long an edge counts as live after its stream ended.
	liveFor = 30 * time.Second
	// maxEdges bounds the table.
	maxEdges = 16384
	// maxConverging bounds the revisions that wait for their last ack.
	maxConverging = 128
)

var errNotConnected = errors.New("the edge is not connected to this replica")

// table holds the live edges.
type table struct {
	converged func(time.Duration) // a revision got its last ack
	target    func(*edge) int64   // the revision that an edge should serve; takes no lock

	mu         sync.Mutex
	edges      map[string]*edge
	converging []published
	changed    chan struct{} // closed at the next change
}

// edge is a row of the table, guarded by the table's lock.
type edge struct {
	id             string
	stream         *session // nil: disconnected
	hello          *resealv1.Hello
	address        string
	connectedAt    time.Time
	disconnectedAt time.Time
	acked          int64
	sent           int64 // the revision that it was sent last
	sentAt         time.Time
	nack           *resealv1.Nack // nil: the newest answer is an ack
	before         *resealv1.Nack // the answer to the revision before, likewise
	answered       int64          // the revision that was answered last
	convergence    time.Duration
	resources      int
	resourcesSent  int64
	drain          *resealv1.Drain // the newest order, nil: none
	hashes         hashes
	repaired       time.Time // when it was sent all again last, because it had drifted
}

// published is a revision that not all edges have acked.
type published struct {
	revision int64
	seen     time.Time
	lastAck  time.Time
	missing  int // edges that acked neither it nor a newer one
}

func newTable(converged func(time.Duration)) *table {
	return &table{converged: converged, target: func(*edge) int64 { return 0 }, edges: map[string]*edge{}, changed: make(chan struct{})}
}

// connect makes stream the one of its edge. It returns the stream that it
// replaces and what the edge has to be told first, either may be nil.
func (t *table) connect(stream *session, hello *resealv1.Hello, address string) (*session, *resealv1.Drain, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	row := t.edges[hello.GetEdge()]
	if row == nil {
		if len(t.edges) >= maxEdges {
			t.expireLocked(now)
		}
		if len(t.edges) >= maxEdges && !t.evictLocked() {
			return nil, nil, resealv1.ErrTooManyEdges
		}
		row = &edge{id: hello.GetEdge()}
		t.edges[row.id] = row
		t.missLocked(row.acked, 1)
	}
	replaced := row.stream
	if row.hello.GetBootId() != hello.GetBootId() {
		t.ackLocked(row, 0)
		row.convergence, row.nack, row.before, row.answered, row.hashes = 0, nil, nil, 0, hashes{}
	}
	row.stream, row.hello, row.address = stream, hello, address
	row.connectedAt, row.disconnectedAt = now, time.Time{}
	row.resources, row.resourcesSent = 0, 0
	t.changedLocked()
	return replaced, row.drain, nil
}

// evictLocked makes room by forgetting the edge that left first.
func (t *table) evictLocked() bool {
	var first *edge
	for _, row := range t.edges {
		if row.stream == nil && (first == nil || row.disconnectedAt.Before(first.disconnectedAt)) {
			first = row
		}
	}
	if first == nil {
		return false
	}
	t.forgetLocked(first)
	return true
}

// forgetLocked removes a row.
func (t *table) forgetLocked(row *edge) {
	delete(t.edges, row.id)
	t.missLocked(row.acked, -1)
	t.convergeLocked()
}

// ackLocked notes the newest revision that an edge acked. What it costs does not
// grow with the number of edges: each revision knows how many acks it lacks.
func (t *table) ackLocked(row *edge, revision int64) {
	t.missLocked(row.acked, -1)
	row.acked = revision
	t.missLocked(row.acked, 1)
}

// missLocked adds n to the edges that revisions above acked lack.
func (t *table) missLocked(acked int64, n int) {
	for i := range t.converging {
		if t.converging[i].revision > acked {
			t.converging[i].missing += n
		}
	}
}

// disconnect notes the end of stream, unless a newer one took its place.
func (t *table) disconnect(stream *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if row := t.rowLocked(stream); row != nil {
		row.stream, row.disconnectedAt = nil, time.Now()
		t.changedLocked()
	}
}

func (t *table) rowLocked(stream *session) *edge {
	row := t.edges[stream.id]
	if row == nil || row.stream != stream {
		return nil
	}
	return row
}

// publish notes that revision is what edges should serve from now on.
func (t *table) publish(revision int64, seen time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.edges) > 0 {
		next := published{revision: revision, seen: seen}
		for _, row := range t.edges {
			if row.acked < revision {
				next.missing++
			}
		}
		t.converging = append(t.converging, next)
		if len(t.converging) > maxConverging {
			t.converging = t.converging[1:]
		}
	}
	t.changedLocked()
}

// sent notes that a revision was sent on stream, with some resources.
func (t *table) sent(stream *session, revision int64, resources int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if row := t.rowLocked(stream); row != nil {
		row.sent, row.sentAt = revision, time.Now()
		row.resourcesSent += int64(resources)
		t.changedLocked()
	}
}

// acked notes that stream's edge serves revision, which this replica saw at seen,
// and how many resources it holds.
func (t *table) acked(stream *session, revision int64, seen time.Time, resources int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	row := t.rowLocked(stream)
	if row == nil {
		return
	}
	now := time.Now()
	if row.acked != revision {
		// An edge that just came can't have been faster than it connected.
		row.convergence = now.Sub(later(seen, row.connectedAt))
	}
	t.ackLocked(row, revision)
	row.answer(revision, nil)
	row.resources = resources
	for i := range t.converging {
		if t.converging[i].revision <= revision {
			t.converging[i].lastAck = now
		}
	}
	t.convergeLocked()
	t.changedLocked()
}

// startAnew forgets revisions whose numbers mean nothing any more.
func (t *table) startAnew() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.converging = nil
	for _, row := range t.edges {
		row.acked, row.convergence, row.nack, row.before, row.answered, row.sent = 0, 0, nil, nil, 0, 0
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// nacked notes that stream's edge refused a revision.
func (t *table) nacked(stream *session, nack *resealv1.Nack, resources int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if row := t.rowLocked(stream); row != nil {
		row.answer(nack.GetRevision(), nack)
		row.resources = resources
		t.changedLocked()
	}
}

// convergeLocked reports the revisions that every live edge has acked, or a
// newer one in their place.
func (t *table) convergeLocked() {
	t.converging = slices.DeleteFunc(t.converging, func(p published) bool {
		if p.missing > 0 {
			return false
		}
		if !p.lastAck.IsZero() && len(t.edges) > 0 {
			t.converged(p.lastAck.Sub(p.seen))
		}
		return true
	})
}

// order sets what the edge is told to do and returns its stream.
func (t *table) order(id string, drain *resealv1.Drain) (*session, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	row := t.edges[id]
	if row == nil || row.stream == nil {
		return nil, errNotConnected
	}
	row.drain = drain
	t.changedLocked()
	return row.stream, nil
}

// drained notes what stream's edge is to do, nil: serve.
func (t *table) drained(stream *session, drain *resealv1.Drain) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if row := t.rowLocked(stream); row != nil {
		row.drain = drain
		t.changedLocked()
	}
}

// connected counts the edges that have a stream.
func (t *table) connected() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	count := 0
	for _, row := range t.edges {
		if row.stream != nil {
			count++
		}
	}
	return count
}

// streams are those of all connected edges.
func (t *table) streams() []*session {
	t.mu.Lock()
	defer t.mu.Unlock()
	var streams []*session
	for _, row := range t.edges {
		if row.stream != nil {
			streams = append(streams, row.stream)
		}
	}
	return streams
}

// expire forgets edges that left too long ago.
func (t *table) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expireLocked(time.Now())
}

func (t *table) expireLocked(now time.Time) {
	before := len(t.edges)
	for _, row := range t.edges {
		if !row.live(now) {
			t.forgetLocked(row)
		}
	}
	if len(t.edges) != before {
		t.changedLocked()
	}
}

func (e *edge) live(now time.Time) bool {
	return e.stream != nil || now.Sub(e.disconnectedAt) < liveFor
}

func (t *table) changedLocked() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// ids are the live edges, sorted.
func (t *table) ids() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	var ids []string
	for id, row := range t.edges {
		if row.live(now) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// list returns the live edges that have labels, sorted by id, and a channel
// that is closed when something changes. An empty id is any.
func (t *table) list(id string, labels map[string]string) ([]*resealv1.Edge, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	selector := &resealv1.EdgeSelector{MatchLabels: labels}
	var edges []*resealv1.Edge
	for _, row := range t.edges {
		if row.live(now) && (id == "" || row.id == id) && fleet.Selects(selector, row.hello.GetLabels()) {
			edges = append(edges, row.describe(t.target(row)))
		}
	}
	slices.SortFunc(edges, func(a, b *resealv1.Edge) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return edges, t.changed
}

func (t *table) countStates() map[resealv1.Edge_State]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	counts := map[resealv1.Edge_State]int{}
	for _, row := range t.edges {
		counts[row.state(t.target(row))]++
	}
	return counts
}

func (e *edge) state(target int64) resealv1.Edge_State {
	switch {
	case e.stream == nil:
		return resealv1.Edge_STATE_DISCONNECTED
	case e.drain.GetDrain():
		return resealv1.Edge_STATE_DRAINING
	case e.nack != nil && e.nack.GetRevision() == target && e.nack.GetPartly():
		return resealv1.Edge_STATE_PARTLY
	case e.nack != nil && e.nack.GetRevision() == target:
		return resealv1.Edge_STATE_REFUSED
	case e.nack == nil && e.acked == target:
		return resealv1.Edge_STATE_SYNCED
	default:
		return resealv1.Edge_STATE_SYNCING
	}
}

func (e *edge) describe(target int64) *resealv1.Edge {
	described := &resealv1.Edge{
		Id:             e.id,
		Labels:         e.hello.GetLabels(),
		Version:        e.hello.GetVersion(),
		BootId:         e.hello.GetBootId(),
		Address:        e.address,
		State:          e.state(target),
		AckedRevision:  e.acked,
		TargetRevision: target,
		Nack:           e.nack,
		StartedAt:      e.hello.GetStartedAt(),
		ConnectedAt:    timestamppb.New(e.connectedAt),
		Resources:      int32(e.resources),
		Draining:       e.drain.GetDrain(),
		ResourcesSent:  e.resourcesSent,
		Crashed:        e.hello.GetCrashed(),
		IntendedHash:   e.hashes.intended,
		AckedHash:      e.hashes.acked,
		RunningHash:    e.hashes.running,
		Drifted:        e.drifted(),
		SentRevision:   e.sent,
		RefusedNewly:   e.refusedNewly(),
	}
	if e.convergence > 0 {
		described.Convergence = durationpb.New(e.convergence)
	}
	if e.sent > 0 {
		described.SentAt = timestamppb.New(e.sentAt)
	}
	if e.stream == nil {
		described.DisconnectedAt = timestamppb.New(e.disconnectedAt)
	}
	return described
}
