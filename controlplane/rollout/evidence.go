package rollout

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxSampled bounds the edges of each side that are compared: what is wrong with
	// a change shows on any, and no look may cost more in a larger fleet.
	maxSampled = 10
	// compareInterval is the least time between two comparisons.
	compareInterval = time.Second
	// pastWindow is how far back an edge's own past goes, before the change began.
	pastWindow = time.Minute
	// maxWindow is how far back Stats can look.
	maxWindow = time.Hour
)

// Stats are the counters of one edge, since its start, or in a window if since is above
// 0. NOT_FOUND: the edge does not report now.
type Stats func(ctx context.Context, edge string, since time.Duration) (*resealv1.EdgeStats, error)

// evidence compares the edges of one stage. It belongs to the leader.
type evidence struct {
	stats Stats

	candidate int64
	begun     time.Time // the first change since what all edges served
	entered   time.Time
	compared  time.Time
	last      *Shares
	edges     map[string]*witness
}

// witness is an edge that is compared.
type witness struct {
	moved bool
	boot  time.Time // when its process started
	base  tallies   // when it was looked at first in this stage
	past  tallies   // before the change began, for moved ones
	now   tallies
}

// tallies are counters by the name of a pool or listener.
type tallies map[spot]tally

// spot is a pool or a listener.
type spot struct {
	backend bool
	name    string
}

type tally struct{ requests, failed, handshakes, full uint64 }

func (e *evidence) shares(ctx context.Context, r *Record, edges []Edge) (*Shares, error) {
	if e.candidate != r.Candidate || !e.entered.Equal(r.Entered) {
		*e = evidence{
			stats: e.stats, candidate: r.Candidate, begun: r.Begun, entered: r.Entered, edges: map[string]*witness{},
		}
	}
	if time.Since(e.compared) < compareInterval {
		return e.last, nil
	}
	var moved, others int
	asked := map[string]*witness{}
	for _, edge := range edges {
		has := r.Has(edge.ID, edge.Labels)
		ready := edge.Connected && edge.Touched && (edge.Acked == r.Candidate) == has
		count := &others
		if has {
			count = &moved
		}
		w := e.edges[edge.ID]
		switch {
		case !ready || w == nil && *count >= maxSampled:
			continue
		case w == nil || w.moved != has || !w.boot.Equal(edge.Started):
			w = &witness{moved: has, boot: edge.Started}
		}
		*count++
		asked[edge.ID] = w
	}
	e.edges = asked
	if err := e.ask(ctx); err != nil {
		return nil, err
	}
	e.compared, e.last = time.Now(), e.compare()
	return e.last, nil
}

// ask reads the counters of all witnesses. One that does not report is left out.
func (e *evidence) ask(ctx context.Context) error {
	var mu sync.Mutex
	var silent []string
	group, ctx := errgroup.WithContext(ctx)
	for id, w := range e.edges {
		group.Go(func() error {
			now, err := e.stats(ctx, id, 0)
			if status.Code(err) == codes.NotFound {
				mu.Lock()
				defer mu.Unlock()
				silent = append(silent, id)
				return nil
			}
			if err != nil {
				return fmt.Errorf("edge %s: %w", id, err)
			}
			w.now = talliesOf(now)
			if w.base == nil {
				w.base = w.now
				if w.moved {
					w.past = e.past(ctx, id)
				}
			}
			return nil
		})
	}
	err := group.Wait()
	for _, id := range silent {
		delete(e.edges, id)
	}
	return err
}

// past is what an edge counted before the change began: nothing of what the change did
// may stand in it. Nil when that is not known any more.
func (e *evidence) past(ctx context.Context, id string) tallies {
	age := max(time.Since(e.begun), 0)
	if age+pastWindow > maxWindow {
		return nil
	}
	// The shorter window first: what is counted between the two calls is in the longer
	// one alone.
	meanwhile, err := e.stats(ctx, id, max(age, time.Millisecond))
	if err != nil {
		return nil
	}
	all, err := e.stats(ctx, id, age+pastWindow)
	if err != nil {
		return nil
	}
	return talliesOf(all).since(talliesOf(meanwhile))
}

// once are the reasons of full handshakes that a changed identity costs once: they are
// no fault of the change.
var once = []string{"policy_changed", "policy_mismatch", "no_session"}

func talliesOf(stats *resealv1.EdgeStats) tallies {
	found := tallies{}
	add := func(backend bool, all []*resealv1.Stats) {
		for _, s := range all {
			h := s.GetHandshakes()
			t := tally{requests: s.GetRequests(), full: h.GetFull()}
			for _, n := range s.GetErrors() {
				t.failed += n
			}
			for _, reason := range once {
				t.full -= min(t.full, s.GetMisses()[reason])
			}
			t.handshakes = t.full + h.GetResumedSessionId() + h.GetResumedTicket() + h.GetResumedPsk()
			t.failed = min(t.failed, t.requests)
			found[spot{backend, s.GetName()}] = t
		}
	}
	add(true, stats.GetPools())
	add(false, stats.GetListeners())
	return found
}

// since is what was counted after base: what is new began at 0.
func (t tallies) since(base tallies) tallies {
	grown := tallies{}
	for key, now := range t {
		before := base[key]
		if now.requests < before.requests || now.handshakes < before.handshakes {
			before = tally{}
		}
		grown[key] = tally{
			now.requests - before.requests, now.failed - min(now.failed, before.failed),
			now.handshakes - before.handshakes, now.full - min(now.full, before.full),
		}
	}
	return grown
}

// compare adds up what each side did.
func (e *evidence) compare() *Shares {
	legs := map[bool]string{false: "clients", true: "backends"}
	shares := &Shares{}
	for _, backend := range []bool{false, true} {
		requests := Compared{What: "requests of " + legs[backend] + " failed", FromNothing: true}
		if backend {
			requests.What = "requests to backends failed"
		}
		handshakes := Compared{What: "handshakes with " + legs[backend] + " were full"}
		for _, w := range e.edges {
			now := w.now.since(w.base).sum(backend)
			if !w.moved {
				requests.Others.add(now.failed, now.requests)
				handshakes.Others.add(now.full, now.handshakes)
				continue
			}
			past := w.past.sum(backend)
			requests.Moved.add(now.failed, now.requests)
			requests.Past.add(past.failed, past.requests)
			handshakes.Moved.add(now.full, now.handshakes)
			handshakes.Past.add(past.full, past.handshakes)
		}
		shares.Errors = append(shares.Errors, requests)
		shares.FullHandshakes = append(shares.FullHandshakes, handshakes)
	}
	return shares
}

func (s *Share) add(count, of uint64) {
	s.Count += count
	s.Of += of
}

func (t tallies) sum(backend bool) tally {
	var sum tally
	for key, one := range t {
		if key.backend == backend {
			sum.requests += one.requests
			sum.failed += one.failed
			sum.handshakes += one.handshakes
			sum.full += one.full
		}
	}
	return sum
}
