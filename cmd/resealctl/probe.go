package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/probe"
	backendsession "github.com/reseal/reseal/edge/session"
	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxIdle bounds the idle time of a probe from this machine.
	maxIdle = 15 * time.Minute
	// maxRemoteIdle bounds that of a probe from an edge, which has a minute.
	maxRemoteIdle = 30 * time.Second
	// remoteTimeout bounds the wait for an edge's report.
	remoteTimeout = 75 * time.Second
)

const probeLong = `Find out what a TLS backend can do, with some 10 to 40 handshakes
and requests, one after another, and say what to put into the manifest:

  - TLS versions, and how each resumes sessions: session ID, ticket or PSK, and
    whether session IDs only without the session_ticket extension
  - how many tickets a connection gets, how long they live, whether each is
    taken only once
  - whether a session lives through close_notify, FIN without close_notify, RST,
    an abort during an answer, and with --idle through a pause
  - whether all addresses of the name share sessions and show one certificate
  - whether connections can be used again, and with --idle how long they stay

It also shows each connection as a packet capture would: what the ClientHello
offered and what the ServerHello answered. Session IDs and tickets stand there
as the first 8 hexadecimal digits of their SHA-256.

It connects from this machine and needs no control plane. With --edge it is that
edge that connects, with the trust, client certificate and policy of the pool;
only endpoints of pools can be probed then.`

// probeRun is one run of probe.
type probeRun struct {
	*app
	address, sni, path   string
	ca, cert, key        string
	policy               string
	insecure, noRequests bool
	idle                 time.Duration
	edge, pool           string
	format               *format
}

func newProbeCommand(a *app) *cobra.Command {
	p := &probeRun{app: a}
	cmd := &cobra.Command{
		Use:   "probe HOST:PORT",
		Short: "Find out what a TLS backend can do",
		Long:  probeLong,
		Example: "  resealctl probe jetty.internal:8443 --ca ca.pem\n" +
			"  resealctl probe 10.0.0.1:8443 --sni jetty.internal --idle 30s -o json\n" +
			"  resealctl probe jetty.internal:8443 --edge edge-1",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: p.completeEndpoints,
	}
	flags := cmd.Flags()
	flags.StringVar(&p.sni, "sni", "", "`name` for SNI, verification and Host (default HOST)")
	flags.StringVar(&p.ca, "ca", "", "PEM `file` with the roots to trust (default the system's)")
	flags.StringVar(&p.cert, "cert", "", "PEM `file` with a client certificate")
	flags.StringVar(&p.key, "key", "", "PEM `file` with its key")
	flags.StringVar(&p.policy, "policy", "", "TLSPolicy to keep to: a manifest `file`, or the name of one at the control plane")
	flags.BoolVar(&p.insecure, "insecure", false, "accept any certificate")
	flags.StringVar(&p.path, "path", "/", "path of the requests; a long answer shows aborts best")
	flags.BoolVar(&p.noRequests, "no-requests", false, "make handshakes only, for backends that don't speak HTTP")
	flags.DurationVar(&p.idle, "idle", 0, "leave a session and a connection idle for this long (default not tried)")
	flags.StringVar(&p.edge, "edge", "", "have this edge probe an endpoint of a pool")
	flags.StringVar(&p.pool, "pool", "", "with --edge: the pool, when several have the endpoint")
	for _, file := range []string{"ca", "cert", "key", "policy"} {
		_ = cmd.MarkFlagFilename(file)
	}
	_ = cmd.RegisterFlagCompletionFunc("edge", a.completeEdges)
	cmd.MarkFlagsRequiredTogether("cert", "key")
	p.format = registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p.address = args[0]
		if err := p.check(); err != nil {
			return err
		}
		ask := p.local
		if p.edge != "" {
			ask = p.remote
		}
		p.progress(true)
		report, err := ask(cmd.Context())
		p.progress(false)
		if err != nil {
			return err
		}
		return p.print(report)
	}
	return cmd
}

func (p *probeRun) check() error {
	host, port, err := net.SplitHostPort(p.address)
	if number, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || host == "" || number == 0 {
		return usagef("%q is not HOST:PORT", p.address)
	}
	longest := maxIdle
	if p.edge != "" {
		longest = maxRemoteIdle
	}
	if p.idle < 0 || p.idle > longest {
		return usagef("--idle must be between 0 and %s", configured(durationpb.New(longest)))
	}
	if p.edge == "" {
		if p.pool != "" {
			return usagef("--pool goes with --edge only")
		}
		return nil
	}
	for flag, set := range map[string]bool{
		"--ca": p.ca != "", "--cert": p.cert != "", "--policy": p.policy != "", "--insecure": p.insecure,
	} {
		if set {
			return usagef("%s can't be given with --edge: the edge uses what the pool's spec.tls says", flag)
		}
	}
	return nil
}

// progress shows on a terminal that something is going on.
func (p *probeRun) progress(on bool) {
	switch {
	case !p.terminal:
	case !on:
		steer(p.err, "\r\x1b[K")
	case p.idle > 0:
		p.warnf("Probing %s, with %s of idling ...", p.address, configured(durationpb.New(p.idle)))
	default:
		p.warnf("Probing %s ...", p.address)
	}
}

