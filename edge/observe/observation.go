package observe

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// leastPace is the least mean time between two requests that one observation is told
	// of: 50 a second, more than anybody reads, and next to nothing for an edge and its
	// link. Those of maxSaved may come at once.
	leastPace = 20 * time.Millisecond
	// maxSaved bounds a burst, and so what a report holds: with texts of maxTold bytes
	// some 80 KB in the worst case.
	maxSaved = 50
	// maxTold bounds each text of a request, in bytes.
	maxTold = 256
)

// observation is one observer's.
type observation struct {
	filter *resealv1.RequestFilter
	pace   time.Duration
	saved  int           // requests of a burst
	news   chan struct{} // holds a token when a request waits

	mu      sync.Mutex
	full    time.Time                   // when all that may be saved is there again
	waiting []*resealv1.ObservedRequest // to be told
	held    int                         // of these, and those that are about to be; at most saved
	matched uint64
	dropped uint64
}

func newObservation(order *resealv1.ObserveOrder) *observation {
	o := &observation{filter: order.GetFilter(), pace: max(leastPace, order.GetPace().AsDuration()), news: make(chan struct{}, 1)}
	o.saved = min(maxSaved, max(1, int(time.Second/o.pace)))
	return o
}

// see takes a request, if it fits and there is room.
func (o *observation) see(out *exchange.Outcome) {
	if !fits(o.filter, out) {
		return
	}
	chosen := o.filter.GetSample() <= 0 || rand.Float64() < o.filter.GetSample()
	if !o.admit(chosen, out.Ended) {
		return
	}
	request := observed(out)
	o.mu.Lock()
	o.waiting = append(o.waiting, request)
	o.mu.Unlock()
	select {
	case o.news <- struct{}{}:
	default:
	}
}

// admit counts a request that fits at a time, and reports whether it is to be told.
func (o *observation) admit(chosen bool, now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.matched++
	if !chosen {
		return false
	}
	if o.full.Before(now) {
		o.full = now
	}
	if o.held == o.saved || o.full.Sub(now) > time.Duration(o.saved-1)*o.pace {
		o.dropped++
		return false
	}
	o.full = o.full.Add(o.pace)
	o.held++
	return true
}

// report is what there is to tell. It takes the requests.
func (o *observation) report() *resealv1.ObserveReport {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := &resealv1.ObserveReport{Requests: o.waiting, Matched: o.matched, Dropped: o.dropped}
	o.held -= len(o.waiting)
	o.waiting = nil
	return r
}

// tell tells what there is by send, until ctx ends or send says that it can't. Counts
// alone are told no more often than requests may be.
func (o *observation) tell(ctx context.Context, send func(*resealv1.ObserveReport) bool) {
	counts := time.NewTicker(max(tellCounts, o.pace))
	defer counts.Stop()
	var told *resealv1.ObserveReport
	for {
		select {
		case <-ctx.Done():
			return
		case <-o.news:
			if !pause(ctx, gather) {
				return
			}
		case <-counts.C:
		}
		next := o.report()
		if len(next.GetRequests()) == 0 && next.GetMatched() == told.GetMatched() {
			continue
		}
		if !send(next) {
			return
		}
		told = next
	}
}

// pause is false when ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// observed is what is told of a request. It keeps nothing of o.
func observed(o *exchange.Outcome) *resealv1.ObservedRequest {
	x := o.Exchange
	r := &resealv1.ObservedRequest{
		Time: timestamppb.New(o.Ended), Duration: durationpb.New(o.Duration),
		Listener: o.Listener, Route: o.Route, Pool: o.Pool, Endpoint: x.Endpoint, Protocol: o.Protocol,
		Method: exchange.Told(o.Method, maxTold), Host: exchange.Told(o.Host, maxTold), Path: exchange.Told(o.Path, maxTold),
		Status: int32(o.Status), Reason: o.Reason, Blame: o.Blame, Attempts: int32(x.Attempts), BytesIn: o.In, BytesOut: o.Out,
		Frontend: &resealv1.ObservedConnection{Reused: !x.First, Resumed: o.ClientResumed, Miss: o.ClientMiss},
	}
	if o.Err != nil {
		r.Error = exchange.Told(o.Err.Error(), maxTold)
	}
	if connected(o) {
		r.Backend = &resealv1.ObservedConnection{Reused: x.Reused, Resumed: x.Resumed, Miss: x.Miss}
	}
	if x.Connect > 0 {
		r.Connect = durationpb.New(x.Connect)
	}
	return r
}
