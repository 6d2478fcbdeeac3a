package backend

import (
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// NTLM, and Negotiate where it falls back to NTLM, authenticate a connection and
// not a request (RFC 4559 section 6): what comes on it afterwards is answered as
// the user who logged in. So a connection on which either was asked for or used
// belongs to its client's connection from then on, whatever connections.reuse
// says, and ends with it. HAProxy does the same.

// logsInConnection reports whether a request authenticates the connection.
func logsInConnection(fields exchange.Fields) bool {
	return namesConnectionScheme(fields, "Authorization")
}

// challengesConnection reports whether a response asks to authenticate the
// connection.
func challengesConnection(fields exchange.Fields) bool {
	return namesConnectionScheme(fields, "WWW-Authenticate")
}

func namesConnectionScheme(fields exchange.Fields, name string) bool {
	for value := range fields.Values(name) {
		for challenge := range strings.SplitSeq(value, ",") {
			scheme, _, _ := strings.Cut(strings.TrimLeft(challenge, " \t"), " ")
			if scheme = strings.TrimSpace(scheme); strings.EqualFold(scheme, "NTLM") || strings.EqualFold(scheme, "Negotiate") {
				return true
			}
		}
	}
	return false
}

// own gives a connection to its present client for good. endpoint.mu is held.
func (e *endpoint) own(o *owner) {
	if !o.private {
		o.private = true
		e.private = true
		e.pool.counters.Add(exchange.Private.At(), 1)
	}
}

// ownFor gives a connection that is granted for a request which authenticates it
// to the request's client, before anybody else can get a stream of it.
// endpoint.mu is held.
func (e *endpoint) ownFor(w *waiter, o *owner) {
	if w.private {
		e.own(o)
	}
}
