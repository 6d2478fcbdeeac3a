package keyring

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/time/rate"

	"github.com/reseal/reseal/controlplane/fleet"
)

const (
	// maxWrite bounds the bytes of one transaction: etcd takes 1.5 MiB.
	maxWrite = 512 << 10
	// writesPerSecond and writesBurst bound the writes that one edge causes by
	// connecting, acking and leaving. What comes faster is written later, the
	// newest only.
	writesPerSecond = 2
	writesBurst     = 20
	// maxIdlePaces is how many edges without an entry are remembered before those
	// that may write a whole burst again are forgotten.
	maxIdlePaces = 1024
)

// roster tells all replicas which edges are connected to this one and what they
// have acked: in one digest on a lease, of which a write takes what changed of all
// edges meanwhile. A stream of an edge waits for no write. An epoch is activated
// past none all the same: each digest says what its replica knew before it was put
// together, and an epoch that all of them know is in the first response to each edge
// that came later.
type roster struct {
	server *Server
	wake   chan struct{}

	mu      sync.Mutex
	entries map[string]*entry // by edge
	covers  map[string]*cover // by their keys: thousands of edges have acked the same
	terms   terms
	streams uint64      // number of the newest
	anew    bool        // all is to be written: what etcd holds is not known
	open    bool        // edges may be served: the other replicas know that there may be some
	dirty   [parts]bool // what etcd holds of a part is not what it should

	// The fields below belong to the writer.

	paces map[string]*rate.Limiter // of writes, by edge
	head  head                     // what etcd holds; zero: not known
}

// entry is a stream of an edge.
type entry struct {
	stream
	line *fleet.Line

	// Guarded by roster.mu.

	labels map[string]string // of the edge
	cover  *cover            // what etcd should hold
	left   time.Time         // when the stream ended, zero before
	told   told              // what etcd holds, or is about to; zero: nothing
}

func newRoster(s *Server) *roster {
	return &roster{
		server: s, wake: make(chan struct{}, 1), entries: map[string]*entry{}, covers: map[string]*cover{},
		terms: termsOf(nil), paces: map[string]*rate.Limiter{}, anew: true,
	}
}

func (r *roster) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// join enters a stream, in place of an older one of the same edge.
func (r *roster) join(edge string, labels map[string]string, line *fleet.Line) *entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.streams++
	e := &entry{stream: stream{edge, r.streams}, line: line, labels: labels}
	e.cover = r.coverLocked(&cover{Labels: r.terms.of(labels), Terms: r.terms.id})
	if old := r.entries[edge]; old != nil {
		e.told = old.told
		if old.left.IsZero() {
			old.line.End(fleet.Superseded(edge))
		}
	}
	r.entries[edge] = e
	r.nudge()
	return e
}

// coverLocked is the one copy of a cover.
func (r *roster) coverLocked(c *cover) *cover {
	key := c.key()
	if found := r.covers[key]; found != nil {
		return found
	}
	r.covers[key] = c
	return c
}

// acked notes what the edge has acked.
func (r *roster) acked(e *entry, keyrings map[string]coverOf) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changeLocked(e, &cover{Labels: e.cover.Labels, Terms: e.cover.Terms, Acked: true, Keyrings: keyrings})
}

// ask makes the covers tell which edges the present selectors select.
func (r *roster) ask(asked terms) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.terms = asked
	for _, e := range r.entries {
		next := *e.cover
		next.Labels, next.Terms = asked.of(e.labels), asked.id
		r.changeLocked(e, &next)
	}
}

// changeLocked has a cover written, unless it says nothing new.
func (r *roster) changeLocked(e *entry, next *cover) {
	if shared := r.coverLocked(next); shared != e.cover {
		e.cover = shared
		r.nudge()
	}
}

// leave notes that the stream has ended.
func (r *roster) leave(e *entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.entries[e.edge] == e && e.left.IsZero() {
		e.left = time.Now()
		r.nudge()
	}
}

// lose removes streams that another replica's have superseded.
func (r *roster) lose(superseded []stream) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range superseded {
		if e := r.entries[s.edge]; e != nil && e.stream == s {
			r.removeLocked(e)
			if e.left.IsZero() {
				e.line.End(fleet.Superseded(e.edge))
			}
		}
	}
}

