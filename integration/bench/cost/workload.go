package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reseal/reseal/integration/harness"
)

// workload is one row of the table.
type workload struct {
	key, title string
	// unit of what is measured, and how many decimals are shown.
	unit     string
	decimals int
	// bounds of the ratios to HAProxy of this release, and to the best of the newest
	// peers; 0: none.
	release, newest float64
	// site that is asked; a proxy without HTTP/2 to backends has no siteHTTP2.
	site site
	// begin is called once per round. May be nil.
	begin func(ctx context.Context, b *bed) error
	// measure measures one proxy once.
	measure func(ctx context.Context, b *bed, p *proxy) (float64, error)
}

func (w *workload) runs(p *proxy) bool { return w.site != siteHTTP2 || p.http2 }

// workloads are the rows, in their order.
func workloads() []*workload {
	steady := func(s site, args ...string) func(context.Context, *bed, *proxy) (float64, error) {
		return func(ctx context.Context, b *bed, p *proxy) (float64, error) {
			return p.cost(b.options.requests, func(n int) error { return h2load(ctx, p.sites[s], n, small, args...) })
		}
	}
	visits := func(version uint16, resumed bool) func(context.Context, *bed, *proxy) (float64, error) {
		return func(ctx context.Context, b *bed, p *proxy) (float64, error) {
			do, err := b.visits(ctx, p.sites[siteHTTP1], version, resumed)
			if err != nil {
				return 0, err
			}
			return p.cost(b.options.connections, do)
		}
	}
	http1 := []string{"--h1", "-c", fmt.Sprint(clients)}
	http2 := []string{"-c", fmt.Sprint(clients), "-m", "10"}
	return []*workload{
		{key: "h1", title: "HTTP/1.1, keep-alive", unit: "µs/request", decimals: 1, release: 0.65, newest: 0.75, measure: steady(siteHTTP1, http1...)},
		{key: "h2", title: "HTTP/2 → HTTP/1.1 pool", unit: "µs/request", decimals: 1, release: 0.7, newest: 0.8, measure: steady(siteHTTP1, http2...)},
		{key: "h2-h2", title: "HTTP/2 → HTTP/2 pool", unit: "µs/request", decimals: 1, release: 0.7, newest: 0.8, site: siteHTTP2, measure: steady(siteHTTP2, http2...)},
		{key: "h1-h2", title: "HTTP/1.1 → HTTP/2 pool", unit: "µs/request", decimals: 1, release: 0.7, site: siteHTTP2, measure: noReason},
		{key: "full13", title: "new connection, TLS 1.3, full", unit: "µs", release: 0.8, newest: 1, measure: visits(tls.VersionTLS13, false)},
		{key: "resumed13", title: "new connection, TLS 1.3, resumed", unit: "µs", release: 0.75, newest: 1, measure: visits(tls.VersionTLS13, true)},
		{key: "ticket12", title: "new connection, TLS 1.2, ticket", unit: "µs", release: 0.8, newest: 1, measure: visits(tls.VersionTLS12, true)},
		{key: "download", title: "download", unit: "CPU s/GB", decimals: 2, release: 0.7, newest: 0.9, measure: download},
		{key: "upload", title: "upload", unit: "CPU s/GB", decimals: 2, release: 0.7, newest: 0.9, site: siteSink, measure: upload},
		{key: "idle", title: "memory per idle connection", unit: "KB PSS", decimals: 1, release: 0.65, newest: 0.65, measure: idle},
		{key: "p99", title: "p99 at 70% of the first peer's saturation", unit: "µs", release: 1, newest: 1, begin: findRate, measure: latency},
	}
}

// cpu is the processor time, user and system, that the proxy's processes have used
// since their start, to the nanosecond: the kernel's CPU clock of each process
// (clock_getcpuclockid(3)).
func (p *proxy) cpu() (time.Duration, error) {
	pids, err := p.pids()
	if err != nil {
		return 0, err
	}
	const scheduler = 2 // CPUCLOCK_SCHED of <linux/posix-timers.h>
	var sum time.Duration
	for _, pid := range pids {
		var used unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|scheduler), &used); err != nil {
			return 0, fmt.Errorf("CPU clock of process %d: %w", pid, err)
		}
		sum += time.Duration(used.Nano())
	}
	return sum, nil
}

