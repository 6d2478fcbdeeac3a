package frontend

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"slices"
	"strings"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// defaultTicketLifetime is TLSPolicy's.
	defaultTicketLifetime = 12 * time.Hour
	// maxTicket is less than what fits into a NewSessionTicket message.
	maxTicket = 60_000
	// extensionPreSharedKey is where a TLS 1.3 client offers tickets (RFC 8446
	// section 4.2.11).
	extensionPreSharedKey = 41
)

// TicketKeys seal the tickets of one listener under one policy. They are safe
// for concurrent use.
type TicketKeys interface {
	// Ours reports whether a ticket names an epoch of which there is a key, so that
	// it can likely be unwrapped. It is quick, and proves nothing.
	Ours(ticket []byte) bool
	// Issuing reports whether Wrap makes tickets now.
	Issuing() bool
	// Wrap seals the state of a session with a client that named sni ("" is no
	// name). It reports false when it makes no tickets now, or can't. It does not
	// keep state.
	Wrap(state []byte, sni string) (ticket []byte, ok bool)
	// Unwrap opens a ticket that Wrap made for the same sni, here or on another
	// edge. Otherwise state is nil and miss is the reason. A zero miss is success. The
	// epoch is the one that the ticket names, whether it opens or not, and 0 when
	// there can't be such an epoch.
	Unwrap(ticket []byte, sni string) (state []byte, epoch uint64, miss resealv1.MissReason)
}

// ticketKeys are TicketKeys, or the keys of this process.
type ticketKeys interface {
	ours(ticket []byte) bool
	issuing() bool
	encrypt(cs tls.ConnectionState, session *tls.SessionState, sni string) (ticket []byte, ok bool)
	// decrypt returns nil and the reason when the ticket can't be used, and the
	// epoch as TicketKeys.Unwrap does.
	decrypt(ticket []byte, cs tls.ConnectionState, sni string) (*tls.SessionState, uint64, resealv1.MissReason)
}

// sharedKeys are ticketKeys that other edges have, too.
type sharedKeys struct{ TicketKeys }

func (k sharedKeys) ours(ticket []byte) bool { return k.Ours(ticket) }

func (k sharedKeys) issuing() bool { return k.Issuing() }

func (k sharedKeys) encrypt(_ tls.ConnectionState, session *tls.SessionState, sni string) ([]byte, bool) {
	state, err := session.Bytes()
	if err != nil {
		return nil, false
	}
	defer clear(state)
	return k.Wrap(state, sni)
}

func (k sharedKeys) decrypt(ticket []byte, _ tls.ConnectionState, sni string) (*tls.SessionState, uint64, resealv1.MissReason) {
	state, epoch, miss := k.Unwrap(ticket, sni)
	if miss != resealv1.MissReason_MISS_REASON_UNSPECIFIED {
		return nil, epoch, miss
	}
	// The session refers to state from here on. Its encoding belongs to a Go
	// release: that of an edge with another one may not be readable.
	session, err := tls.ParseSessionState(state)
	if err != nil {
		return nil, epoch, resealv1.MissReason_MISS_REASON_UNDECRYPTABLE
	}
	return session, epoch, resealv1.MissReason_MISS_REASON_UNSPECIFIED
}

// ticketPolicy is how a listener handles tickets.
type ticketPolicy struct {
	keys     ticketKeys
	keyring  string            // "" for keys of this process
	hash     [sha256.Size]byte // of the PolicyKey
	lifetime time.Duration     // since the original authentication
}

func (f *Frontend) ticketPolicy(l *exchange.Listener) *ticketPolicy {
	// crypto/tls gives each Config a random legacy ticket key at its first use,
	// even where nothing uses that. Made here once, it is copied to those of the
	// connections.
	_, _ = l.TLS.DecryptTicket(nil, tls.ConnectionState{})
	policy := &ticketPolicy{hash: sha256.Sum256([]byte(l.PolicyKey)), lifetime: l.TicketLifetime}
	if f.cfg.TicketKeys == nil {
		policy.keys = f.tickets.context(l.Name, l.PolicyKey)
	} else {
		policy.keys = sharedKeys{f.cfg.TicketKeys(l.Keyring, l.Name, l.PolicyKey)}
		policy.keyring = cmp.Or(l.Keyring, resealv1.DefaultKeyring)
	}
	return policy
}

