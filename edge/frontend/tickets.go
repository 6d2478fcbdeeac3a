package frontend

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"strings"
	"sync"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// defaultTicketLifetime is TLSPolicy's.
	defaultTicketLifetime = 12 * time.Hour
	// maxTicket is less than what fits into a NewSessionTicket message.
	maxTicket = 60_000
	// keptContexts bounds the policies of a listener whose keys are kept, so
	// that a policy that is changed back finds its sessions again.
	keptContexts = 4
	// ticketExtra marks our entry in tls.SessionState.Extra. After it come the
	// time of the original authentication (8 bytes, Unix seconds, big-endian)
	// and the SNI.
	ticketExtra = "reseal/ticket/1\x00"
)

// tickets holds the ticket keys of listeners. They live outside of plans: an
// apply costs no session.
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

func (c *ticketContext) encrypt(cs tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
	return c.keys.EncryptTicket(cs, session)
}

// decrypt returns nil and the reason when the ticket can't be used.
func (c *ticketContext) decrypt(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, resealv1.MissReason) {
	if session, _ := c.keys.DecryptTicket(ticket, cs); session != nil { // its error is always nil
		return session, resealv1.MissReason_MISS_REASON_UNSPECIFIED
	}
	for _, other := range c.all.others(c) {
		if session, _ := other.keys.DecryptTicket(ticket, cs); session != nil {
			return nil, resealv1.MissReason_MISS_REASON_POLICY_MISMATCH
		}
	}
	return nil, resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
}

// ticketHandshake handles the tickets of one handshake. crypto/tls calls it from
// one goroutine.
type ticketHandshake struct {
	context  *ticketContext
	lifetime time.Duration
	disabled bool
	miss     resealv1.MissReason
	// original is when the session that was unwrapped last was authenticated.
	// crypto/tls starts each TLS 1.3 ticket anew, so that it must be carried
	// from the ticket that came in to the one that goes out.
	original time.Time
}

func (c *ticketContext) handshake(lifetime time.Duration) *ticketHandshake {
	return &ticketHandshake{context: c, lifetime: lifetime, miss: resealv1.MissReason_MISS_REASON_NOT_OFFERED}
}

// config is base with the handling of tickets.
func (h *ticketHandshake) config(base *tls.Config) *tls.Config {
	cfg := base.Clone()
	if cfg.SessionTicketsDisabled {
		h.disabled = true
		return cfg
	}
	cfg.UnwrapSession = h.unwrap
	cfg.WrapSession = h.wrap
	return cfg
}

// unwrap implements tls.Config.UnwrapSession. It never returns an error, which
// would end the handshake. TLS 1.2 calls it without a ticket, too.
func (h *ticketHandshake) unwrap(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
	if len(ticket) == 0 {
		return nil, nil
	}
	session, miss := h.context.decrypt(ticket, cs)
	if session == nil {
		h.missed(miss)
		return nil, nil
	}
	original, sni, ok := readExtra(session.Extra)
	age := time.Since(original)
	switch {
	case !ok:
		h.missed(resealv1.MissReason_MISS_REASON_UNDECRYPTABLE)
	case sni != strings.ToLower(cs.ServerName):
		h.missed(resealv1.MissReason_MISS_REASON_POLICY_MISMATCH)
	case age >= h.lifetime:
		h.missed(resealv1.MissReason_MISS_REASON_EXPIRED)
	default:
		h.missed(resealv1.MissReason_MISS_REASON_REFUSED) // unless TLS now resumes
		h.original = original
		return session, nil
	}
	return nil, nil
}

// missRank orders reasons: of several tickets in one ClientHello, the one that
// came closest to resumption explains the handshake.
var missRank = map[resealv1.MissReason]int{
	resealv1.MissReason_MISS_REASON_NOT_OFFERED:     0,
	resealv1.MissReason_MISS_REASON_KEY_UNKNOWN:     1,
	resealv1.MissReason_MISS_REASON_UNDECRYPTABLE:   2,
	resealv1.MissReason_MISS_REASON_POLICY_MISMATCH: 3,
	resealv1.MissReason_MISS_REASON_EXPIRED:         4,
	resealv1.MissReason_MISS_REASON_REFUSED:         5,
}

func (h *ticketHandshake) missed(reason resealv1.MissReason) {
	if missRank[reason] > missRank[h.miss] {
		h.miss = reason
	}
}

// wrap implements tls.Config.WrapSession. An error or an empty ticket would end
// the handshake; instead the client gets a ticket that no key opens.
func (h *ticketHandshake) wrap(cs tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
	original := time.Now()
	if cs.DidResume && !h.original.IsZero() {
		original = h.original
	}
	session.Extra = append(session.Extra, newExtra(original, strings.ToLower(cs.ServerName)))
	ticket, err := h.context.encrypt(cs, session)
	if err != nil || len(ticket) == 0 || len(ticket) > maxTicket {
		ticket = make([]byte, 64)
		_, _ = rand.Read(ticket) // never fails (crypto/rand)
	}
	return ticket, nil
}

// outcome is what to count for a completed handshake.
func (h *ticketHandshake) outcome(cs tls.ConnectionState) (resealv1.Mechanism, resealv1.MissReason) {
	switch {
	case cs.DidResume:
		return mechanismOf(cs.Version), resealv1.MissReason_MISS_REASON_UNSPECIFIED
	case h.disabled:
		return resealv1.Mechanism_MECHANISM_UNSPECIFIED, resealv1.MissReason_MISS_REASON_DISABLED
	default:
		return resealv1.Mechanism_MECHANISM_UNSPECIFIED, h.miss
	}
}

func newExtra(original time.Time, sni string) []byte {
	extra := append([]byte(ticketExtra), 0, 0, 0, 0, 0, 0, 0, 0)
	binary.BigEndian.PutUint64(extra[len(ticketExtra):], uint64(original.Unix()))
	return append(extra, sni...)
}

func readExtra(entries [][]byte) (original time.Time, sni string, ok bool) {
	for _, entry := range entries {
		rest, ours := strings.CutPrefix(string(entry), ticketExtra)
		if !ours || len(rest) < 8 {
			continue
		}
		seconds := binary.BigEndian.Uint64([]byte(rest[:8]))
		return time.Unix(int64(seconds), 0), rest[8:], true
	}
	return time.Time{}, "", false
}