// cost is what a load of n requests costs the proxy, in µs per request.
func (p *proxy) cost(n int, load func(n int) error) (float64, error) {
	before, err := p.cpu()
	if err != nil {
		return 0, err
	}
	if err := load(n); err != nil {
		return 0, err
	}
	after, err := p.cpu()
	return float64((after - before).Nanoseconds()) / 1e3 / float64(n), err
}

// noReason asks by our own clients: HAProxy's answers from HTTP/2 have no reason phrase,
// and h2load takes no status without.
func noReason(ctx context.Context, b *bed, p *proxy) (float64, error) {
	return plain(ctx, b, p, siteHTTP2, clients, harness.SiteName)
}

// bulkTransfers are made by half as many clients.
const bulkTransfers = 4

// bulk turns µs per transfer into seconds per 10⁹ bytes.
func (b *bed) bulk(perTransfer float64, err error) (float64, error) {
	return perTransfer / 1e6 / (float64(b.options.bulk) / 1e9), err
}

func download(ctx context.Context, b *bed, p *proxy) (float64, error) {
	return b.bulk(p.cost(bulkTransfers, func(n int) error {
		return h2load(ctx, p.sites[siteHTTP1], n, large, "--h1", "-c", fmt.Sprint(bulkTransfers/2))
	}))
}

func upload(ctx context.Context, b *bed, p *proxy) (float64, error) {
	return b.bulk(p.cost(bulkTransfers, func(n int) error {
		return h2load(ctx, p.sites[siteSink], n, "/", "--h1", "-c", fmt.Sprint(bulkTransfers/2), "-d", b.upload)
	}))
}

// settle is how long a proxy is left alone before its memory is read. Within 4 s an
// edge at rest gives back what it does not need.
const settle = 5 * time.Second

// idle is the memory of a proxy that has just started for each of many connections
// that have made a request and then wait, in KB.
func idle(ctx context.Context, b *bed, p *proxy) (float64, error) {
	if err := p.restart(ctx); err != nil {
		return 0, err
	}
	text := request(harness.SiteName, small)
	warm, err := crowd(ctx, p.sites[siteHTTP1], b.tls(), clients, text)
	if err != nil {
		return 0, err
	}
	disperse(warm)
	before, err := settled(ctx, p)
	if err != nil {
		return 0, err
	}
	all, err := crowd(ctx, p.sites[siteHTTP1], b.tls(), b.options.idle, text)
	defer disperse(all)
	if err != nil {
		return 0, err
	}
	after, err := settled(ctx, p)
	return float64(after-before) / 1024 / float64(b.options.idle), err
}

