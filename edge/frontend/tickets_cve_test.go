package frontend

import (
	"crypto/tls"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func clientAuth(mode resealv1.ClientAuth_Mode, roots, crl string) *resealv1.TLSPolicy {
	return &resealv1.TLSPolicy{ClientAuth: &resealv1.ClientAuth{Mode: mode, CaPem: roots, CrlPem: crl}}
}

const (
	authNone     = resealv1.ClientAuth_MODE_NONE
	authOptional = resealv1.ClientAuth_MODE_OPTIONAL
	authRequire  = resealv1.ClientAuth_MODE_REQUIRE
)

// TestCVE_2025_23419: with shared keys, nginx resumed a session of one virtual
// server at another that asks for client certificates, which were then not asked
// for.
func TestCVE_2025_23419(t *testing.T) {
	cert, _ := selfSigned(t, "open.test", "closed.test")
	ca := newAuthority(t)
	keys := newKeys(t, ring("default", epoch(1, epochActive)))
	open := newAcceptor(keys.source, configured(t, "main", cert, &resealv1.TLSPolicy{}))
	optional := newAcceptor(keys.source, configured(t, "main", cert, clientAuth(authOptional, ca.pem, "")))
	closed := newAcceptor(keys.source, configured(t, "main", cert, clientAuth(authRequire, ca.pem, "")))
	for _, version := range bothVersions {
		for from, a := range map[string]*acceptor{"open": open, "optional": optional} {
			t.Run(fmt.Sprint(tls.VersionName(version), " ", from), func(t *testing.T) {
				cache := &oneCache{}
				if first := a.connect(clientConfig("open.test", version, cache)); first.serverErr != nil || cache.session == nil {
					t.Fatal(first.serverErr)
				}
				ticket := *cache
				if again := a.connect(clientConfig("open.test", version, cache)); !again.resumed() {
					t.Fatalf("the session is of no use at all: %v", again.miss)
				}
				for _, name := range []string{"open.test", "closed.test"} {
					*cache = ticket
					if got := closed.connect(clientConfig(name, version, cache)); got.serverErr == nil {
						t.Errorf("%s: a client without certificate got in, resumed %v", name, got.resumed())
					}
					*cache = ticket
					got := closed.connect(clientConfig(name, version, cache, ca.client(t, 2)))
					if got.serverErr != nil || got.resumed() || got.miss != policyMismatch || len(got.server.PeerCertificates) != 1 {
						t.Errorf("%s: %v, resumed %v, miss %v", name, got.serverErr, got.resumed(), got.miss)
					}
				}
				// Another name of the same listener, too, and none.
				for _, name := range []string{"closed.test", ""} {
					*cache = ticket
					if got := a.connect(clientConfig(name, version, cache)); got.serverErr != nil || got.resumed() || got.miss != policyMismatch {
						t.Errorf("as %q: %v, resumed %v, miss %v", name, got.serverErr, got.resumed(), got.miss)
					}
				}
				*cache = oneCache{}
				for _, name := range []string{"", "", "open.test"} {
					offered, resumable := cache.session != nil, name == ""
					got := a.connect(clientConfig(name, version, cache))
					if got.serverErr != nil || got.resumed() != (offered && resumable) || !resumable && got.miss != policyMismatch {
						t.Errorf("a session without name as %q: %v, resumed %v, miss %v", name, got.serverErr, got.resumed(), got.miss)
					}
				}
			})
		}
	}
}

// TestCVE_2025_68121: crypto/tls resumed sessions of clients that a changed set
// of CAs no longer vouched for.
func TestCVE_2025_68121(t *testing.T) {
	cert, _ := selfSigned(t, "app.test")
	first, second := newAuthority(t), newAuthority(t)
	shown := first.client(t, 2)
	for _, test := range []struct {
		name   string
		policy *resealv1.TLSPolicy
		known  bool // the client is served as the one that its certificate names
	}{
		{"another CA", clientAuth(authRequire, second.pem, ""), false},
		{"a further CA", clientAuth(authRequire, first.pem+second.pem, ""), true},
		{"revoked", clientAuth(authRequire, first.pem, first.revoke(t, shown)), false},
		{"optional and another CA", clientAuth(authOptional, second.pem, ""), false},
		{"optional and revoked", clientAuth(authOptional, first.pem, first.revoke(t, shown)), false},
	} {
		for _, version := range bothVersions {
			t.Run(fmt.Sprint(test.name, " ", tls.VersionName(version)), func(t *testing.T) {
				keys := newKeys(t, ring("default", epoch(1, epochActive)))
				before := newAcceptor(keys.source, configured(t, "main", cert, clientAuth(test.policy.ClientAuth.Mode, first.pem, "")))
				after := newAcceptor(keys.source, configured(t, "main", cert, test.policy))
				cache := &oneCache{}
				for _, want := range []bool{false, true} {
					if got := before.connect(clientConfig("app.test", version, cache, shown)); got.serverErr != nil || got.resumed() != want {
						t.Fatalf("%v, resumed %v", got.serverErr, got.resumed())
					}
				}
				known := func(got accept) bool { return got.serverErr == nil && len(got.server.PeerCertificates) > 0 }
				got := after.connect(clientConfig("app.test", version, cache, shown))
				if known(got) != test.known || got.resumed() {
					t.Errorf("known %v, resumed %v", known(got), got.resumed())
				}
				// Even were the keys the same: the check of the certificate itself
				// is made with what is in force now.
				after.policy = before.policy
				*cache = oneCache{}
				before.connect(clientConfig("app.test", version, cache, shown))
				if got := after.connect(clientConfig("app.test", version, cache, shown)); known(got) != test.known {
					t.Errorf("with the same keys: known %v, resumed %v", known(got), got.resumed())
				}
			})
		}
	}
}

// TestHAProxyRenewal2026: the lifetime of a session must not start anew with each
// renewed ticket, as it did in HAProxy. The client moves between two edges.
func TestHAProxyRenewal2026(t *testing.T) {
	cert, _ := selfSigned(t, "app.test")
	for _, version := range bothVersions {
		for _, shared := range []bool{true, false} {
			t.Run(fmt.Sprint(tls.VersionName(version), " shared ", shared), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					l := exchange.Listener{Name: "main", PolicyKey: "policy", TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}
					edges := []*acceptor{newAcceptor(nil, l)}
					if shared {
						edges = nil
						for range 2 {
							keys := newKeys(t, ring("default", epoch(1, epochActive)))
							edges = append(edges, newAcceptor(keys.source, l))
						}
					}
					cache := &oneCache{}
					for hour, want := range []resealv1.MissReason{notOffered, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, expired, 0, 0} {
						got := edges[hour%len(edges)].connect(clientConfig("app.test", version, cache))
						if got.serverErr != nil || got.clientErr != nil || got.miss != want || got.resumed() != (want == 0) {
							t.Errorf("hour %d: %v %v %v", hour, got.serverErr, got.clientErr, got.miss)
						}
						time.Sleep(time.Hour)
					}
				})
			})
		}
	}
}

