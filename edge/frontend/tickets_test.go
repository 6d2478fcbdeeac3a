package frontend

import (
	"crypto/tls"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestResumption(t *testing.T) {
	for version, mechanism := range map[uint16]resealv1.Mechanism{
		tls.VersionTLS12: resealv1.Mechanism_MECHANISM_TICKET, tls.VersionTLS13: resealv1.Mechanism_MECHANISM_PSK,
	} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			e := newEdge(t, answering("x"))
			other := newEdge(t, answering("x"))
			c := e.count("main")
			cache := &oneCache{}
			// Both edges have different certificates and keys.
			visit := func(e *edge, name string) bool {
				return e.visit(withVersion(version), withCache(cache), func(t *tls.Config) { t.ServerName, t.InsecureSkipVerify = name, true }).DidResume
			}
			missed := func(reason resealv1.MissReason, want int) {
				t.Helper()
				if got := read(c, func(c *counts) int { return c.misses[reason] }); got != want {
					t.Errorf("%s: %d, want %d (%v)", resealv1.Label(reason), got, want, c.misses)
				}
			}
			resumed := func(want int) {
				t.Helper()
				if got := read(c, func(c *counts) int { return c.resumed[mechanism] }); got != want || len(c.resumed) > 1 {
					t.Errorf("resumed %v, want %d", c.resumed, want)
				}
			}
			visit(e, "app.test")
			missed(notOffered, 1)
			for range 3 {
				visit(e, "app.test")
			}
			resumed(3)

			// An apply with a renewed certificate and other routes costs nothing.
			e.cert, _ = selfSigned(t, "app.test", "new.test")
			e.apply(e.listener("main", func(l *exchange.Listener) { l.Spec.Limits = &resealv1.ListenerLimits{MaxHeaderBytes: 1 << 17} }))
			visit(e, "app.test")
			resumed(4)

			// Tickets can't cross names, policies or edges.
			visit(e, "new.test")
			missed(policyMismatch, 1)
			visit(e, "new.test")
			resumed(5)
			e.apply(e.listener("main", func(l *exchange.Listener) { l.PolicyKey = "another" }))
			kept := *cache
			visit(e, "new.test")
			missed(policyMismatch, 2)
			visit(other, "new.test")
			if record := e.logged(1); record["resumed"] != false {
				t.Errorf("logged %v", record)
			}
			visit(e, "new.test")
			missed(keyUnknown, 1)
			*cache = kept // issued under the first policy, which comes back
			e.apply(e.listener("main"))
			visit(e, "new.test")
			resumed(6)

			// TLS itself refuses: now the client must have shown a certificate.
			e.apply(e.listener("main", func(l *exchange.Listener) { l.TLS.ClientAuth = tls.RequireAnyClientCert }))
			e.visit(withVersion(version), withCache(cache), func(t *tls.Config) {
				t.ServerName, t.InsecureSkipVerify, t.Certificates = "new.test", true, []tls.Certificate{e.cert}
			})
			missed(refused, 1)

			e.apply(e.listener("main", func(l *exchange.Listener) { l.TLS.SessionTicketsDisabled = true }))
			visit(e, "new.test")
			missed(disabled, 1)
			resumed(6)
			if total := read(c, func(c *counts) (n int) {
				for _, misses := range c.misses {
					n += misses
				}
				return n + c.resumed[mechanism]
			}); total != 12 {
				t.Errorf("%d handshakes counted, 12 made (%v)", total, c.misses)
			}
		})
	}
}
