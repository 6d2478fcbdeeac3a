package bench

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// The proxies under test. Those that are called best are configured as well as
// their users can, instead of as their manuals show.
const (
	ProxyReseal      = "Reseal"
	ProxyHAProxy     = "HAProxy"
	ProxyHAProxyBest = "HAProxy, best"
	ProxyNginx       = "nginx"
	ProxyNginxBest   = "nginx, best"
)

// Runs reports whether the scenario is for a proxy.
func (s *Scenario) Runs(proxy string) bool {
	switch proxy {
	case ProxyReseal:
		return true
	case ProxyHAProxyBest, ProxyNginxBest:
		return s.Best && !s.ResealOnly
	}
	return !s.ResealOnly
}

// Bench is what all trials of a run share.
type Bench struct {
	// Fleet has a running control plane. Each trial adds its own edges.
	Fleet *harness.Fleet
	// Authority issues all certificates.
	Authority *peers.Authority
	// Capture makes tshark count resets (see CanCapture). Otherwise the kernel's
	// counter of the whole machine is taken.
	Capture bool
	// Dir holds the files of peers and backends.
	Dir string
}

// Result is what one scenario cost through one proxy.
type Result struct {
	Scenario *Scenario
	Proxy    string
	Outcome
	// Counts are the backend's own, after the load.
	Counts peers.Counts
	// Unclean is how many connections had ended without close_notify, as far
	// as the backend saw, when the proxy had been stopped as well.
	Unclean int64
	// Resets is how many RSTs the proxy had sent to the backend, its stop
	// included. With ResetsByKernel it counts those of the whole machine.
	Resets         int64
	ResetsByKernel bool
	// LateResets are further RSTs, with which the proxy's kernel answered
	// retransmissions after both sides had closed. They harm nothing.
	LateResets int64
	// TimeWait is how many connections to the backend waited out their time on
	// the proxy's side after the load.
	TimeWait int64
	// AfterStart are the full handshakes after a restart of the proxy.
	AfterStart int64
	// Ours is what the edges counted themselves, for Reseal.
	Ours Handshakes
}

// trial is one scenario with one proxy.
type trial struct {
	scenario *Scenario
	proxy    Proxy
	options  peers.Options
	backend  *peers.Backend
	roots    *tls.Config
	requests int
	resets   func(context.Context, *Result) error // counts those since the start

	past    peers.Counts  // of the backend's earlier lives
	before  *peers.Counts // the proxy's restart
	outcome Outcome
}

// Run runs a scenario with one proxy and n requests. Failed requests are not an
// error; they are in the result.
func (b *Bench) Run(ctx context.Context, s *Scenario, proxy string, n int) (result Result, err error) {
	dir, err := os.MkdirTemp(b.Dir, s.Key+"-")
	if err != nil {
		return result, err
	}
	address, err := process.FreeAddress()
	if err != nil {
		return result, err
	}
	t := &trial{
		scenario: s, options: s.options(b.Authority, dir, address), requests: s.requests(n),
		roots: &tls.Config{RootCAs: b.Authority.Pool(), MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(0)},
	}
	end, err := b.watch(ctx, t, dir, address)
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, end()) }()
	if err := t.startBackend(ctx); err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, t.backend.Stop()) }()
	t.proxy, err = b.newProxy(proxy, target{scenario: s, backend: t.backend.Address, authority: b.Authority, dir: dir})
	if err != nil {
		return result, err
	}
	if err := t.proxy.Start(ctx); err != nil {
		return result, err
	}
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, t.proxy.Stop())
		}
	}()
	stopBusy, err := busy(s.busy)
	if err != nil {
		return result, err
	}
	defer stopBusy()
	if result, err = t.measure(ctx); err != nil {
		return result, err
	}
	result.Proxy, stopped = proxy, true
	return result, t.afterStop(ctx, &result)
}

func (b *Bench) newProxy(name string, t target) (Proxy, error) {
	switch name {
	case ProxyHAProxy, ProxyHAProxyBest:
		return newHAProxy(t, name == ProxyHAProxyBest)
	case ProxyNginx, ProxyNginxBest:
		return newNginx(t, name == ProxyNginxBest)
	case ProxyReseal:
		return newReseal(b.Fleet, t), nil
	}
	return nil, fmt.Errorf("no proxy %q", name)
}

