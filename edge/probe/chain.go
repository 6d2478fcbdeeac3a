package probe

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// chain is the connections of one TLS version of which each offers what earlier
// ones got.
type chain struct {
	version uint16
	facts   *resealv1.ProbeVersion
	// handshaker makes TLS 1.2 handshakes and holds their sessions under
	// identity. Nil: tickets does.
	handshaker Handshaker
	identity   exchange.Identity
	tickets    []*tls.ClientSessionState // not offered yet, oldest first
	spent      *tls.ClientSessionState   // the one that was offered last
	// origin is where the newest session came from.
	origin *target
	// holding is whether there is a session to offer.
	holding bool
	// hinted is the lifetime that the newest ticket has by the server's word.
	hinted time.Duration
	// offers are the times each session was resumed, by what was offered.
	offers map[string]*uses
	// given are the session IDs that servers gave, hashed.
	given map[string]bool
	// asked and bare are what became of sessions of TLS 1.2 that were offered with
	// the session_ticket extension in the ClientHello, and without it.
	asked, bare uses
}

// uses are the times that one session or ticket was offered and resumed.
type uses struct{ offered, resumed int }

func (r *run) newChain(version uint16, facts *resealv1.ProbeVersion) *chain {
	c := &chain{version: version, facts: facts, offers: map[string]*uses{}, given: map[string]bool{}}
	c.renew(r)
	return c
}

// renew forgets all sessions.
func (c *chain) renew(r *run) {
	c.tickets, c.spent, c.holding, c.origin = nil, nil, false, nil
	if c.version == tls.VersionTLS12 && r.cfg.Sessions != nil {
		if c.handshaker == nil {
			c.handshaker = r.cfg.Sessions()
		}
		r.lines++
		c.identity = exchange.Identity(fmt.Sprintf("probe|%d", r.lines))
	}
}

// again makes the session that was offered last the next to be offered once
// more. It returns false when there is none.
func (c *chain) again() bool {
	if c.spent == nil {
		return false
	}
	c.tickets = append(c.tickets, c.spent)
	return true
}

// take is the session for the next handshake that tickets are for: the newest
// unused one, or the last one again unless each is taken only once.
func (c *chain) take() *tls.ClientSessionState {
	if n := len(c.tickets); n > 0 {
		c.spent, c.tickets = c.tickets[n-1], c.tickets[:n-1]
		return c.spent
	}
	if c.facts.SingleUse == resealv1.ProbeAnswer_PROBE_ANSWER_YES {
		return nil
	}
	return c.spent
}

// handshake makes the handshake on conn.
func (c *chain) handshake(ctx context.Context, conn *wire, cfg *tls.Config) (exchange.TLSConn, *ticketBox, error) {
	box := &ticketBox{}
	if c.handshaker != nil {
		tc, _, _, err := c.handshaker.Handshake(ctx, conn, c.identity, cfg)
		return tc, box, err
	}
	box.offer = c.take()
	cfg.ClientSessionCache = box
	tc := tls.Client(conn, cfg)
	return tc, box, tc.HandshakeContext(ctx)
}

// completed notes what a handshake made of what was offered.
func (c *chain) completed(l *link) {
	hello := l.record.GetOffered()
	hello.SessionIdGiven = c.given[hello.GetSessionId()]
	if key := offeredKey(hello); key != "" {
		if c.offers[key] == nil {
			c.offers[key] = &uses{}
		}
		c.offers[key].add(l.record.Resumed)
		if hello.GetWithoutTicketExtension() {
			c.bare.add(l.record.Resumed)
		} else {
			c.asked.add(l.record.Resumed)
		}
	}
	if l.flight.emptyTicket {
		c.facts.EmptyTicket = true
	}
	if c.version == tls.VersionTLS12 && (!l.record.Resumed || l.flight.tickets > 0) {
		c.origin = l.target
		c.holding = l.flight.tickets > 0 || len(l.flight.sessionID) == offeredIDSize
		c.given[shortHash(l.flight.sessionID)] = len(l.flight.sessionID) > 0
	}
	if !l.record.Resumed {
		c.tickets, c.spent = nil, nil
	}
}

func (u *uses) add(resumed bool) {
	u.offered++
	if resumed {
		u.resumed++
	}
}

// offeredKey tells sessions apart by how they were offered. It is "" when none
// was.
func offeredKey(hello *resealv1.ProbeClientHello) string {
	switch {
	case hello.GetPsk() != "":
		return "psk " + hello.GetPsk()
	case hello.GetTicket() != "":
		return "ticket " + hello.GetTicket()
	case hello.GetSessionIdGiven():
		return "id " + hello.GetSessionId()
	}
	return ""
}

// offeredIDSize is the size of the session IDs that a ClientHello of crypto/tls
// holds, in bytes.
const offeredIDSize = 32

// collect keeps the tickets that came on a connection that has ended.
func (c *chain) collect(l *link) {
	came := l.box.came()
	l.record.Tickets = uint32(max(len(came), l.flight.tickets))
	if l.flight.tickets > 0 {
		c.hinted = l.flight.lifetimeHint
	}
	if len(came) == 0 {
		return
	}
	c.origin, c.holding = l.target, true
	if c.version == tls.VersionTLS12 {
		c.tickets, c.spent = came, nil
		return
	}
	c.tickets = append(c.tickets, came...)
	if excess := len(c.tickets) - maxTickets; excess > 0 {
		c.tickets = slices.Delete(c.tickets, 0, excess)
	}
	if hint, ok := ticketLifetime(came[len(came)-1]); ok {
		c.hinted = hint
	}
}

// reuse says whether a session was taken more than once.
func (c *chain) reuse() resealv1.ProbeAnswer {
	answer := resealv1.ProbeAnswer_PROBE_ANSWER_UNSPECIFIED
	for _, uses := range c.offers {
		switch {
		case uses.resumed > 1:
			return resealv1.ProbeAnswer_PROBE_ANSWER_NO
		case uses.resumed == 1 && uses.offered > 1:
			answer = resealv1.ProbeAnswer_PROBE_ANSWER_YES
		}
	}
	return answer
}

// ticketLifetime reads the lifetime of a TLS 1.3 ticket from the encoding that
// tls.SessionState documents: created_at stands after version, type and cipher
// suite, and for clients use_by and age_add are last.
func ticketLifetime(session *tls.ClientSessionState) (time.Duration, bool) {
	const createdAt, trailer, week = 2 + 1 + 2, 8 + 4, 7 * 24 * 3600
	_, state, err := session.ResumptionState()
	if err != nil || state == nil {
		return 0, false
	}
	encoded, err := state.Bytes()
	if err != nil || len(encoded) < createdAt+8+trailer {
		return 0, false
	}
	defer clear(encoded) // it holds the secret
	created := binary.BigEndian.Uint64(encoded[createdAt:])
	useBy := binary.BigEndian.Uint64(encoded[len(encoded)-trailer:])
	if useBy < created || useBy-created > week {
		return 0, false
	}
	return time.Duration(useBy-created) * time.Second, true
}