// ticketHandshake handles the tickets of one handshake. crypto/tls calls it from
// one goroutine.
type ticketHandshake struct {
	*ticketPolicy
	// cfg is the connection's own: crypto/tls reads SessionTicketsDisabled again
	// after unwrap, before it issues a ticket.
	cfg      *tls.Config
	disabled bool // by the policy
	stopped  bool // tickets are accepted but not issued
	miss     resealv1.MissReason
	epoch    uint64 // that of the ticket that explains the outcome
	offered  bool   // a ticket
	// original is when the session that was unwrapped last was authenticated, and
	// accepted is its ticket. crypto/tls starts each TLS 1.3 ticket anew, so that
	// the time must be carried from the ticket that came in to the one that goes
	// out.
	original time.Time
	accepted []byte
}

func (p *ticketPolicy) handshake() *ticketHandshake {
	return &ticketHandshake{ticketPolicy: p, miss: resealv1.MissReason_MISS_REASON_NOT_OFFERED}
}

// config is base with the handling of tickets, for the client that said hello.
func (h *ticketHandshake) config(base *tls.Config, hello *tls.ClientHelloInfo) *tls.Config {
	h.cfg = base.Clone()
	h.cfg.DynamicRecordSizingDisabled = true // a message is one record; small first ones help browsers little
	if h.cfg.SessionTicketsDisabled {
		h.disabled = true
		return h.cfg
	}
	h.cfg.UnwrapSession = h.unwrap
	h.cfg.WrapSession = h.wrap
	h.stopped = !h.keys.issuing()
	// TLS 1.3 does not call unwrap for a client without tickets. TLS 1.2 does.
	if h.stopped && usesTLS13(h.cfg, hello) && !slices.Contains(hello.Extensions, extensionPreSharedKey) {
		h.cfg.SessionTicketsDisabled = true
	}
	return h.cfg
}

// usesTLS13 reports whether the handshake will be of TLS 1.3.
func usesTLS13(cfg *tls.Config, hello *tls.ClientHelloInfo) bool {
	return (cfg.MaxVersion == 0 || cfg.MaxVersion >= tls.VersionTLS13) &&
		slices.Contains(hello.SupportedVersions, tls.VersionTLS13)
}

// unwrap implements tls.Config.UnwrapSession. It never returns an error, which
// would end the handshake. TLS 1.2 calls it without a ticket, too.
func (h *ticketHandshake) unwrap(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
	if h.stopped {
		h.cfg.SessionTicketsDisabled = true
	}
	if len(ticket) == 0 {
		return nil, nil
	}
	session, original := h.open(ticket, cs)
	if session == nil {
		return nil, nil
	}
	h.original, h.accepted = original, ticket
	return session, nil
}

// open returns the session in a ticket, which may be resumed, and when it was
// authenticated. It notes the reason for the full handshake if TLS does not
// resume it; without a session that is why there is none.
func (h *ticketHandshake) open(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, time.Time) {
	sni := strings.ToLower(cs.ServerName)
	session, epoch, miss := h.keys.decrypt(ticket, cs, sni)
	if session == nil {
		h.missed(miss, epoch)
		return nil, time.Time{}
	}
	extra, ok := readExtra(session.Extra)
	switch {
	case !ok:
		miss = resealv1.MissReason_MISS_REASON_UNDECRYPTABLE
	case extra.bound != h.binding(sni):
		miss = resealv1.MissReason_MISS_REASON_POLICY_MISMATCH
	case time.Since(extra.original) >= h.lifetime:
		miss = resealv1.MissReason_MISS_REASON_EXPIRED
	default:
		h.missed(resealv1.MissReason_MISS_REASON_REFUSED, epoch)
		h.epoch = epoch // crypto/tls asks for the next ticket when it did not like this one
		return session, extra.original
	}
	h.missed(miss, epoch)
	return nil, time.Time{}
}

// missRank orders reasons: of several tickets in one ClientHello, the one that
// came closest to resumption explains the handshake.
var missRank = map[resealv1.MissReason]int{
	resealv1.MissReason_MISS_REASON_NOT_OFFERED:     0,
	resealv1.MissReason_MISS_REASON_KEY_UNKNOWN:     1,
	resealv1.MissReason_MISS_REASON_STALE_KEYRING:   2,
	resealv1.MissReason_MISS_REASON_KEY_RETIRED:     3,
	resealv1.MissReason_MISS_REASON_UNDECRYPTABLE:   4,
	resealv1.MissReason_MISS_REASON_POLICY_MISMATCH: 5,
	resealv1.MissReason_MISS_REASON_EXPIRED:         6,
	resealv1.MissReason_MISS_REASON_REFUSED:         7,
}