// settled is a proxy's memory after a while.
func settled(ctx context.Context, p *proxy) (int64, error) {
	if err := sleep(ctx, settle); err != nil {
		return 0, err
	}
	pids, err := p.pids()
	if err != nil {
		return 0, err
	}
	return pss(pids)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// share70 is the part of the saturation at which latencies are compared.
const share70 = 0.7

// findRate measures the first peer's saturation, for the latencies of this round.
func findRate(ctx context.Context, b *bed) error {
	text := request(harness.SiteName, small)
	all, err := crowd(ctx, b.proxies[0].sites[siteHTTP1], b.tls(), clients, text)
	defer disperse(all)
	if err != nil {
		return err
	}
	saturation, err := saturate(ctx, all, text, b.options.requests/2)
	b.rate = share70 * saturation
	return err
}

// latency is the p99 of requests at a steady rate, in µs.
func latency(ctx context.Context, b *bed, p *proxy) (float64, error) {
	text := request(harness.SiteName, small)
	all, err := crowd(ctx, p.sites[siteHTTP1], b.tls(), clients, text)
	defer disperse(all)
	if err != nil {
		return 0, err
	}
	took, err := pace(ctx, all, text, b.options.requests, b.rate)
	if err != nil {
		return 0, err
	}
	return float64(quantile(took, 99).Nanoseconds()) / 1e3, nil
}

// growth is a row of the second table: what a request costs Reseal beside much
// else, relative to what it costs without, in the same round. Peers are asked, too, if
// they have room for as much.
type growth struct {
	key, title string
	peers      bool
	measure    func(ctx context.Context, b *bed, p *proxy) (float64, error)
}

// growths are the rows, in their order.
func growths() []growth {
	return []growth{
		{"idle-beside", fmt.Sprintf("%d idle connections beside", idleCrowd()), false, idleBeside},
		{"active", "5,000 active connections instead of 32", true, active},
		{"routes", "1,000 routes and pools instead of 3", false, routes},
	}
}

// plain is what a request of one of n clients costs, in µs. The handshakes don't
// count.
func plain(ctx context.Context, b *bed, p *proxy, s site, n int, host string) (float64, error) {
	text := request(host, small)
	all, err := crowd(ctx, p.sites[s], b.tls(), n, text)
	defer disperse(all)
	if err != nil {
		return 0, err
	}
	load := func(requests int) error {
		return share(ctx, n, requests, func(worker, _ int) error { return all[worker].get(text) })
	}
	if n > clients {
		// As many ask at once for the first time: connections to the backend are made.
		if err := load(2 * n); err != nil {
			return 0, err
		}
	}
	return p.cost(b.options.requests, load)
}

// idleCrowd is how many idle connections a limit of descriptors allows: 20,000, or
// what it leaves when all else has some.
func idleCrowd() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	const others = 1_500
	return min(20_000, int(min(limit.Max, 1<<20))-others)
}

func idleBeside(ctx context.Context, b *bed, p *proxy) (float64, error) {
	many := idleCrowd()
	text := request(harness.SiteName, small)
	without, err := plain(ctx, b, p, siteHTTP1, clients, harness.SiteName)
	if err != nil {
		return 0, err
	}
	all, err := crowd(ctx, p.sites[siteHTTP1], b.tls(), many, text)
	defer disperse(all)
	if err != nil {
		return 0, err
	}
	with, err := plain(ctx, b, p, siteHTTP1, clients, harness.SiteName)
	return with / without, err
}

func active(ctx context.Context, b *bed, p *proxy) (float64, error) {
	few, err := plain(ctx, b, p, siteHTTP1, clients, harness.SiteName)
	if err != nil {
		return 0, err
	}
	many, err := plain(ctx, b, p, siteHTTP1, 5_000, harness.SiteName)
	return many / few, err
}

// routes compares with another edge, which has many routes, each with a pool.
func routes(ctx context.Context, b *bed, p *proxy) (float64, error) {
	const many = 1_000
	if b.crowd == nil {
		if err := b.startCrowd(many); err != nil {
			return 0, err
		}
	}
	few, err := plain(ctx, b, p, siteHTTP1, clients, harness.SiteName)
	if err != nil {
		return 0, err
	}
	with, err := plain(ctx, b, b.crowd, siteHTTP1, clients, crowdHost(many-1))
	return with / few, err
}

func crowdHost(i int) string { return fmt.Sprintf("host%d.%s", i, harness.SiteName) }

// startCrowd starts an edge with many routes and pools.
func (b *bed) startCrowd(many int) error {
	command, ok := b.harness.TB.(*harness.Command)
	if !ok {
		return errors.New("not in a command")
	}
	return command.Try(func() error {
		p := &proxy{key: "crowd"}
		p.sites[siteHTTP1] = b.harness.Address()
		edge := b.startEdge(p, "crowd", "")
		b.harness.Apply(harness.Listener("crowd", p.sites[siteHTTP1], "edge: crowd", "  pool: http1\n"))
		const batch = 100
		var revision int64
		for at := 0; at < many; at += batch {
			var manifest strings.Builder
			for i := at; i < min(at+batch, many); i++ {
				name := fmt.Sprintf("crowd-%d", i)
				manifest.WriteString(b.pool(name, siteHTTP1) + harness.Route(name, "crowd", crowdHost(i), name, ""))
			}
			revision = b.harness.Apply(manifest.String())
		}
		b.harness.WaitAcked(revision, edge)
		b.crowd = p
		return nil
	})
}
