package exchange

import "strings"

// Identity is what a TLS session with a backend may be resumed within. Its text is
// stored, and sent to other edges: the parts with "|" in between.
type Identity string

// IdentityParts are what an Identity is made of.
type IdentityParts struct {
	// Group is Pool.Identity: what all identities of a pool have in common.
	Group string
	// Place is the endpoint's address, or what stands for it where endpoints share
	// their sessions. It holds no "|".
	Place string
	// ServerName is the SNI. It holds no "|".
	ServerName string
	// HTTP1 is set where h2 was not offered by ALPN although the pool speaks it.
	HTTP1 bool
}

// Identity puts the parts together.
func (p IdentityParts) Identity() Identity {
	text := p.Group + "|" + p.Place + "|" + p.ServerName
	if p.HTTP1 {
		text += "|http/1.1"
	}
	return Identity(text)
}

// Parts takes an identity apart, and reports false for a text that
// IdentityParts.Identity does not make.
func (i Identity) Parts() (IdentityParts, bool) {
	parts := strings.Split(string(i), "|")
	http1 := len(parts) == 4 && parts[3] == "http/1.1"
	if len(parts) != 3 && !http1 {
		return IdentityParts{}, false
	}
	return IdentityParts{Group: parts[0], Place: parts[1], ServerName: parts[2], HTTP1: http1}, true
}

// Group is the part in front of the first "|". Any text has one.
func (i Identity) Group() string {
	group, _, _ := strings.Cut(string(i), "|")
	return group
}

// Place is the second part, or "".
func (i Identity) Place() string {
	_, rest, _ := strings.Cut(string(i), "|")
	place, _, _ := strings.Cut(rest, "|")
	return place
}

// Moved is the identity with the same parts in another group.
func (i Identity) Moved(group string) Identity {
	return Identity(group) + i[len(i.Group()):]
}
