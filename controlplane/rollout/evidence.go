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

// tally are counters by what they count.
type tally [kinds]uint64

// What is counted.
const (
	requests   = iota
	failed     // of requests
	handshakes // but for those in once
	full       // of handshakes
	answered   // requests of clients with a status
	ill        // of those, with 5xx
	waits      // the first of as many as Stats.waits has keys
	kinds      = waits + len(resealv1.WaitBounds) + 1
)

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

// once are the reasons of full handshakes that a changed identity costs once: they are
// no fault of the change.
var once = []string{"policy_changed", "policy_mismatch", "no_session"}

func talliesOf(stats *resealv1.EdgeStats) tallies {
	found := tallies{}
	add := func(backend bool, all []*resealv1.Stats) {
		for _, s := range all {
			found[spot{backend, s.GetName()}] = tallyOf(s)
		}
	}
	add(true, stats.GetPools())
	add(false, stats.GetListeners())
	return found
}

func tallyOf(s *resealv1.Stats) tally {
	h := s.GetHandshakes()
	t := tally{requests: s.GetRequests(), full: h.GetFull(), ill: s.GetAnswers()["5xx"]}
	for _, n := range s.GetErrors() {
		t[failed] += n
	}
	t[failed] = min(t[failed], t[requests])
	for _, reason := range once {
		t[full] -= min(t[full], s.GetMisses()[reason])
	}
	t[handshakes] = t[full] + h.GetResumedSessionId() + h.GetResumedTicket() + h.GetResumedPsk()
	for _, n := range s.GetAnswers() {
		t[answered] += n
	}
	for i, bound := range resealv1.WaitLabels {
		t[waits+i] = s.GetWaits()[bound]
	}
	return t
}

// since is what was counted after base: what is new began at 0.
func (t tallies) since(base tallies) tallies {
	grown := tallies{}
	for key, now := range t {
		before := base[key]
		if now[requests] < before[requests] || now[handshakes] < before[handshakes] {
			before = tally{}
		}
		for i := range now {
			now[i] -= min(now[i], before[i])
		}
		grown[key] = now
	}
	return grown
}

// waited are the requests that took longer than a bound, and all.
func (t tally) waited(bound int) Share {
	var s Share
	for i, n := range t[waits:] {
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
		now := w.now.since(from(w))
		if w.moved {
			sum.moved.add(now, backend)
			sum.past.add(w.past, backend)
		} else {
			sum.others.add(now, backend)
		}
	}
	return sum
}

// add adds what was counted on one leg.
func (t *tally) add(all tallies, backend bool) {
	for key, one := range all {
		if key.backend == backend {
			for i, n := range one {
				t[i] += n
			}
		}
	}
}

// compared are the shares that of finds.
func (s sides) compared(what string, of func(tally) Share) Compared {
	return Compared{What: what, Moved: of(s.moved), Past: of(s.past), Others: of(s.others)}
}

// compare finds the shares of what each side did.
func (e *evidence) compare() *Shares {
	of := func(count, all int) func(tally) Share { return func(t tally) Share { return Share{t[count], t[all]} } }
	base := func(w *witness) tallies { return w.base }
	clients, backends := e.sides(false, base), e.sides(true, base)
	warm := e.sides(false, func(w *witness) tallies { return w.warm })
	shares := &Shares{
		Errors: []Compared{
			clients.compared("requests of clients failed", of(failed, requests)),
			backends.compared("requests to backends failed", of(failed, requests)),
			clients.compared("requests of clients were answered with 5xx", of(ill, answered)),
		},
		FullHandshakes: []Compared{
			clients.compared("handshakes with clients were full", of(full, handshakes)),
			backends.compared("handshakes with backends were full", of(full, handshakes)),
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