func (h *ticketHandshake) missed(reason resealv1.MissReason, epoch uint64) {
	if h.offered && missRank[reason] <= missRank[h.miss] {
		return
	}
	h.miss, h.epoch, h.offered = reason, epoch, true
}

// wrap implements tls.Config.WrapSession. An error or an empty ticket would end
// the handshake. Where there is no ticket to give, TLS 1.2 gives back the one
// that was accepted, since it seals the same secret. With TLS 1.3 that would
// break the next handshake; the client then gets a ticket that no key opens.
func (h *ticketHandshake) wrap(cs tls.ConnectionState, session *tls.SessionState) ([]byte, error) {
	original, resumed := time.Now(), cs.DidResume && len(h.accepted) > 0
	if resumed {
		original = h.original
	}
	if !h.stopped {
		sni := strings.ToLower(cs.ServerName)
		session.Extra = append(session.Extra, extra{original, h.binding(sni)}.encode())
		ticket, ok := h.keys.encrypt(cs, session, sni)
		if ok && len(ticket) > 0 && len(ticket) <= maxTicket {
			return ticket, nil
		}
	}
	if resumed && cs.Version <= tls.VersionTLS12 {
		return h.accepted, nil
	}
	ticket := make([]byte, 192)
	_, _ = rand.Read(ticket) // never fails (crypto/rand)
	return ticket, nil
}

// count counts a completed handshake and returns why it was not resumed, if it was not.
// h must not be used afterwards.
func (h *ticketHandshake) count(counters Counters, cs tls.ConnectionState, d time.Duration) resealv1.MissReason {
	h.accepted = nil // the connection, which may live long, refers to h
	mechanism, miss := h.outcome(cs)
	counters.Handshake(mechanism, miss, cs.Version, d)
	if h.offered && h.keyring != "" {
		counters.Ticket(h.keyring, h.epoch, miss)
	}
	return miss
}

// outcome is how a completed handshake was resumed, or why it was not.
func (h *ticketHandshake) outcome(cs tls.ConnectionState) (resealv1.Mechanism, resealv1.MissReason) {
	switch {
	case cs.DidResume:
		return mechanismOf(cs.Version), resealv1.MissReason_MISS_REASON_UNSPECIFIED
	case h.disabled:
		return resealv1.Mechanism_MECHANISM_UNSPECIFIED, resealv1.MissReason_MISS_REASON_DISABLED
	case h.stopped && h.miss == resealv1.MissReason_MISS_REASON_NOT_OFFERED:
		// It has none because edges give out none.
		return resealv1.Mechanism_MECHANISM_UNSPECIFIED, resealv1.MissReason_MISS_REASON_STALE_KEYRING
	default:
		return resealv1.Mechanism_MECHANISM_UNSPECIFIED, h.miss
	}
}

// binding is a hash of a PolicyKey and an SNI.
type binding [16]byte

// binding is what tickets of the policy for a client that named sni carry.
func (p *ticketPolicy) binding(sni string) binding {
	sum := sha256.Sum256(append(append(make([]byte, 0, 128), p.hash[:]...), sni...))
	return binding(sum[:])
}

// extra is our entry in tls.SessionState.Extra. Keys are made for one policy and
// name already; that both are bound inside, too, is a second lock on the same door.
type extra struct {
	original time.Time // of the authentication
	bound    binding
}

// extraMark starts our entry. After it come the time in Unix seconds (8 bytes,
// big-endian) and the binding. It is short: clients send it with each handshake.
const extraMark = "reseal3\x00"

func (e extra) encode() []byte {
	encoded := append(make([]byte, 0, len(extraMark)+8+len(e.bound)), extraMark...)
	encoded = binary.BigEndian.AppendUint64(encoded, uint64(e.original.Unix()))
	return append(encoded, e.bound[:]...)
}

func readExtra(entries [][]byte) (extra, bool) {
	for _, entry := range entries {
		rest, ours := bytes.CutPrefix(entry, []byte(extraMark))
		var e extra
		if !ours || len(rest) != 8+len(e.bound) {
			continue
		}
		e.original = time.Unix(int64(binary.BigEndian.Uint64(rest)), 0)
		copy(e.bound[:], rest[8:])
		return e, true
	}
	return extra{}, false
}
