package probe

import (
	"crypto/tls"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestCarryOut(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("go"), serverOptions{})
	pool := &exchange.Pool{
		Spec: &resealv1.BackendPool{Endpoints: []*resealv1.Endpoint{{Address: s.address}}, Tls: &resealv1.BackendTLS{ServerName: "backend.test"}},
		TLS:  &tls.Config{RootCAs: a.roots(), NextProtos: []string{"h2", "http/1.1"}},
	}
	order := &resealv1.ProbeOrder{Id: 7, Pool: "jetty", Address: s.address}
	r := CarryOut(t.Context(), order, pool, sessions)
	if r.Error != "" || r.Id != 7 || r.ServerName != "backend.test" || survives(version(t, r, tls13)) != allSurvive {
		t.Errorf("report %v", r)
	}
	_, requests := s.counts()
	pool.Spec.Protocol = resealv1.BackendPool_PROTOCOL_TCP
	if r := CarryOut(t.Context(), order, pool, sessions); r.Error != "" {
		t.Errorf("tcp: %v", r.Error)
	}
	if _, now := s.counts(); now != requests {
		t.Errorf("%d HTTP requests to a tcp pool", now-requests)
	}
	for _, test := range []struct {
		order *resealv1.ProbeOrder
		pool  *exchange.Pool
		want  string
	}{
		{order, nil, `pool "jetty" is not in its plan`},
		{&resealv1.ProbeOrder{Pool: "jetty", Address: "127.0.0.1:1"}, pool, "is not an endpoint"},
		{&resealv1.ProbeOrder{Address: s.address, Idle: durationpb.New(-time.Second)}, pool, "negative"},
		{&resealv1.ProbeOrder{Address: s.address, ServerName: "other.test"}, pool, "not other.test"},
	} {
		r := CarryOut(t.Context(), test.order, test.pool, sessions)
		if !strings.Contains(r.Error, test.want) || len(r.Versions) > 0 {
			t.Errorf("%v: %q, want %q", test.order, r.Error, test.want)
		}
	}
}

func TestConfigOfOrder(t *testing.T) {
	t.Parallel()
	named := &exchange.Pool{Spec: &resealv1.BackendPool{
		Dns:         &resealv1.DNSEndpoints{Name: "jetty.internal", Port: 8443},
		HealthCheck: &resealv1.HealthCheck{ServerName: "health.test"},
	}, TLS: &tls.Config{}}
	cfg, err := configOf(&resealv1.ProbeOrder{Address: "jetty.internal:8443"}, named)
	if err != nil || cfg.ServerName != "health.test" {
		t.Errorf("server name %q, %v", cfg.ServerName, err)
	}
	cfg, err = configOf(&resealv1.ProbeOrder{Address: "jetty.internal:8443", ServerName: "order.test"}, named)
	if err != nil || cfg.ServerName != "order.test" {
		t.Errorf("server name %q, %v", cfg.ServerName, err)
	}
	if _, err := configOf(&resealv1.ProbeOrder{Address: "jetty.internal:443"}, named); err == nil {
		t.Error("another port is probed")
	}
}