// variant is one listener of the matrix.
type variant struct {
	name, auth, listener, ring string
	mode                       resealv1.ClientAuth_Mode
	roots                      string
}

func (v variant) String() string {
	return fmt.Sprint(v.name, " ", v.mode, " ", v.auth, " ", v.listener, " ", v.ring)
}

// distance is in how many properties two variants differ.
func (v variant) distance(w variant) (n int) {
	for _, differs := range []bool{v.name != w.name, v.mode != w.mode, v.roots != w.roots, v.listener != w.listener, v.ring != w.ring} {
		if differs {
			n++
		}
	}
	return n
}

func variants(first, second *authority) (all []variant) {
	for _, auth := range []variant{
		{mode: authNone},
		{mode: authOptional, auth: "first", roots: first.pem},
		{mode: authOptional, auth: "both", roots: first.pem + second.pem},
		{mode: authRequire, auth: "first", roots: first.pem},
		{mode: authRequire, auth: "both", roots: first.pem + second.pem},
	} {
		for _, name := range []string{"a.test", "b.test"} {
			for _, listener := range []string{"main", "other"} {
				for _, ring := range []string{"default", "second"} {
					v := auth
					v.name, v.listener, v.ring = name, listener, ring
					all = append(all, v)
				}
			}
		}
	}
	return all
}

// careless are keys that heed neither policy nor name.
type careless struct{ TicketKeys }

func (c careless) Wrap(state []byte, _ string) ([]byte, bool) { return c.TicketKeys.Wrap(state, "") }

func (c careless) Unwrap(ticket []byte, _ string) ([]byte, uint64, resealv1.MissReason) {
	return c.TicketKeys.Unwrap(ticket, "")
}

// TestPolicyMatrix: whatever differs of SNI, mode of client authentication, set
// of CAs, listener and keyring, a ticket of one is a full handshake at the other,
// and an answer. The client has a certificate that all of them accept, so that
// TLS itself has no reason to refuse.
func TestPolicyMatrix(t *testing.T) {
	cert, _ := selfSigned(t, "a.test", "b.test")
	first, second := newAuthority(t), newAuthority(t)
	shown, all := first.client(t, 2), variants(first, second)
	keys := newKeys(t, ring("default", epoch(1, epochActive)), ring("second", epoch(1, epochActive)))
	heedless := func(string, string, string) TicketKeys { return careless{keys.Keys("", "", "")} }
	for _, test := range []struct {
		name    string
		source  func(string, string, string) TicketKeys
		version uint16
		within  int // pairs that differ in so many properties
	}{
		{"TLS 1.3", keys.source, tls.VersionTLS13, 5},
		{"TLS 1.2", keys.source, tls.VersionTLS12, 5},
		// What stands inside the ticket holds alone, too.
		{"careless keys", heedless, tls.VersionTLS13, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			acceptors, tickets := make([]*acceptor, len(all)), make([]oneCache, len(all))
			for i, v := range all {
				policy := clientAuth(v.mode, v.roots, "")
				policy.Resumption = &resealv1.Resumption{Keyring: v.ring}
				l := configured(t, v.listener, cert, policy)
				if l.Keyring != v.ring {
					t.Fatalf("the plan says keyring %q, want %q", l.Keyring, v.ring)
				}
				acceptors[i] = newAcceptor(test.source, l)
				if got := acceptors[i].connect(clientConfig(v.name, test.version, &tickets[i], shown)); got.serverErr != nil || tickets[i].session == nil {
					t.Fatal(got.serverErr)
				}
			}
			pairs := 0
			for i, from := range all {
				for j, to := range all {
					if from.distance(to) > test.within {
						continue
					}
					pairs++
					cache := tickets[i]
					got := acceptors[j].connect(clientConfig(to.name, test.version, &cache, shown))
					if got.serverErr != nil || got.clientErr != nil || got.resumed() != (i == j) || i != j && got.miss != policyMismatch {
						t.Errorf("a ticket of %v at %v: %v, resumed %v, miss %v", from, to, got.serverErr, got.resumed(), got.miss)
					}
				}
			}
			if test.within == 5 && pairs != len(all)*len(all) || pairs < 150 {
				t.Errorf("%d pairs of %d", pairs, len(all)*len(all))
			}
		})
	}
}
