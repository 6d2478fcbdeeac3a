package sessions

import (
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxLinks bounds the other members that an edge is told of.
	maxLinks = 256
	// maxUnderWay bounds the offers to one member, maxQueued those to all, in
	// bytes.
	maxUnderWay = 8 << 20
	maxQueued   = 64 << 20
	// maxMessages ends a member that does not read at all.
	maxMessages = 32768
)

// member is an edge's stream. All but the line is guarded by Server.mu.
type member struct {
	id   string
	line *fleet.Line

	bootID      string
	labels      map[string]string
	certificate []byte
	version     string          // of the two: changes when one of them does
	wanted      []string        // sorted
	entitled    map[string]bool // to pools
	revision    int64           // of the configuration that entitled is of
	holding     map[string]bool // sessions of pools
	spare       map[string]bool // some that nobody else was given
	stock       map[string]bool // idle tickets that are taken once
	told        map[string]string
	left        bool // the stream has ended
	owed        bool // an ExchangeSeeded

	outlet *outlet // to the replica that it is connected to, nil: this one
	relays bool    // other replicas know of it

	queue    []*resealv1.ExchangeResponse
	underWay int // bytes of the offers in queue

	asked    map[uint64]*seeding // by this member to be answered
	awaiting map[*seeding]bool   // for this member
}

func newMember(id string, line *fleet.Line) *member {
	return &member{
		id: id, line: line,
		told: map[string]string{}, asked: map[uint64]*seeding{}, awaiting: map[*seeding]bool{},
	}
}

// end ends the stream, unless it is one of another replica.
func (m *member) end(err error) {
	if m.line != nil {
		m.line.End(err)
	}
}

// push queues a message.
func (m *member) push(message *resealv1.ExchangeResponse) {
	if m.outlet != nil {
		m.outlet.forward(m, message)
		return
	}
	if len(m.queue) >= maxMessages {
		m.line.End(status.Error(codes.ResourceExhausted, "the edge does not read"))
		return
	}
	m.queue = append(m.queue, message)
	m.line.Wake()
}

// next takes the oldest message out of the queue, nil when it is empty.
func (s *Server) next(m *member) *resealv1.ExchangeResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(m.queue) == 0 {
		m.queue = nil
		return nil
	}
	message := m.queue[0]
	m.queue[0] = nil
	m.queue = m.queue[1:]
	if offer := message.GetOffer(); offer != nil {
		size := proto.Size(offer)
		m.underWay -= size
		s.queued -= size
	}
	return message
}

// pass queues an offer for its recipient, or drops it.
func (s *Server) pass(from *member, offer *resealv1.SessionOffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	to := s.members[offer.GetRecipient()]
	size := proto.Size(offer)
	var why string
	switch {
	case s.members[from.id] != from:
		why = "the origin has left"
	case to == nil || to == from || to.bootID != offer.GetRecipientBootId():
		why = "the recipient has left"
	case !from.entitled[offer.GetPool()] || !to.entitled[offer.GetPool()]:
		why = "not both are entitled to the pool"
	case from.outlet != nil && to.outlet != nil:
		why = "neither is connected to this replica"
	case to.outlet != nil && (!to.outlet.open || to.outlet.underWay+size > maxRelayed || s.queued+size > maxQueued):
		why = "the recipient's replica is too slow"
	case to.outlet != nil:
		to.outlet.underWay += size
		s.queued += size
		to.push(&resealv1.ExchangeResponse{Message: &resealv1.ExchangeResponse_Offer{Offer: offer}})
		return
	case to.underWay+size > maxUnderWay || s.queued+size > maxQueued || len(to.queue) >= maxMessages/2:
		why = "the recipient is too slow"
	default:
		to.underWay += size
		s.queued += size
		to.push(&resealv1.ExchangeResponse{Message: &resealv1.ExchangeResponse_Offer{Offer: offer}})
		return
	}
	s.config.Logger.Debug("session offer is dropped", "reason", why, "origin", from.id,
		"recipient", offer.GetRecipient(), "pool", offer.GetPool())
}

// entitle makes the pools of m those that it wants and is allowed to have. It
// returns those that are new to m, and whether any came or went.
func (m *member) entitle(allowed map[string]bool, revision int64) (added []string, changed bool) {
	before := m.entitled
	m.entitled, m.revision = map[string]bool{}, revision
	for _, pool := range m.wanted {
		if allowed[pool] {
			m.entitled[pool] = true
			if !before[pool] {
				added = append(added, pool)
			}
		}
	}
	return added, !maps.Equal(before, m.entitled)
}

// full says that m is told of nobody else.
func (m *member) full() bool { return len(m.told) >= maxLinks }

// relink links each of some with all members, each two of them once.
func (s *Server) relink(some ...*member) {
	done := make(map[*member]bool, len(some))
	for _, m := range some {
		done[m] = true
		for _, other := range s.members {
			if !done[other] {
				s.link(m, other)
			}
		}
	}
}

// link tells two members of each other, or that they have nothing in common any
// more.
func (s *Server) link(a, b *member) {
	if a.outlet != nil && b.outlet != nil {
		return // they meet at their own replicas
	}
	s.compared++
	_, linked := a.told[b.id]
	if !linked && (a.full() || b.full()) {
		return // until fill finds room
	}
	shared := sharedPools(a, b)
	switch {
	case len(shared) > 0:
		a.tell(b, shared)
		b.tell(a, shared)
	case linked:
		s.unlink(a, b)
		s.unlink(b, a)
	}
}

// fill makes the links that were refused because a member was full, and is no
// longer. Whoever was never full lacks none.
func (s *Server) fill() {
	if len(s.freed) == 0 {
		return
	}
	var roomy []*member
	for _, m := range s.members {
		if !m.full() {
			roomy = append(roomy, m)
		}
	}
	for m := range s.freed {
		for _, other := range roomy {
			if _, linked := m.told[other.id]; other != m && !linked {
				s.link(m, other)
			}
		}
	}
	clear(s.freed)
}

func sharedPools(a, b *member) []string {
	var shared []string
	for _, pool := range a.wanted {
		if a.entitled[pool] && b.entitled[pool] {
			shared = append(shared, pool)
		}
	}
	return shared
}

// unlink tells m, which was told of other, that it is gone.
func (s *Server) unlink(m, other *member) {
	if m.full() {
		s.freed[m] = true
	}
	delete(m.told, other.id)
	m.push(gone(other.id, false))
}

// tell describes other to m unless m knows.
func (m *member) tell(other *member, shared []string) {
	version := other.versionFor(shared)
	if m.told[other.id] == version {
		return
	}
	m.told[other.id] = version
	m.push(&resealv1.ExchangeResponse{Message: &resealv1.ExchangeResponse_Member{Member: other.describe(shared)}})
}

// versionFor names what is said of m to a member that shares pools.
func (m *member) versionFor(pools []string) string {
	return m.version + " " + strings.Join(pools, "\x00")
}

func (m *member) describe(pools []string) *resealv1.ExchangeMember {
	return &resealv1.ExchangeMember{Edge: m.id, BootId: m.bootID, Certificate: m.certificate, Pools: slices.Clone(pools)}
}
