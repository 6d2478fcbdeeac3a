package keyring

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
)

const (
	// parallelWrites bounds the writes of one replica that are under way, perWrite the
	// keys in each: etcd takes 128 operations in a transaction.
	parallelWrites = 8
	perWrite       = 100
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
// have acked. Each edge has a key in etcd. While its stream lives the key hangs
// on this replica's lease; when the stream has ended, on a lease of its own that
// ends LiveFor later. The newest stream of an edge, on whatever replica, owns the
// key: the write of an older one fails, and so it learns that it was superseded.
type roster struct {
	server *Server
	wake   chan struct{}

	mu      sync.Mutex
	entries map[string]*entry // by edge
	terms   terms

	paces map[string]*rate.Limiter // of writes, by edge; belongs to the writer
}

// entry is a stream of an edge.
type entry struct {
	edge       string
	superseded chan struct{} // closed when a newer stream took over
	joined     chan int64    // gets the newest mod revision of all records, once

	// Guarded by roster.mu.

	labels map[string]string // of the edge
	cover  *cover            // what etcd should hold
	left   time.Time         // when the stream ended, zero before

	// The fields below belong to the writer.

	written  *cover // what etcd holds; nil: unknown
	revision int64  // of the key, 0: not written yet
	welcomed bool   // joined was told
}

// welcome tells the stream the newest mod revision of all records, once.
func (e *entry) welcome(newest int64) {
	if !e.welcomed {
		e.welcomed = true
		e.joined <- newest
	}
}

func newRoster(s *Server) *roster {
	return &roster{
		server: s, wake: make(chan struct{}, 1), entries: map[string]*entry{},
		terms: termsOf(nil), paces: map[string]*rate.Limiter{},
	}
}

func (r *roster) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// join enters a stream, in place of an older one of the same edge.
func (r *roster) join(edge string, labels map[string]string) *entry {
	e := &entry{edge: edge, superseded: make(chan struct{}), joined: make(chan int64, 1), labels: labels}
	r.mu.Lock()
	defer r.mu.Unlock()
	e.cover = &cover{Stream: randomID(), Labels: r.terms.of(labels), Terms: r.terms.id}
	if old := r.entries[edge]; old != nil && old.left.IsZero() {
		close(old.superseded)
	}
	r.entries[edge] = e
	r.nudge()
	return e
}

// acked notes what the edge has acked.
func (r *roster) acked(e *entry, keyrings map[string]coverOf) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changeLocked(e, &cover{Stream: e.cover.Stream, Labels: e.cover.Labels, Terms: e.cover.Terms, Acked: true, Keyrings: keyrings})
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
	if !e.cover.equal(next) {
		e.cover = next
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

// lost removes a stream that another replica's has superseded.
func (r *roster) lost(e *entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.entries[e.edge] != e {
		return
	}
	delete(r.entries, e.edge)
	if e.left.IsZero() {
		close(e.superseded)
	}
}

// run writes until ctx ends. Then the lease ends by itself, so that the edges
// count as live until they had the time to find another replica.
func (r *roster) run(ctx context.Context) error {
	wait := newBackoff()
	for {
		err := r.serve(ctx, wait)
		if ctx.Err() != nil {
			return nil
		}
		r.server.log.Warn("other replicas can't be told which edges live here", "error", err)
		if isFull(err) {
			r.admit(ctx)
		}
		wait.sleep(ctx)
	}
}

// serve writes under one lease, until that is lost.
func (r *roster) serve(ctx context.Context, wait *backoff) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client := r.server.config.Client
	lease, err := r.grant(ctx, r.server.config.LiveFor)
	if err != nil {
		return err
	}
	alive, err := client.KeepAlive(ctx, lease)
	if err != nil {
		return fmt.Errorf("keep the lease: %w", err)
	}
	r.eachEntry(func(e *entry) { e.written = nil })
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
		later, err := r.flush(ctx, lease)
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return err
		}
		if later {
			retry.Reset(time.Second / writesPerSecond)
		}
		if isFull(err) {
			r.admit(ctx)
		}
		if err != nil {
			r.server.log.Debug("an edge could not be written", "error", err)
			wait.next = min(2*wait.next, mostBackoff)
			retry.Reset(wait.next)
			continue
		}
		wait.reset()
		// What comes meanwhile is written together.
		if err := pause(ctx, gather); err != nil {
			return err
		}
	}
}

func (r *roster) grant(ctx context.Context, life time.Duration) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, r.server.config.RequestTimeout)
	defer cancel()
	answer, err := r.server.config.Client.Grant(ctx, int64((life+time.Second-1)/time.Second))
	if err != nil {
		return 0, fmt.Errorf("lease: %w", err)
	}
	return answer.ID, nil
}

func (r *roster) eachEntry(do func(*entry)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.entries {
		do(e)
	}
}

// due is an entry to be written.
type due struct {
	*entry
	cover *cover
	left  time.Time
}