// local probes from this machine.
func (p *probeRun) local(ctx context.Context) (*resealv1.ProbeReport, error) {
	cfg := probe.Config{
		Address:            p.address,
		ServerName:         p.sni,
		InsecureSkipVerify: p.insecure,
		Path:               p.path,
		NoRequests:         p.noRequests,
		Idle:               p.idle,
		Sessions:           func() probe.Handshaker { return backendsession.New(backendsession.Config{}) },
	}
	if err := p.readFiles(&cfg); err != nil {
		return nil, err
	}
	var err error
	if cfg.Policy, err = p.readPolicy(ctx); err != nil {
		return nil, err
	}
	probing, err := probe.New(cfg)
	if err != nil {
		return nil, usagef("%v", err)
	}
	report, err := probing.Run(ctx)
	var untrusted *tls.CertificateVerificationError
	switch {
	case errors.Is(err, context.Canceled):
		return nil, errInterrupted
	case errors.As(err, &untrusted):
		return nil, fmt.Errorf("the certificate of %s is not accepted: %w; give its roots with --ca FILE, its name with --sni NAME, or --insecure",
			p.address, untrusted.Err)
	}
	return report, err
}

func (p *probeRun) readFiles(cfg *probe.Config) error {
	if p.ca != "" {
		data, err := os.ReadFile(p.ca)
		if err != nil {
			return err
		}
		cfg.Roots = x509.NewCertPool()
		if !cfg.Roots.AppendCertsFromPEM(data) {
			return fmt.Errorf("%s holds no PEM certificate", p.ca)
		}
	}
	if p.cert != "" {
		pair, err := tls.LoadX509KeyPair(p.cert, p.key)
		if err != nil {
			return fmt.Errorf("--cert and --key: %s", strings.TrimPrefix(err.Error(), "tls: "))
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return nil
}

// readPolicy reads the policy from a manifest, or asks the control plane.
func (p *probeRun) readPolicy(ctx context.Context) (*resealv1.TLSPolicy, error) {
	if p.policy == "" {
		return nil, nil
	}
	if _, err := os.Stat(p.policy); err != nil && !strings.ContainsAny(p.policy, "/.") {
		client, err := p.connect()
		if err != nil {
			return nil, err
		}
		ref := &resealv1.ResourceRef{Kind: "TLSPolicy", Name: p.policy}
		response, err := client.admin.Get(ctx, &resealv1.GetRequest{Resource: ref})
		if err != nil {
			return nil, describeMissing(err, ref)
		}
		return response.GetResource().GetTlsPolicy(), nil
	}
	objects, err := manifest.Load([]string{p.policy}, p.in)
	if err != nil {
		return nil, err
	}
	objects = slices.DeleteFunc(objects, func(o manifest.Object) bool { return o.Resource.GetTlsPolicy() == nil })
	if len(objects) != 1 {
		return nil, fmt.Errorf("%s holds %d TLSPolicies, want one", p.policy, len(objects))
	}
	if violations := manifest.Validate(objects[0].Resource); len(violations) > 0 {
		return nil, manifest.Locate(objects, violations)
	}
	return objects[0].Resource.GetTlsPolicy(), nil
}

// remote has an edge probe.
func (p *probeRun) remote(ctx context.Context) (*resealv1.ProbeReport, error) {
	client, err := p.connect()
	if err != nil {
		return nil, err
	}
	if p.pool, err = p.findPool(ctx, client); err != nil {
		return nil, err
	}
	client.timeout = max(client.timeout, remoteTimeout)
	order := &resealv1.ProbeOrder{Pool: p.pool, Address: p.address, ServerName: p.sni, Path: p.path, NoRequests: p.noRequests}
	if p.idle > 0 {
		order.Idle = durationpb.New(p.idle)
	}
	response, err := client.fleet.ProbeBackend(ctx, &resealv1.ProbeBackendRequest{Edge: p.edge, Order: order})
	if err != nil {
		return nil, err
	}
	return response.GetReport(), nil
}

// findPool finds the pool that has the address.
func (p *probeRun) findPool(ctx context.Context, client *client) (string, error) {
	if p.pool != "" {
		return p.pool, nil
	}
	list, err := client.admin.List(ctx, &resealv1.ListRequest{Kind: "BackendPool"})
	if err != nil {
		return "", err
	}
	var names []string
	for _, r := range list.GetResources() {
		if slices.Contains(endpointsOf(r.GetBackendPool()), p.address) {
			names = append(names, r.GetMetadata().GetName())
		}
	}
	switch len(names) {
	case 0:
		return "", fmt.Errorf("%s is not an endpoint of a pool, and an edge probes nothing else; resealctl get pools shows them", p.address)
	case 1:
		return names[0], nil
	}
	return "", fmt.Errorf("%s is an endpoint of %s: choose one with --pool", p.address, strings.Join(names, " and "))
}

// endpointsOf are the addresses of a pool that can be probed.
func endpointsOf(pool *resealv1.BackendPool) []string {
	var addresses []string
	for _, endpoint := range pool.GetEndpoints() {
		addresses = append(addresses, endpoint.GetAddress())
	}
	if dns := pool.GetDns(); dns != nil {
		addresses = append(addresses, net.JoinHostPort(dns.GetName(), strconv.Itoa(int(dns.GetPort()))))
	}
	return addresses
}

func (p *probeRun) completeEndpoints(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, noFiles
	}
	addresses := p.quietly(cmd, func(ctx context.Context, c *client) []string {
		var addresses []string
		list, _ := c.admin.List(ctx, &resealv1.ListRequest{Kind: "BackendPool"})
		for _, r := range list.GetResources() {
			addresses = append(addresses, endpointsOf(r.GetBackendPool())...)
		}
		slices.Sort(addresses)
		return slices.Compact(addresses)
	})
	return startingWith(addresses, typed), noFiles
}