func (r *roster) removeLocked(e *entry) {
	delete(r.entries, e.edge)
	if e.told.cover != nil {
		r.dirty[partOf(e.edge)] = true
		r.nudge()
	}
}

// forget has all written anew: etcd was restored or replaced.
func (r *roster) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.anew = true
	r.nudge()
}

// contradict has all written anew unless this replica has ended, as another of the
// same name took for granted.
func (r *roster) contradict() {
	if r.isOpen() {
		r.forget()
	}
}

// isOpen says whether edges may be served: other replicas have been told that this one
// may have some.
func (r *roster) isOpen() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.open
}

// admit lets edges be served. An etcd without room for the first digest is no reason
// not to: no leader can write either then, so no epoch is activated past them.
func (r *roster) admit() {
	r.mu.Lock()
	opened := !r.open
	r.open = true
	r.mu.Unlock()
	if opened {
		r.server.state.announce()
	}
}

// run writes until ctx ends. Then the lease ends by itself, so that the edges
// count as live until they had the time to find another replica.
func (r *roster) run(ctx context.Context) error {
	select {
	case <-r.server.state.known:
	case <-ctx.Done():
		return nil
	}
	r.succeed(ctx)
	wait := newBackoff()
	for {
		err := r.serve(ctx, wait)
		if ctx.Err() != nil {
			r.end(context.WithoutCancel(ctx))
			return nil
		}
		r.server.log.Warn("other replicas can't be told which edges live here", "error", err)
		if isFull(err) {
			r.admit()
		}
		wait.sleep(ctx)
	}
}

// succeed says that processes of this replica that ended without a word serve
// nobody.
func (r *roster) succeed(ctx context.Context) {
	for id, before := range r.server.state.predecessors(r.server.config.Name) {
		if err := r.putEnded(ctx, id, before); err != nil {
			r.server.log.Debug("an earlier process of this replica counts until its lease ends", "error", err)
		}
	}
}

// end says that this replica serves nobody any more.
func (r *roster) end(ctx context.Context) {
	r.mu.Lock()
	r.open = false
	r.mu.Unlock()
	if r.head == (head{}) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, goodbye)
	defer cancel()
	if err := r.putEnded(ctx, r.server.id, r.head); err != nil {
		r.server.log.Debug("this replica counts until its lease ends", "error", err)
	}
}

func (r *roster) putEnded(ctx context.Context, id string, last head) error {
	last.Ended = true
	value, err := last.encode()
	if err != nil {
		return err
	}
	key := r.server.keys.digest(id)
	ctx, cancel := context.WithTimeout(ctx, r.server.config.RequestTimeout)
	defer cancel()
	_, err = r.server.config.Client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), ">", 0)).
		Then(clientv3.OpPut(key, string(value), clientv3.WithIgnoreLease())).Commit()
	return err
}

// serve writes under one lease, until that is lost.
func (r *roster) serve(ctx context.Context, wait *backoff) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client := r.server.config.Client
	lease, err := r.grant(ctx)
	if err != nil {
		return err
	}
	alive, err := client.KeepAlive(ctx, lease)
	if err != nil {
		return fmt.Errorf("keep the lease: %w", err)
	}
	r.forget()
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case _, ok := <-alive:
			if !ok {
				return errors.New("the lease is lost")
			}
			continue
		case <-r.wake:
		case <-retry.C:
		}
		began := time.Now()
		again, err := r.flush(ctx, lease)
		took := time.Since(began)
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return err
		}
		if isFull(err) {
			r.admit()
		}
		if err != nil {
			r.server.log.Debug("what edges hold could not be written", "error", err)
			wait.next = min(2*wait.next, mostBackoff)
			retry.Reset(wait.next)
			continue
		}
		r.admit()
		if again > 0 {
			retry.Reset(again)
		}
		wait.reset()
		// What comes meanwhile is written together, the less often the more there is.
		if err := pause(ctx, min(max(gather, 3*took), 250*time.Millisecond)); err != nil {
			return err
		}
	}
}

func (r *roster) grant(ctx context.Context) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, r.server.config.RequestTimeout)
	defer cancel()
	answer, err := r.server.config.Client.Grant(ctx, int64((r.server.config.LiveFor+time.Second-1)/time.Second))
	if err != nil {
		return 0, fmt.Errorf("lease: %w", err)
	}
	return answer.ID, nil
}

