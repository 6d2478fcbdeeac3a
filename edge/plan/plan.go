// Package plan compiles a snapshot of configuration into what an edge needs to
// serve it: listeners with their TLS configuration and routes, and pools with
// theirs. A plan is immutable; the edge swaps plans atomically.
//
// What the plan relies on is checked here again, by the rules that the control
// plane applies (package rules). A resource that this edge can't serve does not
// keep the others from their changes: see Draft.
package plan

import (
	"crypto/tls"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Env is what a compilation may use of the machine.
type Env struct {
	// ReadFile reads a file that a resource names. Each file is read once per
	// Draft, several at a time. Nil: files are violations.
	ReadFile func(name string) ([]byte, error)
}

// Plan is a compiled snapshot. It and everything in it is immutable.
type Plan struct {
	// Revision is the snapshot's.
	Revision int64
	// Listeners are sorted by name.
	Listeners []*Listener
	// Pools by name: all of the snapshot, also those that no route names.
	Pools map[string]*Pool
	// Warnings are worth a log line but no reason to refuse the snapshot, for
	// example an expired certificate.
	Warnings []*resealv1.Violation

	editions map[string]*edition // what it was made of, by "Kind/name"
}

// Listener is a compiled Listener with everything that it refers to.
type Listener struct {
	// Name is metadata.name.
	Name string
	// UID is metadata.uid.
	UID string
	// Spec has its defaults filled in.
	Spec *resealv1.Listener
	// PolicyKey is a hash of all that a client's ticket may depend on: the
	// listener's name and UID, the policy's UID, its keyring, the client
	// authentication's mode, its roots and its revocation lists. What TLS itself
	// checks at resumption (version, cipher suite) and what a resumed session
	// does not use (the server's certificate, ALPN, curves) is left out, so that
	// such a change costs no session.
	PolicyKey string
	// Keyring is the name of the Keyring whose epochs seal tickets.
	Keyring string
	// TicketLifetime is how long after the original authentication a ticket is
	// accepted.
	TicketLifetime time.Duration
	// TLS is the server's configuration without any handling of tickets.
	// SessionTicketsDisabled is set when the policy switches resumption off.
	TLS *tls.Config

	certificates *certificateSet
	router       *router
}

// Match is where a request goes.
type Match struct {
	// Route is the name of the Route, or "" for the listener's own pool.
	Route string
	// Pool is the pool's name. A weighted choice has been made.
	Pool string
	// EncodedSeparator is set when the path that matched holds an encoded / or \.
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

// Pool is a compiled BackendPool.
type Pool struct {
	// Name is metadata.name.
	Name string
	// UID is metadata.uid.
	UID string
	// Spec has its defaults filled in.
	Spec *resealv1.BackendPool
	// TLS is the base of the client's configuration. ServerName is set only if the
	// pool fixes it; otherwise each connection sets its own. With subjectAltNames or
	// subjectCommonName, verification is VerifyConnection's alone, which also runs
	// when a session is resumed.
	TLS *tls.Config
	// Identity is a hash of all that sessions and connections may be shared
	// within, besides endpoint and SNI: the trusted roots by content, the
	// verification rules (subjectAltNames, subjectCommonName,
	// insecureSkipVerify), the client certificate, whether the backend may
	// renegotiate, the TLS versions, cipher suites and curves, and the ALPN list.
	Identity string
}

// Compile makes a plan of all of s, or returns every violation that it found.
//
// A Route's listeners that s does not hold are not served by this edge and are
// skipped; so is a Route without any listener here. Every other reference must
// resolve.
func Compile(s *resealv1.Snapshot, env Env) (*Plan, []*resealv1.Violation) {
	d := NewDraft(s, nil, env, nil)
	compiled, violations := d.compile()
	if len(violations) > 0 {
		return nil, violations
	}
	return compiled, nil
}

// Snapshot is what the plan was made of. Its resources are the very objects that
// drafts were given.
func (p *Plan) Snapshot() *resealv1.Snapshot {
	resources := make([]*resealv1.Resource, 0, len(p.editions))
	for _, e := range p.editions {
		resources = append(resources, e.resource)
	}
	return resealv1.NewSnapshot("", p.Revision, resources)
}

// Route finds where a request goes. host is as NormalizeHost returns it, path
// is as rules.RoutePath returns it. It reports false when no route matches and the listener has no
// pool of its own. It does not allocate.
func (l *Listener) Route(host, path string) (Match, bool) {
	return l.router.route(host, path)
}

// AllowsHost reports whether host, as NormalizeHost returns it, matches a host
// of a Route of this listener or a name of one of its certificates.
func (l *Listener) AllowsHost(host string) bool {
	return host != "" && (l.router.names(host) || l.certificates.covers(host))
}
