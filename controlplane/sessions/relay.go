package sessions

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxRelayed bounds the offers under way to one replica, in bytes.
const maxRelayed = 16 << 20

// Edges of other replicas are members too, by what those replicas say of them
// (ReplicaService.Relay): a member with an outlet. What such a member is told goes
// through the outlet to its replica; who it meets and what it is seeded with is that
// replica's affair, which knows this one's edges in the same way.

// outlet is the way to another replica. Guarded by Server.mu.
type outlet struct {
	open     bool // otherwise what is pushed is lost
	queue    []*resealv1.RelayRequest
	underWay int           // bytes of the offers in queue
	wake     chan struct{} // something is queued
	full     bool          // the replica does not read
}

func (o *outlet) push(message *resealv1.RelayRequest) {
	switch {
	case !o.open:
		return
	case len(o.queue) >= 2*maxMessages:
		o.full = true
	default:
		o.queue = append(o.queue, message)
	}
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// forward passes on what a member of another replica is told here, as far as it is
// this replica that tells it.
func (o *outlet) forward(m *member, message *resealv1.ExchangeResponse) {
	switch {
	case message.GetOffer() != nil:
		o.push(&resealv1.RelayRequest{Message: &resealv1.RelayRequest_Offer{Offer: message.GetOffer()}})
	case message.GetSeed() != nil:
		o.push(&resealv1.RelayRequest{Message: &resealv1.RelayRequest_Seed{
			Seed: &resealv1.RelayedSeed{Holder: m.id, Seed: message.GetSeed()},
		}})
	}
}

// RelayTo tells another replica of the edges of this one, and brings its edges what
// they offer, until the stream breaks or ctx ends. It runs once for each replica at a
// time.
func (s *Server) RelayTo(ctx context.Context, replica string, client resealv1.ReplicaServiceClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Relay(ctx)
	if err != nil {
		return err
	}
	o := s.openOutlet(replica)
	defer s.closeOutlet(replica)
	ended := make(chan error, 1)
	go func() {
		_, err := stream.Header() // comes with the end, as there is no response
		if err == nil {
			err = stream.RecvMsg(&resealv1.RelayResponse{})
		}
		ended <- err
	}()
	for {
		message, err := s.nextRelayed(o)
		if err != nil {
			return err
		}
		if message != nil {
			if err := stream.Send(message); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			continue
		}
		select {
		case <-o.wake:
		case err := <-ended:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// openOutlet begins with all edges of this replica.
func (s *Server) openOutlet(replica string) *outlet {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.outletTo(replica)
	o.open, o.full = true, false
	for _, m := range s.members {
		if m.outlet == nil && len(m.wanted) > 0 {
			o.push(m.relayed())
		}
	}
	return o
}

// outletTo is the outlet to a replica. Before RelayTo it leads nowhere.
func (s *Server) outletTo(replica string) *outlet {
	if s.outlets[replica] == nil {
		s.outlets[replica] = &outlet{wake: make(chan struct{}, 1)}
	}
	return s.outlets[replica]
}

func (s *Server) closeOutlet(replica string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.outlets[replica]
	s.queued -= o.underWay
	o.open, o.queue, o.underWay = false, nil, 0
}

// nextRelayed takes the oldest message out of the queue, nil when it is empty.
func (s *Server) nextRelayed(o *outlet) (*resealv1.RelayRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.full {
		return nil, errors.New("the replica does not read")
	}
	if len(o.queue) == 0 {
		o.queue = nil
		return nil, nil
	}
	message := o.queue[0]
	o.queue[0] = nil
	o.queue = o.queue[1:]
	if offer := message.GetOffer(); offer != nil {
		size := proto.Size(offer)
		o.underWay -= size
		s.queued -= size
	}
	return message, nil
}

// relayed describes a member of this replica to others.
func (m *member) relayed() *resealv1.RelayRequest {
	return &resealv1.RelayRequest{Message: &resealv1.RelayRequest_Member{Member: &resealv1.RelayedMember{
		Join: &resealv1.ExchangeJoin{
			Edge: m.id, BootId: m.bootID, Labels: m.labels, Certificate: m.certificate, Pools: m.wanted,
			Holding: &resealv1.ExchangeHolding{Pools: keys(m.holding), Spare: keys(m.spare), Stock: keys(m.stock)},
		},
	}}}
}

func keys(set map[string]bool) []string { return slices.Sorted(maps.Keys(set)) }

// relayMember tells all replicas what is true of a member of this one now.
func (s *Server) relayMember(m *member) {
	if m.outlet != nil || s.members[m.id] != m || len(m.wanted) == 0 && !m.relays {
		return
	}
	m.relays = true
	for _, o := range s.outlets {
		o.push(m.relayed())
	}
}

// relayGone tells them that it has left.
func (s *Server) relayGone(m *member) {
	if m.outlet != nil || !m.relays {
		return
	}
	for _, o := range s.outlets {
		o.push(&resealv1.RelayRequest{Message: &resealv1.RelayRequest_Gone{Gone: &resealv1.RelayedGone{Edge: m.id}}})
	}
}

// Relay is ReplicaService.Relay of the replica that calls.
func (s *Server) Relay(replica string, stream grpc.ClientStreamingServer[resealv1.RelayRequest, resealv1.RelayResponse]) error {
	r := &relay{server: s, replica: replica, members: map[string]*member{}}
	defer r.close()
	// It ends with the stream, which gRPC ends when this function returns.
	failed := make(chan error, 1)
	go func() {
		for {
			message, err := stream.Recv()
			if err == nil {
				err = r.take(message)
			}
			if err != nil {
				failed <- err
				return
			}
		}
	}()
	select {
	case err := <-failed:
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	case <-s.stopped:
		return fleet.ErrStopping
	}
}

// relay is what another replica says of its edges. Guarded by Server.mu.
type relay struct {
	server  *Server
	replica string
	members map[string]*member
	closed  bool
}

func (r *relay) take(message *resealv1.RelayRequest) error {
	s := r.server
	switch message := message.GetMessage().(type) {
	case *resealv1.RelayRequest_Member:
		join := message.Member.GetJoin()
		if err := s.checkJoin(join.GetEdge(), join); err != nil {
			return err
		}
		r.join(join)
	case *resealv1.RelayRequest_Gone:
		s.mu.Lock()
		defer s.mu.Unlock()
		r.leave(message.Gone.GetEdge())
	case *resealv1.RelayRequest_Offer:
		if err := checkOffer(message.Offer.GetOrigin(), message.Offer); err != nil {
			return err
		}
		if from := r.member(message.Offer.GetOrigin()); from != nil {
			s.pass(from, message.Offer)
		}
	case *resealv1.RelayRequest_Seed:
		r.seed(message.Seed)
	case *resealv1.RelayRequest_SeedDone:
		s.mu.Lock()
		defer s.mu.Unlock()
		if m := r.members[message.SeedDone.GetHolder()]; m != nil {
			s.seedDone(m, message.SeedDone.GetRequest())
		}
	default:
		return invalid("empty message")
	}
	return nil
}

func (r *relay) member(id string) *member {
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	return r.members[id]
}

// join makes an edge of the other replica a member, or changes what is known of it.
// One that is connected here too is on its way: what it says here counts until it
// has left.
func (r *relay) join(join *resealv1.ExchangeJoin) {
	s := r.server
	revision := s.config.Revision()
	allowed := nameSet(s.config.Pools(join.GetLabels()))
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.closed {
		return
	}
	m := r.members[join.GetEdge()]
	if m == nil {
		if len(s.members) >= 2*maxMembers {
			return // its sessions stay with its own replica
		}
		m = newMember(join.GetEdge(), nil)
		m.outlet = s.outletTo(r.replica)
		r.members[m.id] = m
	}
	version := m.version
	m.learn(join.GetLabels(), join)
	_, changed := m.entitle(allowed, revision)
	if before := s.members[m.id]; before == nil || before.outlet != nil {
		if before != nil && before != m {
			s.leaveLocked(before)
		}
		s.members[m.id] = m
		if before != m || changed || m.version != version {
			s.relink(m)
		}
		return
	}
	s.shadowed[m.id] = m
}

// leave forgets an edge of the other replica.
func (r *relay) leave(id string) {
	s, m := r.server, r.members[id]
	if m == nil {
		return
	}
	delete(r.members, id)
	m.left = true
	if s.shadowed[id] == m {
		delete(s.shadowed, id)
	}
	s.leaveLocked(m)
}

func (r *relay) close() {
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	r.closed = true
	for id := range r.members {
		r.leave(id)
	}
}

// seed asks an edge of this replica for offers to one of the other, and tells the
// other when they are sent.
func (r *relay) seed(relayed *resealv1.RelayedSeed) {
	s := r.server
	s.mu.Lock()
	defer s.mu.Unlock()
	done := func() { // lost while there is no way back: it waits no longer than seedWait
		s.outletTo(r.replica).push(&resealv1.RelayRequest{Message: &resealv1.RelayRequest_SeedDone{
			SeedDone: &resealv1.RelayedSeedDone{Holder: relayed.GetHolder(), Request: relayed.GetSeed().GetRequest()},
		}})
	}
	holder, to := s.members[relayed.GetHolder()], r.members[relayed.GetSeed().GetMember().GetEdge()]
	var pools []string
	if holder != nil && holder.outlet == nil && to != nil {
		for _, pool := range relayed.GetSeed().GetPools() {
			if holder.entitled[pool] && to.entitled[pool] {
				pools = append(pools, pool)
			}
		}
	}
	if len(pools) == 0 {
		done()
		return
	}
	s.request(&seeding{member: to, waiting: map[uint64]*member{}, done: done}, map[*member][]string{holder: pools}, relayed.GetSeed().GetMost())
}