// measure drives the scenario and counts.
func (t *trial) measure(ctx context.Context) (Result, error) {
	drive := t.scenario.drive
	if drive == nil {
		drive = func(ctx context.Context, t *trial) error { return t.run(ctx, t.load(t.requests)) }
	}
	if err := drive(ctx, t); err != nil {
		return Result{}, fmt.Errorf("%s: %w%s", t.scenario.Key, err, t.errors())
	}
	result := Result{Scenario: t.scenario, Outcome: t.outcome}
	counts, err := t.settled(ctx)
	if err != nil {
		return result, err
	}
	result.Counts = counts
	if t.before != nil {
		result.AfterStart = counts.Full - t.before.Full
	}
	if edges, ok := t.proxy.(*Reseal); ok {
		result.Ours = edges.Handshakes()
	}
	_, port, err := net.SplitHostPort(t.backend.Address)
	if err != nil {
		return result, err
	}
	result.TimeWait, err = timeWaits(port)
	return result, err
}

// afterStop stops the proxy and adds what that did to the backend.
func (t *trial) afterStop(ctx context.Context, result *Result) error {
	if err := t.proxy.Stop(); err != nil {
		return err
	}
	counts, err := t.settled(ctx)
	if err != nil {
		return err
	}
	result.Unclean = counts.Unclean
	return t.resets(ctx, result)
}

// watch begins to count resets and returns what ends that.
func (b *Bench) watch(ctx context.Context, t *trial, dir, address string) (end func() error, err error) {
	if !b.Capture {
		before, err := kernelResets()
		t.resets = func(_ context.Context, r *Result) error {
			now, err := kernelResets()
			r.Resets, r.ResetsByKernel = now-before, true
			return err
		}
		return func() error { return nil }, err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	c, err := newCapture(ctx, dir, port)
	if err != nil {
		return nil, err
	}
	t.resets = func(ctx context.Context, r *Result) (err error) {
		r.Resets, r.LateResets, err = c.counts(ctx)
		return err
	}
	return c.close, nil
}

// load is n requests of the scenario.
func (t *trial) load(n int) *Load {
	path := t.scenario.path
	if path == "" {
		path = peers.Small
	}
	return &Load{
		Address: t.proxy.Address(), TLS: t.roots, Hosts: t.scenario.hosts(), Path: path,
		Requests: n, Clients: t.scenario.clientCount(), AbortEvery: t.scenario.aborts, Together: true,
	}
}

// run runs a load and adds its outcome.
func (t *trial) run(ctx context.Context, load *Load) error {
	outcome, err := load.Run(ctx)
	t.outcome.add(outcome)
	return err
}

func (t *trial) errors() string {
	if len(t.outcome.Errors) == 0 {
		return ""
	}
	return fmt.Sprintf("; %d requests failed: %v", t.outcome.Failed, t.outcome.Errors)
}

func (t *trial) startBackend(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	start := t.scenario.backend
	if start == nil {
		start = peers.JettyArranged
	}
	backend, err := start(ctx, t.options)
	if err == nil {
		t.backend = backend
	}
	return err
}

// restartBackend ends the backend and starts it again at the same address.
func (t *trial) restartBackend(ctx context.Context) error {
	counts, err := t.counts(ctx)
	if err != nil {
		return err
	}
	// How its own end looks does not depend on the proxy.
	t.past = counts
	return errors.Join(t.backend.Stop(), t.startBackend(ctx))
}

// counts is what the backend counted in all its lives.
func (t *trial) counts(ctx context.Context) (peers.Counts, error) {
	c, err := t.backend.Counts(ctx)
	c.Full += t.past.Full
	c.ResumedSessionID += t.past.ResumedSessionID
	c.ResumedTicket += t.past.ResumedTicket
	c.ResumedPSK += t.past.ResumedPSK
	c.Failed += t.past.Failed
	c.Connections += t.past.Connections
	c.Requests += t.past.Requests
	c.Unclean += t.past.Unclean
	c.Resets += t.past.Resets
	return c, err
}

// settled is counts once nothing changes any more: closing takes a while.
func (t *trial) settled(ctx context.Context) (peers.Counts, error) {
	const quiet, limit = 5, 50 // times 100 ms
	before, err := t.counts(ctx)
	for same, tries := 0, 0; err == nil && same < quiet && tries < limit; tries++ {
		if err = sleep(ctx, 100*time.Millisecond); err != nil {
			break
		}
		var now peers.Counts
		if now, err = t.counts(ctx); now == before {
			same++
		} else {
			before, same = now, 0
		}
	}
	return before, err
}
