package feed

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxObservations bounds those that run at the same time. Edges take as many.
	maxObservations = 8
	// observedRate is how many requests a second the edges of this replica may tell one
	// observer of, and edgeRate how many of them one edge: more than anybody reads, and
	// little for a replica to pass on, however many edges there are.
	observedRate = 2000
	edgeRate     = 50
	// maxWaiting bounds the requests that wait for an observer who does not take them,
	// some 4 MB in the worst case.
	maxWaiting = 1000
	// observedGather is the least time between two responses.
	observedGather = 100 * time.Millisecond
	// lookInterval is how often it is looked for edges that came, left or don't answer.
	lookInterval = time.Second
	// silentAfter is when an edge counts as one that does not answer.
	silentAfter = time.Second
	// renewInterval is how often edges are told to go on, a third of how long they do
	// without, and how often those that don't answer are asked again.
	renewInterval = 10 * time.Second
	// maxFilter bounds a filter, in bytes, and maxAlternatives the ranges and reasons in it:
	// an edge compares each request with all of them.
	maxFilter       = 8 << 10
	maxAlternatives = 16
)

// observations are those that run.
type observations struct {
	mu     sync.Mutex
	newest uint64
	all    map[uint64]*observation
}

// observation is what one caller of ObserveRequests sees.
type observation struct {
	edge  string // "": any
	order *resealv1.ObserveOrder
	news  chan struct{} // holds a token when there may be something to send

	mu      sync.Mutex
	ended   bool
	members map[string]*member // the connected edges that are meant, nil: it was not looked yet
	telling int                // those that tell of their requests
	waiting []*resealv1.ObservedRequest
	matched uint64
	dropped uint64
	fleet   *resealv1.ObservedFleet // who takes part, to be sent; nil: nothing new
	said    *resealv1.ObservedFleet // what was sent last of that
}

// member is an edge that is meant.
type member struct {
	stream *session
	line   *observed // nil: it does not tell of its requests
	since  time.Time // when it began not to
	asked  time.Time // when it was last
}

func (os *observations) begin(request *resealv1.ObserveRequestsRequest) (*observation, error) {
	os.mu.Lock()
	defer os.mu.Unlock()
	if len(os.all) >= maxObservations {
		return nil, status.Errorf(codes.ResourceExhausted, "%d observations run already at this replica: end one of them", maxObservations)
	}
	if os.all == nil {
		os.all = map[uint64]*observation{}
	}
	os.newest++
	o := &observation{
		edge: request.GetEdge(), order: &resealv1.ObserveOrder{Id: os.newest, Filter: request.GetFilter()},
		news: make(chan struct{}, 1),
	}
	os.all[os.newest] = o
	return o, nil
}

// end ends an observation at all edges.
func (os *observations) end(o *observation) {
	os.mu.Lock()
	delete(os.all, o.order.GetId())
	os.mu.Unlock()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	for _, m := range o.members {
		m.end(nil)
	}
}

// end ends what the edge tells, if it does.
func (m *member) end(err error) {
	if m.line != nil {
		m.line.line.End(err)
	}
}

func (os *observations) find(id uint64) *observation {
	os.mu.Lock()
	defer os.mu.Unlock()
	return os.all[id]
}

// ObserveRequests implements resealv1.FleetServiceServer. It does not look whether an edge
// that is named is connected: it may come.
func (s *Server) ObserveRequests(request *resealv1.ObserveRequestsRequest, stream grpc.ServerStreamingServer[resealv1.ObserveRequestsResponse]) error {
	if err := checkFilter(request.GetFilter()); err != nil {
		return err
	}
	o, err := s.observations.begin(request)
	if err != nil {
		return err
	}
	// Edges are told to go on however slowly the caller takes what they say.
	ctx, cancel := context.WithCancel(stream.Context())
	var keeping sync.WaitGroup
	keeping.Go(func() { s.keep(ctx, o) })
	defer keeping.Wait()
	defer s.observations.end(o)
	defer cancel()
	s.config.Logger.Info("requests are observed", "edge", request.GetEdge(), "pool", request.GetFilter().GetPool(), "listener", request.GetFilter().GetListener())
	pause := time.NewTimer(observedGather)
	defer pause.Stop()
	for {
		if err := wait(ctx, s, o.news); err != nil {
			return err
		}
		if err := stream.Send(o.response()); err != nil {
			return err
		}
		pause.Reset(observedGather)
		if err := wait(ctx, s, pause.C); err != nil {
			return err
		}
	}
}

// keep asks edges that come, tells those that tell of their requests to go on, and finds
// out who does not answer, until ctx ends.
func (s *Server) keep(ctx context.Context, o *observation) {
	look, renew := time.NewTicker(lookInterval), time.NewTicker(renewInterval)
	defer look.Stop()
	defer renew.Stop()
	for {
		o.look(s.table.streams(), time.Now())
		select {
		case <-look.C:
		case <-renew.C:
			o.renew()
		case <-ctx.Done():
			return
		}
	}
}

