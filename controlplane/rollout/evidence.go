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
	warm  tallies   // a look later, when it has its connections to backends again
	looks int
	past  tallies // before the change began, for moved ones
	now   tallies
}

// tallies are counters by the name of a pool or listener.
type tallies map[spot]tally

// spot is a pool or a listener.
type spot struct {
	backend bool
	name    string
}

type tally struct {
	requests, failed, handshakes, full uint64

	answered, ill uint64                               // of listeners: with a status, with 5xx
	waits         [len(resealv1.WaitBounds) + 1]uint64 // of listeners, as Stats.waits
}

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
			if w.looks++; w.looks <= 2 {
				w.warm = w.now
			}
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

var waitLabels = resealv1.WaitLabels()

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
			for class, n := range s.GetAnswers() {
				t.answered += n
				if class == "5xx" {
					t.ill += n
				}
			}
			for i, bound := range waitLabels {
				t.waits[i] = s.GetWaits()[bound]
			}
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
		grown[key] = now.minus(before)
	}
	return grown
}

func (t tally) minus(base tally) tally {
	t.requests -= min(t.requests, base.requests)
	t.failed -= min(t.failed, base.failed)
	t.handshakes -= min(t.handshakes, base.handshakes)
	t.full -= min(t.full, base.full)
	t.answered -= min(t.answered, base.answered)
	t.ill -= min(t.ill, base.ill)
	for i := range t.waits {
		t.waits[i] -= min(t.waits[i], base.waits[i])
	}
	return t
}

func (t tally) plus(more tally) tally {
	t.requests += more.requests
	t.failed += more.failed
	t.handshakes += more.handshakes
	t.full += more.full
	t.answered += more.answered
	t.ill += more.ill
	for i := range t.waits {
		t.waits[i] += more.waits[i]
	}
	return t
}

// waited are the requests that took longer than a bound, and all.
func (t tally) waited(bound int) Share {
	var s Share
	for i, n := range t.waits {
		s.Of += n
		if i > bound {
			s.Count += n
		}
	}
	return s
}

// sides are what was counted on one leg by edges that have the candidate, by the same
// edges before, and by others.
type sides struct{ moved, past, others tally }

func (e *evidence) sides(backend bool, from func(*witness) tallies) sides {
	var sum sides
	for _, w := range e.edges {
		now := w.now.since(from(w)).sum(backend)
		if w.moved {
			sum.moved, sum.past = sum.moved.plus(now), sum.past.plus(w.past.sum(backend))
		} else {
			sum.others = sum.others.plus(now)
		}
	}
	return sum
}

// compared are the shares that of finds.
func (s sides) compared(what string, of func(tally) Share) Compared {
	return Compared{What: what, Moved: of(s.moved), Past: of(s.past), Others: of(s.others)}
}

// compare finds the shares of what each side did.
func (e *evidence) compare() *Shares {
	failed := func(t tally) Share { return Share{t.failed, t.requests} }
	full := func(t tally) Share { return Share{t.full, t.handshakes} }
	base := func(w *witness) tallies { return w.base }
	clients, backends := e.sides(false, base), e.sides(true, base)
	warm := e.sides(false, func(w *witness) tallies { return w.warm })
	shares := &Shares{
		Errors: []Compared{
			clients.compared("requests of clients failed", failed),
			backends.compared("requests to backends failed", failed),
			clients.compared("requests of clients were answered with 5xx", func(t tally) Share { return Share{t.ill, t.answered} }),
		},
		FullHandshakes: []Compared{
			clients.compared("handshakes with clients were full", full),
			backends.compared("handshakes with backends were full", full),
		},
	}
	shares.Errors[0].FromNothing, shares.Errors[1].FromNothing = true, true
	for i := len(resealv1.WaitBounds) - 1; i > 0; i-- { // the longest tells most
		shares.Latency = append(shares.Latency, Compared{
			What:  fmt.Sprintf("requests of clients waited longer than %s", resealv1.WaitBounds[i]),
			Moved: warm.moved.waited(i), Past: warm.past.waited(i - 1), Others: warm.others.waited(i - 1),
			Than: fmt.Sprintf(" longer than %s", resealv1.WaitBounds[i-1]),
		})
	}
	return shares
}

func (t tallies) sum(backend bool) tally {
	var sum tally
	for key, one := range t {
		if key.backend == backend {
			sum = sum.plus(one)
		}
	}
	return sum
}