// flush writes what is not written yet. Writes of one edge never overlap. It
// returns one of the errors; what failed is still to be written. later says that
// some edges have caused enough writes for the moment.
func (r *roster) flush(ctx context.Context, lease clientv3.LeaseID) (later bool, err error) {
	var here, gone []due
	r.eachEntry(func(e *entry) {
		switch {
		case e.cover == e.written && e.left.IsZero():
		case !r.pace(e.edge).Allow():
			later = true
		case e.left.IsZero():
			here = append(here, due{e, e.cover, e.left})
		default:
			gone = append(gone, due{e, e.cover, e.left})
		}
	})
	var group errgroup.Group
	group.SetLimit(parallelWrites)
	write := func(do func(context.Context) error) {
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, r.server.config.RequestTimeout)
			defer cancel()
			return do(ctx)
		})
	}
	for batch := range slices.Chunk(here, perWrite) {
		write(func(ctx context.Context) error { return r.putAll(ctx, batch, lease) })
	}
	for _, d := range gone {
		write(func(ctx context.Context) error { return r.putLeft(ctx, d) })
	}
	return later, group.Wait()
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

// putAll writes the keys of edges that are here in one transaction: a crowd of edges
// that connect or ack costs etcd few. A stream's first write takes the key over from
// whatever stream owned it; each further one has a guard of its own, as in guarded, so
// that a key that is no longer this stream's stops no other.
func (r *roster) putAll(ctx context.Context, batch []due, lease clientv3.LeaseID) error {
	k := r.server.keys
	var puts, ops []clientv3.Op
	for _, d := range batch {
		value, err := d.cover.encode()
		if err != nil {
			return err
		}
		key := k.cover(d.edge)
		put := clientv3.OpPut(key, string(value), clientv3.WithLease(lease))
		puts = append(puts, put)
		if d.revision > 0 {
			asLeft, gone := clientv3.Compare(clientv3.ModRevision(key), "=", d.revision), clientv3.Compare(clientv3.ModRevision(key), "=", 0)
			put = clientv3.OpTxn([]clientv3.Cmp{asLeft}, []clientv3.Op{put}, []clientv3.Op{
				clientv3.OpTxn([]clientv3.Cmp{gone}, []clientv3.Op{put}, nil),
			})
		}
		ops = append(ops, put)
	}
	answer, err := r.server.config.Client.Txn(ctx).Then(append(ops, clientv3.OpGet(k.records(), newestRecord...))...).Commit()
	if err != nil {
		return err
	}
	newest := newestOf(answer.Responses[len(batch)].GetResponseRange().GetKvs())
	var errs []error
	for i, d := range batch {
		if guarded := answer.Responses[i].GetResponseTxn(); guarded != nil && !guarded.Succeeded && !guarded.Responses[0].GetResponseTxn().Succeeded {
			errs = append(errs, r.guarded(ctx, d, puts[i]))
			continue
		}
		d.written, d.revision = d.cover, answer.Header.Revision
		d.welcome(newest)
	}
	return errors.Join(errs...)
}

func newestOf(records []*mvccpb.KeyValue) int64 {
	if len(records) == 0 {
		return 0
	}
	return records[0].ModRevision
}

// isFull tells the error of an etcd that takes no writes for want of space.
func isFull(err error) bool { return errors.Is(err, rpctypes.ErrNoSpace) }

// admit lets streams begin although etcd has no room to record them. No leader
// can write either then, so no epoch is activated past them; their covers stay
// due.
func (r *roster) admit(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, r.server.config.RequestTimeout)
	defer cancel()
	k := r.server.keys
	answer, err := r.server.config.Client.Get(ctx, k.records(), newestRecord...)
	if err != nil {
		r.server.log.Debug("edges wait for their keys", "error", err)
		return
	}
	r.eachEntry(func(e *entry) { e.welcome(newestOf(answer.Kvs)) })
}

// newestRecord asks for the key that was changed last.
var newestRecord = []clientv3.OpOption{
	clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(1),
	clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortDescend),
}

// guarded does op if the key is as this stream left it, or gone with its lease.
func (r *roster) guarded(ctx context.Context, d due, op clientv3.Op) error {
	key := r.server.keys.cover(d.edge)
	expected := d.revision
	for {
		answer, err := r.server.config.Client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", expected)).
			Then(op).Else(clientv3.OpGet(key)).Commit()
		if err != nil {
			return err
		}
		if answer.Succeeded {
			d.written, d.revision = d.cover, answer.Header.Revision
			return nil
		}
		found := answer.Responses[0].GetResponseRange().GetKvs()
		if len(found) == 0 {
			expected = 0
			continue
		}
		// A write of which the outcome was not known may have been ours.
		if c, err := decodeCover(found[0].Value); err != nil || c.Stream != d.cover.Stream {
			r.lost(d.entry)
			return nil
		}
		expected = found[0].ModRevision
	}
}

// putLeft lets the key of an edge that left end LiveFor later.
func (r *roster) putLeft(ctx context.Context, d due) error {
	op := clientv3.OpDelete(r.server.keys.cover(d.edge))
	if remaining := r.server.config.LiveFor - time.Since(d.left); remaining > 0 && d.revision > 0 {
		value, err := d.cover.encode()
		if err != nil {
			return err
		}
		lease, err := r.grant(ctx, remaining)
		if err != nil {
			return err
		}
		op = clientv3.OpPut(r.server.keys.cover(d.edge), string(value), clientv3.WithLease(lease))
	}
	if err := r.guarded(ctx, d, op); err != nil {
		return err
	}
	r.lost(d.entry)
	return nil
}
