package sessions

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

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

// member is an edge's stream. All but the channels is guarded by Server.mu.
type member struct {
	id    string
	wake  chan struct{} // something is queued
	ended chan struct{} // closed when the stream must end
	cause error         // why; set before ended is closed

	bootID      string
	labels      map[string]string
	certificate []byte
	wanted      []string        // sorted
	entitled    map[string]bool // to pools
	holding     map[string]bool // sessions of pools
	spare       map[string]bool // some that nobody else was given
	stock       map[string]bool // idle tickets that are taken once
	told        map[string]string
	left        bool // the stream has ended
	owed        bool // an ExchangeSeeded

	queue    []*resealv1.ExchangeResponse
	underWay int // bytes of the offers in queue

	asked    map[uint64]*seeding // by this member to be answered
	awaiting map[*seeding]bool   // for this member
}

func newMember(id string) *member {
	return &member{
		id: id, wake: make(chan struct{}, 1), ended: make(chan struct{}),
		told: map[string]string{}, asked: map[uint64]*seeding{}, awaiting: map[*seeding]bool{},
	}
}

// end makes the stream end with err.
func (m *member) end(err error) {
	if m.cause == nil {
		m.cause = err
		close(m.ended)
	}
}

// push queues a message.
func (m *member) push(message *resealv1.ExchangeResponse) {
	if len(m.queue) >= maxMessages {
		m.end(status.Error(codes.ResourceExhausted, "the edge does not read"))
		return
	}
	m.queue = append(m.queue, message)
	select {
	case m.wake <- struct{}{}:
	default:
	}
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

// link tells two members of each other, or that they have nothing in common any
// more.
func link(a, b *member) {
	shared := sharedPools(a, b)
	_, linked := a.told[b.id]
	switch {
	case len(shared) == 0 && linked:
		unlink(a, b, false)
		unlink(b, a, false)
	case len(shared) == 0, !linked && (len(a.told) >= maxLinks || len(b.told) >= maxLinks):
	default:
		a.tell(b, shared)
		b.tell(a, shared)
	}
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

// unlink tells m that other is gone.
func unlink(m, other *member, revoked bool) {
	if _, linked := m.told[other.id]; linked {
		delete(m.told, other.id)
		m.push(gone(other.id, revoked))
	}
}

// tell describes other to m unless m knows.
func (m *member) tell(other *member, shared []string) {
	version := fmt.Sprintf("%s %x %s", other.bootID, sha256.Sum256(other.certificate), strings.Join(shared, "\x00"))
	if m.told[other.id] == version {
		return
	}
	m.told[other.id] = version
	m.push(&resealv1.ExchangeResponse{Message: &resealv1.ExchangeResponse_Member{Member: other.describe(shared)}})
}

func (m *member) describe(pools []string) *resealv1.ExchangeMember {
	return &resealv1.ExchangeMember{Edge: m.id, BootId: m.bootID, Certificate: m.certificate, Pools: slices.Clone(pools)}
}
