package backend

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// termed notes under which terms handshakes are made.
type termed struct {
	*fakeSessions
	terms atomic.Pointer[exchange.Terms]
}

func (h *termed) Reserve(ctx context.Context, identity exchange.Identity, terms exchange.Terms) (exchange.Attempt, error) {
	h.terms.Store(&terms)
	return h.fakeSessions.Reserve(ctx, identity, terms)
}

// A backend that may renegotiate is offered sessions by crypto/tls alone, by
// requests and by health checks: what resumes without it can't renegotiate.
func TestRenegotiationKeepsToCryptoTLS(t *testing.T) {
	for setting, want := range map[resealv1.BackendTLS_Renegotiation]bool{
		resealv1.BackendTLS_RENEGOTIATION_NEVER: false, resealv1.BackendTLS_RENEGOTIATION_ONCE: true,
	} {
		s := serve(t, site())
		x := newBench(t, []string{s.addr}, func(p *resealv1.BackendPool) { p.Tls.Renegotiation = setting })
		h := &termed{fakeSessions: x.h}
		x.b.cfg.Handshaker = h
		x.get("/bytes/1")
		if got := h.terms.Load(); got == nil || got.CryptoTLS != want {
			t.Errorf("%v: a request's handshake has the terms %+v", setting, got)
		}
		e := x.current("p").state.Load().endpoints[s.addr]
		h.terms.Store(nil)
		state := *e.pool.state.Load()
		settings := *state.settings
		settings.check, settings.checkTimeout = &resealv1.HealthCheck{ServerName: testName, Path: "/bytes/1", Method: "GET"}, settings.handshakeTimeout
		state.settings = &settings
		if err := e.check(t.Context(), &state); err != nil {
			t.Fatal(err)
		}
		if got := h.terms.Load(); got == nil || got.CryptoTLS != want {
			t.Errorf("%v: a health check's handshake has the terms %+v", setting, got)
		}
	}
}
