// Package observe has operators see, live, what becomes of requests.
//
// While nobody looks, a request costs one load of a pointer. While somebody does, the
// loops apply the filter, and take what fits into a queue that is bounded in number and
// in rate; what has no room is counted and forgotten. So nothing that an observer asks
// for, or fails to read, delays a request.
package observe

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxObservations bounds those that run at the same time: a replica of the control
	// plane has no more.
	maxObservations = 8
	// lease is how long an observation goes on without a word of the control plane, which
	// says one every 10 s. It matters when the connection hangs: its end is the end of
	// all observations.
	lease = 30 * time.Second
	// gather is how long the first request of a report waits for others.
	gather = 100 * time.Millisecond
	// tellCounts is how often counts are told while there is nothing else to tell.
	tellCounts = time.Second
)

var errTooMany = fmt.Errorf("%d observations run already", maxObservations)

// Observers are those who see requests now. All methods are safe for concurrent use.
type Observers struct {
	edge string
	now  atomic.Pointer[[]*observation] // nil: nobody

	mu sync.Mutex // of who changes now
}

// New makes Observers, of whom there are none, of the edge that has this id.
func New(edge string) *Observers { return &Observers{edge: edge} }

// Watching tells whether anybody wants to see requests.
func (os *Observers) Watching() bool { return os.now.Load() != nil }

// Count is how many watch.
func (os *Observers) Count() int {
	now := os.now.Load()
	if now == nil {
		return 0
	}
	return len(*now)
}

// See has all see a request. It does not block, and keeps nothing of o.
func (os *Observers) See(o *exchange.Outcome) {
	now := os.now.Load()
	if now == nil {
		return
	}
	for _, each := range *now {
		each.see(o)
	}
}

func (os *Observers) add(o *observation) error {
	os.mu.Lock()
	defer os.mu.Unlock()
	if os.Count() >= maxObservations {
		return errTooMany
	}
	all := []*observation{o}
	if now := os.now.Load(); now != nil {
		all = append(all, *now...)
	}
	os.now.Store(&all)
	return nil
}

func (os *Observers) remove(o *observation) {
	os.mu.Lock()
	defer os.mu.Unlock()
	now := os.now.Load()
	if now == nil {
		return
	}
	all := slices.DeleteFunc(slices.Clone(*now), func(other *observation) bool { return other == o })
	if len(all) == 0 {
		os.now.Store(nil)
		return
	}
	os.now.Store(&all)
}

// Follow follows an order until ctx or the stream ends, or nobody has said for a while
// that it is to go on. It returns why.
func (os *Observers) Follow(ctx context.Context, client resealv1.ObservationServiceClient, order *resealv1.ObserveOrder) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := client.Observe(ctx)
	if err != nil {
		return err
	}
	start := &resealv1.ObserveStart{Edge: os.edge, Id: order.GetId()}
	if err := stream.Send(&resealv1.ObserveRequest{Message: &resealv1.ObserveRequest_Start{Start: start}}); err != nil {
		_, err = stream.Recv() // which says why
		return err
	}
	if _, err := stream.Recv(); err != nil {
		return err
	}
	o := newObservation(order)
	if err := os.add(o); err != nil {
		return err
	}
	// Whoever sends may be held up by the connection. Seeing ends all the same.
	defer context.AfterFunc(ctx, func() { os.remove(o) })()
	defer os.remove(o)
	ended := time.AfterFunc(lease, func() { cancel(errLease) })
	defer ended.Stop()
	group := errgroup.Group{}
	group.Go(func() error {
		for {
			if _, err := stream.Recv(); err != nil {
				cancel(err)
				return err
			}
			ended.Reset(lease)
		}
	})
	o.tell(ctx, func(report *resealv1.ObserveReport) bool {
		return stream.Send(&resealv1.ObserveRequest{Message: &resealv1.ObserveRequest_Report{Report: report}}) == nil
	})
	if err := group.Wait(); context.Cause(ctx) == nil {
		return err
	}
	return context.Cause(ctx)
}

var errLease = errors.New("the control plane has not said for " + lease.String() + " that it is to go on")
