package session

import "time"

// knowledge is what was learned of an identity's server. It stays for as long as
// the identity, over restarts, and travels with its sessions.
type knowledge struct {
	reuse   reuseKind
	way     idWay
	learned time.Time // when the last of it was
}

// idWay is how a server takes session IDs of TLS 1.2.
type idWay uint8

const (
	// wayAsked: with the session_ticket extension in the ClientHello, as
	// crypto/tls sends it, or nobody knows yet.
	wayAsked idWay = iota
	// wayBare: only without that extension (JSSE that chooses certificates by
	// SNI).
	wayBare
	// wayNone: it gives out IDs and declines them in every way. It is tried
	// again after reviewAfter.
	wayNone

	ways = 3 // kinds
)

// known reports whether there is anything to keep.
func (k knowledge) known() bool { return k.reuse != reuseUnknown || k.way != wayAsked }

// merge takes in what another edge, or an earlier run, has learned.
func (k *knowledge) merge(other knowledge, now time.Time) {
	if other.known() && other.learned.After(k.learned) && !other.learned.After(now.Add(maxSkew)) {
		*k = other
	}
}