// look asks those of the connected edges that don't tell of their requests, and forgets
// those that left.
func (o *observation) look(streams []*session, now time.Time) {
	if o.edge != "" {
		streams = slices.DeleteFunc(streams, func(stream *session) bool { return stream.id != o.edge })
	}
	wanted := proto.CloneOf(o.order)
	wanted.Pace = durationpb.New(pace(len(streams)))
	message := &resealv1.SyncResponse{Message: &resealv1.SyncResponse_ObserveOrder{ObserveOrder: wanted}}
	o.mu.Lock()
	defer o.mu.Unlock()
	before := o.members
	o.members, o.telling = make(map[string]*member, len(streams)), 0
	for _, stream := range streams {
		m := before[stream.id]
		if m == nil || m.stream != stream {
			m = &member{stream: stream, since: now}
		} else {
			delete(before, stream.id)
		}
		if m.line == nil && now.Sub(m.asked) >= renewInterval && stream.order(order{message: message}) {
			m.asked = now
		}
		if m.line != nil {
			o.telling++
		}
		o.members[stream.id] = m
	}
	for id, m := range before {
		m.end(fleet.Superseded(id))
	}
	o.describe(now)
}

// pace is the mean time between two requests that each of n edges may tell of.
func pace(n int) time.Duration {
	return max(time.Second/edgeRate, time.Duration(n)*time.Second/observedRate)
}

// describe finds out who takes part. o.mu is held.
func (o *observation) describe(now time.Time) {
	found := &resealv1.ObservedFleet{Edges: int32(o.telling)}
	var silent []string
	for id, m := range o.members {
		switch {
		case m.line != nil:
		case now.Sub(m.since) >= silentAfter:
			silent = append(silent, id)
		case o.said == nil:
			return // it has a moment to answer
		}
	}
	found.SetSilent(silent)
	o.fleet = nil
	if !proto.Equal(found, o.said) {
		o.fleet = found
		o.wake()
	}
}

// renew tells the edges to go on.
func (o *observation) renew() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, m := range o.members {
		if m.line != nil {
			m.line.renew()
		}
	}
}

func (o *observation) wake() {
	select {
	case o.news <- struct{}{}:
	default:
	}
}

// response is what there is to send. It takes the requests.
func (o *observation) response() *resealv1.ObserveRequestsResponse {
	o.mu.Lock()
	defer o.mu.Unlock()
	response := &resealv1.ObserveRequestsResponse{Requests: o.waiting, Matched: o.matched, Dropped: o.dropped, Fleet: o.fleet}
	if o.fleet != nil {
		o.said = o.fleet
	}
	o.waiting, o.fleet = nil, nil
	return response
}

// join takes an edge in that begins to tell.
func (o *observation) join(c *observed) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	m := o.members[c.id]
	if o.ended || m == nil {
		return errNotObserved
	}
	m.end(fleet.Superseded(c.id))
	if m.line == nil {
		o.telling++
	}
	m.line = c
	if o.telling == len(o.members) { // otherwise at the next look: edges come in crowds
		o.describe(time.Now())
	}
	return nil
}

// leave takes out an edge that does not tell any more.
func (o *observation) leave(c *observed) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if m := o.members[c.id]; m != nil && m.line == c {
		m.line, m.since = nil, time.Now()
		o.telling--
	}
}

// add takes what an edge has seen since its last report.
func (o *observation) add(requests []*resealv1.ObservedRequest, matched, dropped uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	room := min(len(requests), maxWaiting-len(o.waiting))
	o.waiting = append(o.waiting, requests[:room]...)
	o.matched += matched
	o.dropped += dropped + uint64(len(requests)-room)
	o.wake()
}

// checkFilter refuses what can't be meant, and what is too much for each edge to look at
// for each request.
func checkFilter(f *resealv1.RequestFilter) error {
	refuse := func(format string, args ...any) error {
		return status.Errorf(codes.InvalidArgument, "filter."+format, args...)
	}
	switch slower := f.GetSlowerThan(); {
	case proto.Size(f) > maxFilter:
		return status.Errorf(codes.InvalidArgument, "filter: has %d bytes, at most %d are allowed", proto.Size(f), maxFilter)
	case len(f.GetStatuses()) > maxAlternatives:
		return refuse("statuses: has %d ranges, at most %d are allowed", len(f.GetStatuses()), maxAlternatives)
	case len(f.GetReasons()) > maxAlternatives:
		return refuse("reasons: has %d, at most %d are allowed", len(f.GetReasons()), maxAlternatives)
	case len(f.GetMisses()) > 2*maxAlternatives:
		return refuse("misses: has %d, at most %d are allowed", len(f.GetMisses()), 2*maxAlternatives)
	case slower != nil && (slower.CheckValid() != nil || slower.AsDuration() < 0):
		return refuse("slower_than: must be a duration of at least 0s")
	case !(f.GetSample() >= 0 && f.GetSample() <= 1): // NaN is neither
		return refuse("sample: must be from 0 to 1")
	}
	for _, r := range f.GetStatuses() {
		if r.GetFirst() < 0 || r.GetLast() < r.GetFirst() {
			return refuse("statuses: %d to %d is no range", r.GetFirst(), r.GetLast())
		}
	}
	return nil
}
