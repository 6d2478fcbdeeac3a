package probe

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// CarryOut carries out an order: it probes the endpoint that it names with what the pool's own
// connections use. pool is nil when the plan has no such pool. A refusal, and a
// backend that could not be probed, is a report with an error.
func CarryOut(ctx context.Context, order *resealv1.ProbeOrder, pool *exchange.Pool, sessions func() Handshaker) *Report {
	refuse := func(err error) *Report { return &Report{Id: order.GetId(), Error: err.Error()} }
	if pool == nil {
		return refuse(fmt.Errorf("pool %q is not in its plan", order.GetPool()))
	}
	cfg, err := configOf(order, pool)
	if err != nil {
		return refuse(err)
	}
	cfg.Sessions = sessions
	p, err := New(cfg)
	if err != nil {
		return refuse(err)
	}
	report, err := p.Run(ctx)
	if err != nil {
		return refuse(err)
	}
	report.Id = order.GetId()
	return report
}

func configOf(order *resealv1.ProbeOrder, pool *exchange.Pool) (Config, error) {
	spec, address := pool.Spec, order.GetAddress()
	fixed := slices.ContainsFunc(spec.GetEndpoints(), func(e *resealv1.Endpoint) bool { return e.GetAddress() == address })
	dns := spec.GetDns()
	if !fixed && (dns == nil || address != net.JoinHostPort(dns.GetName(), strconv.FormatUint(uint64(dns.GetPort()), 10))) {
		return Config{}, fmt.Errorf("%q is not an endpoint of pool %q in its plan", address, order.GetPool())
	}
	cfg := Config{
		Address:    address,
		ServerName: order.GetServerName(),
		TLS:        pool.TLS,
		Path:       order.GetPath(),
		Idle:       order.GetIdle().AsDuration(),
		NoRequests: order.GetNoRequests() || spec.GetProtocol() == resealv1.BackendPool_PROTOCOL_TCP,
	}
	for _, name := range []string{spec.GetTls().GetServerName(), spec.GetHealthCheck().GetServerName()} {
		if cfg.ServerName == "" {
			cfg.ServerName = name
		}
	}
	return cfg, nil
}
