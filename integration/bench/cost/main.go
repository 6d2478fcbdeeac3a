// Command cost measures what requests cost Reseal, HAProxy and nginx: processor
// time as the kernel counts it, memory and latency, side by side in one run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/rivals"
)

// options say what is measured, and how much of it.
type options struct {
	rounds      int
	only        []string // keys of proxies
	workload    *regexp.Regexp
	linear      bool
	short       bool
	requests    int // per measurement
	connections int // new ones per measurement
	bulk        int // bytes of a large transfer
	idle        int // connections
	form        form
	readme      string
	bin         string
	against     []string // other builds of reseal-edge
}

const summary = `Measure what requests cost Reseal, HAProxy and nginx: CPU of the proxy from the kernel, memory, latency.

All proxies run at the same time, with TLS on both legs, defaults and access logs; in each round each of them gets
the same work in turn. The table shows medians, and medians of the ratios within rounds.
Peers are Debian's HAProxy and nginx (integration/setup.sh) and the newest (integration/bench/peers.sh); one that is
missing is left out.

Usage: go run ./integration/bench/cost [flags]
`

func main() {
	o, code := parse(os.Args[1:], os.Stderr)
	if o == nil {
		os.Exit(code)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, *o); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		stop()
		os.Exit(1)
	}
}

// parse reads the flags. Without options the command ends with the code.
func parse(args []string, stderr io.Writer) (*options, int) {
	o := &options{}
	flags := flag.NewFlagSet("cost", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		_, _ = io.WriteString(stderr, summary)
		flags.PrintDefaults()
	}
	known := []string{keyReseal}
	for _, program := range rivals.Programs() {
		known = append(known, program.Key)
	}
	flags.IntVar(&o.rounds, "rounds", 5, "how often everything is measured")
	only := flags.String("only", "", "only these `proxies`, of "+strings.Join(known, ","))
	workload := flags.String("workload", "", "only workloads whose key matches this `regexp`: "+strings.Join(keys(), ", "))
	flags.IntVar(&o.requests, "requests", 20_000, "requests per measurement")
	flags.IntVar(&o.connections, "connections", 1_000, "new connections per measurement")
	flags.IntVar(&o.bulk, "bulk", 100_000_000, "size of a download and upload, in `bytes`")
	flags.IntVar(&o.idle, "idle", 2_000, "idle connections whose memory is measured")
	flags.BoolVar(&o.linear, "linear", false, "also measure how the cost grows with connections and configuration")
	flags.BoolVar(&o.short, "short", false, "two rounds of a fourth of the work, in less than two minutes")
	markdown := flags.Bool("markdown", false, "print markdown")
	json := flags.Bool("json", false, "print JSON with all values")
	flags.StringVar(&o.readme, "readme", "", "put the table into this `file` too, between the lines that name this command")
	flags.StringVar(&o.bin, "bin", "", "`folder` with the built commands; default: build them")
	against := flags.String("against", "", "also measure these `builds` of reseal-edge, files separated by commas")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return nil, 0
	case err != nil:
		return nil, 2
	}
	o.only = known
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	if *against != "" {
		o.against = strings.Split(*against, ",")
	}
	for _, key := range o.only {
		if !slices.Contains(known, key) {
			err = fmt.Errorf("-only: there is no %q", key)
		}
	}
	var bad error
	if o.workload, bad = regexp.Compile(*workload); bad != nil {
		err = fmt.Errorf("-workload: %w", bad)
	}
	if o.short {
		o.rounds, o.requests, o.connections, o.idle, o.bulk = 2, o.requests/4, o.connections/4, o.idle/4, o.bulk/4
	}
	switch {
	case *markdown:
		o.form = formMarkdown
	case *json:
		o.form = formJSON
	}
	if err == nil && (o.rounds < 1 || o.requests < clients || o.connections < 1 || o.bulk < 1 || o.idle < 1 || flags.NArg() > 0) {
		err = errors.New("a number is too small, or there is an argument")
	}
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "Error:", err)
		return nil, 2
	}
	return o, 0
}

// keys of all workloads.
func keys() []string {
	var all []string
	for _, w := range workloads() {
		all = append(all, w.key)
	}
	for _, g := range growths() {
		all = append(all, g.key+" (with -linear)")
	}
	return all
}

