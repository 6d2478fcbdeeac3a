// Command sessions counts the full TLS handshakes that requests through Reseal,
// HAProxy and nginx cost a Jetty backend, and prints them as a table.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/reseal/reseal/integration/bench"
	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

type options struct {
	requests int
	peers    bool
	scenario *regexp.Regexp
	proxy    *regexp.Regexp
	markdown bool
	bin      string
}

func main() {
	var o options
	flag.IntVar(&o.requests, "requests", 50_000, "requests per scenario and proxy")
	flag.BoolVar(&o.peers, "peers", false, "measure HAProxy and nginx as well")
	scenario := flag.String("scenario", "", "only scenarios whose key matches this `regexp`")
	proxy := flag.String("proxy", "", "only proxies whose name matches this `regexp`")
	flag.BoolVar(&o.markdown, "markdown", false, "print markdown")
	flag.StringVar(&o.bin, "bin", "", "`folder` with the built commands; default: build them")
	flag.Parse()
	var bad, err error
	o.scenario, bad = regexp.Compile(*scenario)
	o.proxy, err = regexp.Compile(*proxy)
	if err := errors.Join(bad, err); err != nil || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "Error: bad -scenario, -proxy or argument:", err, flag.Args())
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err = run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		stop()
		os.Exit(1)
	}
}

// errWrong means that Reseal did worse than it must.
var errWrong = errors.New("not as it must be")

func run(ctx context.Context, o options) (err error) {
	scenarios := selected(o.scenario)
	if len(scenarios) == 0 {
		return fmt.Errorf("no scenario matches; there are %s", strings.Join(keys(bench.Scenarios()), ", "))
	}
	dir, err := os.MkdirTemp("", "reseal-sessions-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if o.bin == "" {
		o.bin = filepath.Join(dir, "bin")
		if err := build(ctx, o.bin); err != nil {
			return err
		}
	}
	if err := os.Setenv("RESEAL_BIN", o.bin); err != nil {
		return err
	}
	t := harness.NewCommand(dir)
	defer func() { err = errors.Join(err, t.End()) }()
	b, err := prepare(ctx, t, dir)
	if err != nil {
		return err
	}
	return measure(ctx, o, t, b, scenarios)
}

// build builds the commands as they are shipped.
func build(ctx context.Context, dir string) error {
	command := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator), harness.Module+"/cmd/...")
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, output)
	}
	return nil
}

// prepare starts what all trials share.
func prepare(ctx context.Context, t *harness.Command, dir string) (*bench.Bench, error) {
	authority, err := peers.NewAuthority("Reseal benchmark")
	if err != nil {
		return nil, err
	}
	b := &bench.Bench{Authority: authority, Dir: dir}
	b.Capture = true
	if err := bench.CanCapture(ctx, dir); err != nil {
		b.Capture = false
		fmt.Fprintln(os.Stderr, "resets are those of the whole machine, since tshark can't capture:", err)
	}
	return b, t.Try(func() error {
		b.Fleet = harness.NewShipped(t)
		b.Fleet.StartControlPlane()
		return nil
	})
}

// measure runs all scenarios and prints the table, even when some failed.
func measure(ctx context.Context, o options, t *harness.Command, b *bench.Bench, scenarios []*bench.Scenario) error {
	table := &bench.Table{Requests: o.requests, Markdown: o.markdown, Proxies: []string{bench.ProxyReseal}}
	if o.peers {
		table.Proxies = []string{bench.ProxyHAProxy, bench.ProxyHAProxyBest, bench.ProxyNginx, bench.ProxyNginxBest, bench.ProxyReseal}
	}
	table.Proxies = slices.DeleteFunc(table.Proxies, func(proxy string) bool { return !o.proxy.MatchString(proxy) })
	var errs []error
	for _, s := range scenarios {
		results := make(map[string]bench.Result)
		for _, proxy := range table.Proxies {
			if !s.Runs(proxy) {
				continue
			}
			var result bench.Result
			err := t.Try(func() (err error) {
				result, err = b.Run(ctx, s, proxy, o.requests)
				return err
			})
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s, %s: %w", s.Key, proxy, err))
				fmt.Fprintf(os.Stderr, "%-22s %-13s %v\n", s.Key, proxy, err)
				continue
			}
			table.Add(result)
			progress(result)
			results[proxy] = result
		}
		for _, problem := range verdict(s, results) {
			errs = append(errs, fmt.Errorf("%s: %w: %s", s.Key, errWrong, problem))
			fmt.Fprintf(os.Stderr, "    %s\n", problem)
		}
	}
	return errors.Join(append(errs, table.Write(os.Stdout))...)
}

// verdict is what is wrong with Reseal's result of a scenario.
func verdict(s *bench.Scenario, results map[string]bench.Result) []string {
	ours, ok := results[bench.ProxyReseal]
	if !ok {
		return nil
	}
	problems := s.Problems(ours)
	if haproxy, ok := results[bench.ProxyHAProxy]; ok {
		if slow := s.Slow(ours, haproxy); slow != "" {
			problems = append(problems, slow)
		}
	}
	return problems
}

func progress(r bench.Result) {
	fmt.Fprintf(os.Stderr, "%-22s %-13s %6d full, %6d resumed, %d RST (%d late), %d unclean, %d failed, p50 %v, p99 %v, %v, load %s\n",
		r.Scenario.Key, r.Proxy, r.Counts.Full, r.Counts.Resumed(), r.Resets, r.LateResets, r.Unclean, r.Failed,
		r.P50.Round(10*time.Microsecond), r.P99.Round(10*time.Microsecond), r.Took.Round(time.Millisecond), load())
	for _, text := range r.Errors {
		fmt.Fprintln(os.Stderr, "   ", text)
	}
}

// load is the machine's load average of the last minute.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	average, _, _ := strings.Cut(string(text), " ")
	return average
}

func selected(pattern *regexp.Regexp) []*bench.Scenario {
	var matching []*bench.Scenario
	for _, s := range bench.Scenarios() {
		if pattern.MatchString(s.Key) {
			matching = append(matching, s)
		}
	}
	return matching
}

func keys(scenarios []*bench.Scenario) []string {
	var keys []string
	for _, s := range scenarios {
		keys = append(keys, s.Key)
	}
	return keys
}