// flush writes what is not written yet. What failed is still to be written. Again,
// if above 0, is when to look anew: edges that left are forgotten then, and those that
// have caused enough writes for the moment are written.
func (r *roster) flush(ctx context.Context, lease clientv3.LeaseID) (again time.Duration, err error) {
	next := r.server.state.head(r.server.config.Name, r.server.config.LiveFor)
	changed, again := r.compose(time.Now())
	var ops []clientv3.Op
	var numbers []int
	size := 0
	for number, value := range changed {
		if size > 0 && size+len(value) > maxWrite {
			if err := r.put(ctx, ops, numbers); err != nil {
				return 0, err
			}
			ops, numbers, size = nil, nil, 0
		}
		op := clientv3.OpDelete(r.server.keys.part(r.server.id, number))
		if len(value) > 0 {
			op = clientv3.OpPut(r.server.keys.part(r.server.id, number), string(value), clientv3.WithLease(lease))
		}
		ops, numbers, size = append(ops, op), append(numbers, number), size+len(value)
	}
	// The head comes last: what it says holds for all parts.
	if next != r.head {
		value, err := next.encode()
		if err != nil {
			return 0, err
		}
		ops = append(ops, clientv3.OpPut(r.server.keys.digest(r.server.id), string(value), clientv3.WithLease(lease)))
	}
	if len(ops) == 0 {
		return again, nil
	}
	if err := r.put(ctx, ops, numbers); err != nil {
		return 0, err
	}
	r.head = next
	return again, nil
}

// put writes parts in one transaction. They are dirty if it fails.
func (r *roster) put(ctx context.Context, ops []clientv3.Op, numbers []int) error {
	ctx, cancel := context.WithTimeout(ctx, r.server.config.RequestTimeout)
	defer cancel()
	_, err := r.server.config.Client.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, number := range numbers {
			r.dirty[number] = true
		}
	}
	return err
}

// compose puts the parts together that are dirty, and takes them for written. again
// is as in flush.
func (r *roster) compose(now time.Time) (changed map[int][]byte, again time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.anew {
		r.anew, r.head = false, head{}
		for _, e := range r.entries {
			r.dirty[partOf(e.edge)] = true
		}
	}
	again = r.updateLocked(now)
	var all [parts][]told
	used := map[*cover]bool{}
	for _, e := range r.entries {
		used[e.cover], used[e.told.cover] = true, true
		if number := partOf(e.edge); r.dirty[number] && e.told.cover != nil {
			all[number] = append(all[number], e.told)
		}
	}
	maps.DeleteFunc(r.covers, func(_ string, c *cover) bool { return !used[c] })
	changed = map[int][]byte{}
	for number, dirty := range r.dirty {
		if dirty {
			r.dirty[number], changed[number] = false, makePart(all[number])
		}
	}
	return changed, again
}

// updateLocked notes what is to be told of each edge, and forgets those that left
// long ago.
func (r *roster) updateLocked(now time.Time) (again time.Duration) {
	soonest := func(d time.Duration) {
		if again == 0 || d < again {
			again = d
		}
	}
	for _, e := range r.entries {
		next := told{e.stream, e.cover, !e.left.IsZero()}
		if next.left {
			rest := r.server.config.LiveFor - now.Sub(e.left)
			if rest <= 0 {
				r.removeLocked(e)
				continue
			}
			soonest(rest)
		}
		switch {
		case e.told == next:
		case r.pace(e.edge).Allow():
			e.told = next
			r.dirty[partOf(e.edge)] = true
		default:
			soonest(time.Second / writesPerSecond)
		}
	}
	return again
}

// pace is what an edge may still write. It outlives the edge's streams. The caller
// holds mu.
func (r *roster) pace(edge string) *rate.Limiter {
	found := r.paces[edge]
	if found != nil {
		return found
	}
	if len(r.paces) > len(r.entries)+maxIdlePaces {
		maps.DeleteFunc(r.paces, func(_ string, l *rate.Limiter) bool { return l.Tokens() >= writesBurst })
	}
	found = rate.NewLimiter(writesPerSecond, writesBurst)
	r.paces[edge] = found
	return found
}

// isFull tells the error of an etcd that takes no writes for want of space.
func isFull(err error) bool { return errors.Is(err, rpctypes.ErrNoSpace) }
