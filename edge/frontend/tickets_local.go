package frontend

import (
	"crypto/tls"
	"sync"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// keptContexts bounds the policies of a listener whose keys are kept, so that a
// policy that is changed back finds its sessions again.
const keptContexts = 4

// tickets holds ticket keys of this process alone, by listener. They live
// outside of plans: an apply costs no session.
type tickets struct {
	mu sync.Mutex
	// Newest last.
	byListener map[string][]*ticketContext
}

func newTickets() *tickets { return &tickets{byListener: map[string][]*ticketContext{}} }

// context are the keys for a listener under a policy.
func (t *tickets) context(listener, policyKey string) *ticketContext {
	t.mu.Lock()
	defer t.mu.Unlock()
	kept := t.byListener[listener]
	for i, known := range kept {
		if known.policyKey == policyKey {
			t.byListener[listener] = append(append(kept[:i:i], kept[i+1:]...), known)
			return known
		}
	}
	fresh := &ticketContext{listener: listener, policyKey: policyKey, all: t, keys: &tls.Config{}}
	kept = append(kept[max(0, len(kept)-keptContexts+1):len(kept):len(kept)], fresh)
	t.byListener[listener] = kept
	return fresh
}

// forget drops the keys of a listener.
func (t *tickets) forget(listener string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byListener, listener)
}

// others are the listener's contexts but one.
func (t *tickets) others(than *ticketContext) []*ticketContext {
	t.mu.Lock()
	defer t.mu.Unlock()
	var others []*ticketContext
	for _, context := range t.byListener[than.listener] {
		if context != than {
			others = append(others, context)
		}
	}
	return others
}

// ticketContext encrypts the tickets of a listener under one policy.
type ticketContext struct {
	listener  string
	policyKey string
	all       *tickets
	// keys makes and rotates its keys by itself: a new one each day, accepted
	// for seven (crypto/tls, Config.SessionTicketKey).
	keys *tls.Config
}

// ours takes any ticket for one of ours: only opening it would tell.
func (c *ticketContext) ours(ticket []byte) bool { return len(ticket) > 0 }

func (c *ticketContext) issuing() bool { return true }

func (c *ticketContext) encrypt(cs tls.ConnectionState, session *tls.SessionState, _ string) ([]byte, bool) {
	ticket, err := c.keys.EncryptTicket(cs, session)
	return ticket, err == nil
}

func (c *ticketContext) decrypt(ticket []byte, cs tls.ConnectionState, _ string) (*tls.SessionState, uint64, resealv1.MissReason) {
	if session, _ := c.keys.DecryptTicket(ticket, cs); session != nil { // its error is always nil
		return session, 0, resealv1.MissReason_MISS_REASON_UNSPECIFIED
	}
	for _, other := range c.all.others(c) {
		if session, _ := other.keys.DecryptTicket(ticket, cs); session != nil {
			return nil, 0, resealv1.MissReason_MISS_REASON_POLICY_MISMATCH
		}
	}
	return nil, 0, resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
}
