package exchange

import (
	"crypto/tls"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Listener is a compiled Listener with everything that it refers to. It is
// immutable.
type Listener struct {
	// Name is metadata.name, which identifies the listener across applies.
	Name string
	// UID is metadata.uid.
	UID string
	// Spec has its defaults filled in.
	Spec *resealv1.Listener
	// TLS is the server's configuration without any handling of tickets, and
	// without GetConfigForClient. SessionTicketsDisabled is set when the policy
	// switches resumption off.
	TLS *tls.Config
	// Keyring is the name of the Keyring whose epochs seal tickets. "" is
	// "default".
	Keyring string
	// PolicyKey is a hash of all that a client's ticket may depend on: the
	// listener's name and UID, the policy's UID, its keyring, the client
	// authentication's mode, its roots and its revocation lists. What TLS itself
	// checks at resumption (version, cipher suite) and what a resumed session
	// does not use (the server's certificate, ALPN, curves) is left out, so that
	// such a change costs no session. Tickets are only accepted under the key that
	// they were issued under.
	PolicyKey string
	// TicketLifetime is how long after the original authentication a ticket is
	// accepted. 0: the default, 12h.
	TicketLifetime time.Duration
	// Route finds where a request goes. host is as HostName returns it; path is as
	// rules.RoutePath returns it, or "" for protocol tls, where host is the SNI. It
	// reports false when no route matches and the listener has no pool of its own.
	Route func(host, path string) (Match, bool)
	// AllowsHost reports whether host, as HostName returns it, matches a host of a
	// Route of this listener or a name of one of its certificates.
	AllowsHost func(host string) bool
}

// Match is where a request goes.
type Match struct {
	// Route is the name of the Route, or "" for the listener's own pool.
	Route string
	// Pool is the pool's name. A weighted choice has been made.
	Pool string
	// EncodedSeparator is set when the path that matched holds an encoded / or \,
	// so that the Route tells it from the plain one on purpose.
	EncodedSeparator bool
	// RequestHeaders are the edits of the request's header, or nil.
	RequestHeaders *resealv1.HeaderEdits
	// ResponseHeaders are the edits of the response's header, or nil.
	ResponseHeaders *resealv1.HeaderEdits
	// RequestTimeout bounds the request as a whole. 0: no limit.
	RequestTimeout time.Duration
	// ResponseHeaderTimeout replaces the pool's. 0: the pool's.
	ResponseHeaderTimeout time.Duration
}

// Pool is a compiled BackendPool. It is immutable.
type Pool struct {
	// Name is metadata.name.
	Name string
	// UID is metadata.uid.
	UID string
	// Spec has its defaults filled in.
	Spec *resealv1.BackendPool
	// TLS is the base of the client's configuration. ServerName is set only if
	// the pool fixes it; else each connection sets its own. With
	// subjectAltNames or subjectCommonName, verification is VerifyConnection's
	// alone, which also runs when a session is resumed.
	TLS *tls.Config
	// Identity is a hash of all that sessions and connections may be shared
	// within, besides endpoint and SNI: the trusted roots by content, the
	// verification rules (subjectAltNames, subjectCommonName,
	// insecureSkipVerify), the client certificate, whether the backend may
	// renegotiate, the TLS versions, cipher suites and curves, and the ALPN list.
	// A change makes the pool start anew.
	Identity string
}
