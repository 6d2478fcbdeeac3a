package sessions

import (
	"math/rand/v2"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxSeeders is how many members are asked for the sessions of a pool: one
	// would do, if it never failed.
	maxSeeders = 2
	// maxStock is how many tickets that are taken once an edge gets, and of how
	// many members.
	maxStock = 8
	// seedWait bounds the wait for them. Edges wait two seconds for a pool that
	// comes new to them.
	seedWait = 800 * time.Millisecond
)

// seeding is a member that waits for what others have. Guarded by Server.mu.
type seeding struct {
	member  *member
	done    func() // called at its end, may be nil
	waiting map[uint64]*member
	timer   *time.Timer
}

// seed asks members that hold sessions of pools to offer m some. answer says that
// m is to hear of it when there is nothing more to wait for.
func (s *Server) seed(m *member, pools []string, holders map[string][]*member, answer bool) {
	m.owed = m.owed || answer
	chosen := map[*member][]string{}
	most := 1 // members that are asked for one pool
	for _, pool := range pools {
		asked := pick(holders[pool], m, pool)
		most = max(most, len(asked))
		for _, holder := range asked {
			chosen[holder] = append(chosen[holder], pool)
		}
	}
	if len(chosen) == 0 {
		m.answer()
		return
	}
	s.request(&seeding{member: m, waiting: map[uint64]*member{}}, chosen, uint32(maxStock/most))
}

// request asks each of the chosen for sessions of its pools.
func (s *Server) request(seeding *seeding, chosen map[*member][]string, most uint32) {
	seeding.member.awaiting[seeding] = true
	for holder, pools := range chosen {
		s.seeds++
		seeding.waiting[s.seeds] = holder
		holder.asked[s.seeds] = seeding
		holder.push(&resealv1.ExchangeResponse{Message: &resealv1.ExchangeResponse_Seed{
			Seed: &resealv1.ExchangeSeed{Request: s.seeds, Member: seeding.member.describe(pools), Pools: pools, Most: most},
		}})
	}
	seeding.timer = time.AfterFunc(seedWait, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.seeded(seeding)
	})
}

// holders are the members that hold sessions of pools, by pool.
func (s *Server) holders(pools map[string]bool) map[string][]*member {
	found := map[string][]*member{}
	if len(pools) == 0 {
		return found
	}
	for _, m := range s.members {
		for pool := range m.holding {
			if pools[pool] && m.entitled[pool] {
				found[pool] = append(found[pool], m)
			}
		}
	}
	return found
}

// pick chooses those of the holders of a pool that are asked for m.
func pick(holders []*member, m *member, pool string) []*member {
	var stock, best, rest []*member
	for _, other := range holders {
		switch {
		case other == m:
		case other.stock[pool]:
			stock = append(stock, other)
		case other.spare[pool]:
			best = append(best, other)
		default:
			rest = append(rest, other)
		}
	}
	switch {
	case len(stock) > 0:
		return some(stock, maxStock)
	case len(best) > 0:
		return some(best, maxSeeders)
	}
	return some(rest, maxSeeders)
}

// some picks at most that many members at random.
func some(members []*member, most int) []*member {
	rand.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
	return members[:min(len(members), most)]
}

// seedDone notes that a member has answered, or has left.
func (s *Server) seedDone(from *member, request uint64) {
	seeding := from.asked[request]
	if seeding == nil {
		return // too late, or never asked
	}
	delete(from.asked, request)
	delete(seeding.waiting, request)
	if len(seeding.waiting) == 0 {
		s.seeded(seeding)
	}
}

// seeded ends a seeding. What comes later is passed on like any offer.
func (s *Server) seeded(seeding *seeding) {
	for request, holder := range seeding.waiting {
		delete(holder.asked, request)
	}
	clear(seeding.waiting)
	seeding.timer.Stop()
	if !seeding.member.awaiting[seeding] {
		return
	}
	delete(seeding.member.awaiting, seeding)
	if seeding.done != nil {
		seeding.done()
	}
	seeding.member.answer()
}

// answer sends the ExchangeSeeded that is owed, if nothing is awaited any more.
func (m *member) answer() {
	if !m.owed || len(m.awaiting) > 0 {
		return
	}
	m.owed = false
	m.push(&resealv1.ExchangeResponse{Message: &resealv1.ExchangeResponse_Seeded{Seeded: &resealv1.ExchangeSeeded{}}})
}
