package replicas

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// watchInterval is the least time between two lists of WatchEdges.
	watchInterval = 500 * time.Millisecond
	// watchAgain is the pause before a watch of a replica that broke is begun again.
	watchAgain = time.Second
)

// seen is the newest that a watch brought of one replica.
type seen struct {
	replica string
	edges   []*resealv1.Edge
	err     error // why there is nothing
}

// watching is one call of WatchEdges: one watch of each replica, that is all.
type watching struct {
	fleet   *Fleet
	request *resealv1.WatchEdgesRequest
	news    chan seen
	known   map[string]seen
	ends    map[string]context.CancelFunc // of the watches of other replicas
}

// WatchEdges implements resealv1.FleetServiceServer.
func (f *Fleet) WatchEdges(request *resealv1.WatchEdgesRequest, stream grpc.ServerStreamingServer[resealv1.WatchEdgesResponse]) error {
	if f.FromReplica(stream.Context()) {
		return f.Fleet.WatchEdges(request, &signing{stream, f.group})
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	w := &watching{fleet: f, request: request, news: make(chan seen), known: map[string]seen{}, ends: map[string]context.CancelFunc{}}
	local := make(chan error, 1)
	go func() { local <- f.Fleet.WatchEdges(request, &capture{ctx: ctx, w: w}) }()
	return w.run(ctx, stream, local)
}

// run sends what there is when all have spoken, or did not in time, and then what
// changes.
func (w *watching) run(ctx context.Context, stream grpc.ServerStreamingServer[resealv1.WatchEdgesResponse], local <-chan error) error {
	patience := time.NewTimer(askTimeout)
	defer patience.Stop()
	pause := time.NewTimer(0)
	defer pause.Stop()
	paused, waiting, dirty := true, true, false
	var last *resealv1.WatchEdgesResponse
	for {
		peers, changed := w.fleet.group.others()
		dirty = w.follow(ctx, peers) || dirty
		if _, ok := w.known[w.fleet.group.config.ID]; ok && len(w.known) == len(peers)+1 {
			waiting = false
		}
		if dirty && !paused && !waiting {
			response := w.response(peers)
			if last == nil || !proto.Equal(last, response) {
				if err := stream.Send(response); err != nil {
					return err
				}
				last = response
			}
			dirty, paused = false, true
			pause.Reset(watchInterval)
		}
		select {
		case n := <-w.news:
			w.known[n.replica], dirty = n, true
		case <-changed:
		case <-pause.C:
			paused = false
		case <-patience.C:
			waiting, dirty = false, true
		case err := <-local:
			return err
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// follow watches each of the other replicas, and no others. It says whether one was
// forgotten.
func (w *watching) follow(ctx context.Context, peers []*peer) (forgotten bool) {
	for _, p := range peers {
		if w.ends[p.id] != nil {
			continue
		}
		inner, cancel := context.WithCancel(ctx)
		w.ends[p.id] = cancel
		go w.watch(inner, p)
	}
	for id, end := range w.ends {
		if !slices.ContainsFunc(peers, func(p *peer) bool { return p.id == id }) {
			end()
			delete(w.ends, id)
			delete(w.known, id)
			forgotten = true
		}
	}
	return forgotten
}

// watch brings what one replica says until ctx ends.
func (w *watching) watch(ctx context.Context, p *peer) {
	for ctx.Err() == nil {
		err := w.watchOnce(ctx, p)
		w.tell(ctx, seen{replica: p.id, err: err})
		timer := time.NewTimer(watchAgain)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

func (w *watching) watchOnce(ctx context.Context, p *peer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := resealv1.NewFleetServiceClient(p.conn).WatchEdges(ctx, w.request)
	for err == nil {
		var list *resealv1.WatchEdgesResponse
		if list, err = stream.Recv(); err == nil {
			w.fleet.group.heard(p, nil)
			w.tell(ctx, seen{replica: p.id, edges: list.GetEdges()})
		}
	}
	return err
}

// tell passes news on, unless the watch ends first.
func (w *watching) tell(ctx context.Context, n seen) {
	select {
	case w.news <- n:
	case <-ctx.Done():
	}
}

// response is what there is now.
func (w *watching) response(peers []*peer) *resealv1.WatchEdgesResponse {
	lists := [][]*resealv1.Edge{w.known[w.fleet.group.config.ID].edges}
	response := &resealv1.WatchEdgesResponse{}
	for _, p := range peers {
		switch n, ok := w.known[p.id]; {
		case !ok:
			response.Unanswered = append(response.Unanswered, w.fleet.group.missing(p.id, context.DeadlineExceeded))
		case n.err != nil:
			response.Unanswered = append(response.Unanswered, w.fleet.group.missing(p.id, n.err))
		default:
			lists = append(lists, n.edges)
		}
	}
	response.Edges = mergeEdges(lists)
	return response
}

// capture takes the lists of this replica.
type capture struct {
	grpc.ServerStream
	ctx context.Context
	w   *watching
}

// Context implements grpc.ServerStream.
func (c *capture) Context() context.Context { return c.ctx }

// Send implements grpc.ServerStreamingServer.
func (c *capture) Send(list *resealv1.WatchEdgesResponse) error {
	group := c.w.fleet.group
	edges := list.GetEdges()
	group.sign(edges)
	c.w.tell(c.ctx, seen{replica: group.config.ID, edges: edges})
	return c.ctx.Err()
}

// signing is a stream to another replica.
type signing struct {
	grpc.ServerStreamingServer[resealv1.WatchEdgesResponse]
	group *Group
}

// Send implements grpc.ServerStreamingServer.
func (s *signing) Send(list *resealv1.WatchEdgesResponse) error {
	s.group.sign(list.GetEdges())
	return s.ServerStreamingServer.Send(list)
}
