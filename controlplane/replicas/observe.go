package replicas

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// observed is what an observation brought of one replica.
type observed struct {
	replica string
	said    *resealv1.ObserveRequestsResponse
	err     error // why it has ended
}

// source is what a replica has said so far, since its observation began.
type source struct {
	peer             *peer // nil: this replica
	end              context.CancelFunc
	matched, dropped uint64
	fleet            *resealv1.ObservedFleet // nil: it has not said
	err              error                   // why it says nothing
}

// observing is one call of ObserveRequests: one observation of each replica, that is all.
// Nothing is kept of requests here: a caller who does not take them holds up the
// replicas, which count what they leave out.
type observing struct {
	fleet            *Fleet
	request          *resealv1.ObserveRequestsRequest
	news             chan observed
	sources          map[string]*source
	matched, dropped uint64                  // of sources that have begun anew, or are gone
	said             *resealv1.ObservedFleet // nil: nothing yet
	all              sync.WaitGroup
}

// ObserveRequests implements resealv1.FleetServiceServer.
func (f *Fleet) ObserveRequests(request *resealv1.ObserveRequestsRequest, stream grpc.ServerStreamingServer[resealv1.ObserveRequestsResponse]) error {
	if f.FromReplica(stream.Context()) {
		return f.Fleet.ObserveRequests(request, stream)
	}
	if request.GetEdge() != "" {
		if _, err := f.holder(stream.Context(), request.GetEdge()); err != nil && !errors.Is(err, errHere) {
			return err
		}
	}
	ctx, cancel := context.WithCancel(stream.Context())
	own := f.group.config.ID
	o := &observing{fleet: f, request: request, news: make(chan observed), sources: map[string]*source{own: {}}}
	defer o.all.Wait()
	defer cancel()
	local := make(chan error, 1)
	o.all.Go(func() { local <- f.Fleet.ObserveRequests(request, &passing{ctx: ctx, o: o, replica: own}) })
	return o.run(ctx, stream, local)
}

// run passes on what comes.
func (o *observing) run(ctx context.Context, stream grpc.ServerStreamingServer[resealv1.ObserveRequestsResponse], local <-chan error) error {
	patience := time.NewTimer(askTimeout)
	defer patience.Stop()
	waiting, changed := true, o.follow(ctx)
	for {
		response := &resealv1.ObserveRequestsResponse{}
		select {
		case n := <-o.news:
			response.Requests = o.take(n)
		case <-changed:
			changed = o.follow(ctx)
		case <-patience.C:
			waiting = false
		case err := <-local:
			return err
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
		waiting = waiting && !o.complete()
		if fleet := o.members(); !waiting && !proto.Equal(fleet, o.said) {
			response.Fleet, o.said = fleet, fleet
		}
		response.Matched, response.Dropped = o.totals()
		if err := stream.Send(response); err != nil {
			return err
		}
	}
}

// follow observes at each of the other replicas, and at no others. The channel is closed
// when these have changed.
func (o *observing) follow(ctx context.Context) (changed <-chan struct{}) {
	peers, changed := o.fleet.group.others()
	for id, s := range o.sources {
		if s.peer != nil && !slices.Contains(peers, s.peer) { // it is gone, or has moved
			s.end()
			o.settle(s)
			delete(o.sources, id)
		}
	}
	for _, p := range peers {
		if o.sources[p.id] == nil {
			inner, cancel := context.WithCancel(ctx)
			o.sources[p.id] = &source{peer: p, end: cancel}
			o.all.Go(func() { o.keep(inner, p) })
		}
	}
	return changed
}

// keep brings what one replica says until ctx ends.
func (o *observing) keep(ctx context.Context, p *peer) {
	for {
		if o.tell(ctx, observed{replica: p.id, err: o.once(ctx, p)}) != nil {
			return
		}
		timer := time.NewTimer(watchAgain)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// once returns why it has ended.
func (o *observing) once(ctx context.Context, p *peer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := resealv1.NewFleetServiceClient(p.conn).ObserveRequests(ctx, o.request)
	for err == nil {
		var said *resealv1.ObserveRequestsResponse
		if said, err = stream.Recv(); err == nil {
			o.fleet.group.heard(p, nil)
			err = o.tell(ctx, observed{replica: p.id, said: said})
		}
	}
	return err
}

// tell passes on what came, unless the observation ends first.
func (o *observing) tell(ctx context.Context, n observed) error {
	select {
	case o.news <- n:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// take notes what a replica says, and returns the requests. What comes of one that is
// gone is not passed on.
func (o *observing) take(n observed) []*resealv1.ObservedRequest {
	s := o.sources[n.replica]
	switch {
	case s == nil:
		return nil
	case n.said == nil:
		o.settle(s)
		s.err = n.err
		return nil
	}
	s.err, s.matched, s.dropped = nil, n.said.GetMatched(), n.said.GetDropped()
	if fleet := n.said.GetFleet(); fleet != nil {
		s.fleet = fleet
	}
	return n.said.GetRequests()
}

// settle keeps what an observation counted that has ended: the next begins anew.
func (o *observing) settle(s *source) {
	o.matched += s.matched
	o.dropped += s.dropped
	s.matched, s.dropped, s.fleet = 0, 0, nil
}

func (o *observing) totals() (matched, dropped uint64) {
	matched, dropped = o.matched, o.dropped
	for _, s := range o.sources {
		matched += s.matched
		dropped += s.dropped
	}
	return matched, dropped
}

// complete tells whether each replica has said who takes part, or can't.
func (o *observing) complete() bool {
	for _, s := range o.sources {
		if s.fleet == nil && s.err == nil {
			return false
		}
	}
	return true
}

// members is who takes part.
func (o *observing) members() *resealv1.ObservedFleet {
	all := &resealv1.ObservedFleet{}
	var silent []string
	for id, s := range o.sources {
		all.Edges += s.fleet.GetEdges()
		silent = append(silent, s.fleet.GetSilentEdges()...)
		switch {
		case s.err != nil:
			all.Unanswered = append(all.Unanswered, o.fleet.group.missing(id, s.err))
		case s.fleet == nil:
			all.Unanswered = append(all.Unanswered, o.fleet.group.missing(id, context.DeadlineExceeded))
		}
	}
	all.SetSilent(silent)
	slices.SortFunc(all.Unanswered, func(a, b *resealv1.UnansweredReplica) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return all
}

// passing takes what is observed at this replica.
type passing struct {
	grpc.ServerStream
	ctx     context.Context
	o       *observing
	replica string
}

// Context implements grpc.ServerStream.
func (p *passing) Context() context.Context { return p.ctx }

// Send implements grpc.ServerStreamingServer.
func (p *passing) Send(said *resealv1.ObserveRequestsResponse) error {
	return p.o.tell(p.ctx, observed{replica: p.replica, said: said})
}