func run(ctx context.Context, o options) (err error) {
	o.only, err = installed(o.only)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "reseal-cost-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if o.bin != "" {
		if o.bin, err = filepath.Abs(o.bin); err == nil {
			err = os.Setenv("RESEAL_BIN", o.bin)
		}
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, harness.RemoveBuilds()) }()
	t := harness.NewCommand(dir)
	defer func() { err = errors.Join(err, t.End()) }()
	b, err := newBed(ctx, t, dir, o)
	if err != nil {
		return err
	}
	results, err := b.rounds(ctx)
	if err != nil {
		return err
	}
	if o.readme != "" {
		if err := results.replace(o.readme); err != nil {
			return err
		}
	}
	return results.write(os.Stdout, o.form)
}

// installed leaves those that can be had. Peers stand first: the first of them is
// what the others are compared with.
func installed(keys []string) ([]string, error) {
	var found []string
	for _, program := range rivals.Programs() {
		if !slices.Contains(keys, program.Key) {
			continue
		}
		if _, err := program.Version(); err != nil {
			fmt.Fprintln(os.Stderr, "left out:", err)
			continue
		}
		found = append(found, program.Key)
	}
	if slices.Contains(keys, keyReseal) {
		found = append(found, keyReseal)
	}
	if len(found) == 0 {
		return nil, errors.New("there is nothing to measure")
	}
	return found, nil
}

// rounds measures everything, in turns.
func (b *bed) rounds(ctx context.Context) (*results, error) {
	r := newResults(b)
	for round := range b.options.rounds {
		for _, w := range r.workloads {
			if w.key == "idle" && round >= b.slowRounds() {
				continue
			}
			if w.begin != nil {
				if err := w.begin(ctx, b); err != nil {
					return nil, fmt.Errorf("%s: %w", w.key, err)
				}
			}
			for i := range b.proxies {
				p := b.proxies[(i+round)%len(b.proxies)]
				if !w.runs(p) {
					continue
				}
				value, err := b.once(ctx, round, w, p)
				if err != nil {
					return nil, fmt.Errorf("%s, %s: %w", w.key, p.title, err)
				}
				r.add(w.key, p.key, value)
				fmt.Fprintf(os.Stderr, "round %d  %-10s %-14s %8.*f %s\n", round+1, w.key, p.title, w.decimals, value, w.unit)
			}
		}
		if round < b.slowRounds() {
			if err := b.growth(ctx, r, round); err != nil {
				return nil, err
			}
		}
	}
	return r, nil
}

// slowRounds is in how many rounds memory and growth are measured, which takes long
// and hardly differs.
func (b *bed) slowRounds() int {
	if b.options.short {
		return 1
	}
	return 2
}

// once measures a workload. Before its first time it is run once for nothing, so that
// connections, sessions and buffers are there.
func (b *bed) once(ctx context.Context, round int, w *workload, p *proxy) (float64, error) {
	if round == 0 && w.key != "idle" {
		whole := b.options
		b.options.requests, b.options.connections = max(whole.requests/8, clients), max(whole.connections/8, 1)
		_, err := w.measure(ctx, b, p)
		if b.options = whole; err != nil {
			return 0, err
		}
	}
	return w.measure(ctx, b, p)
}

// growth measures the rows of the second table.
func (b *bed) growth(ctx context.Context, r *results, round int) error {
	for i := range b.proxies {
		p := b.proxies[(i+round)%len(b.proxies)]
		for _, g := range r.growths {
			if p.key != keyReseal && !g.peers {
				continue
			}
			value, err := g.measure(ctx, b, p)
			switch {
			case err != nil && p.key != keyReseal && ctx.Err() == nil:
				fmt.Fprintf(os.Stderr, "left out: %s, %s: %v\n", g.key, p.title, err) // it does not take as much
				continue
			case err != nil:
				return fmt.Errorf("%s, %s: %w", g.key, p.title, err)
			}
			r.add(g.key, p.key, value)
			fmt.Fprintf(os.Stderr, "round %d  %-12s %-14s %.2f times\n", round+1, g.key, p.title, value)
		}
	}
	return nil
}
