// Command fleet measures what fleets of simulated edges cost a control plane, and
// prints it as a table.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/reseal/reseal/integration/fleetsim"
	"github.com/reseal/reseal/integration/harness"
)

func main() {
	sizes := flag.String("edges", "250,1000", "numbers of edges, one column each")
	realistic := flag.Bool("realistic", false, "with 200 pools, 50 listeners, 50 certificates and 200 routes instead of one each")
	idle := flag.Duration("idle", 12*time.Second, "for how long idle CPU is measured")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	size := fleetsim.Small
	if *realistic {
		size = fleetsim.Realistic
	}
	if err := run(ctx, *sizes, size, *idle); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, sizes string, size fleetsim.Size, idle time.Duration) (err error) {
	dir, err := os.MkdirTemp("", "reseal-fleet-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	defer func() { err = errors.Join(err, harness.RemoveBuilds()) }()
	var results []fleetsim.Result
	for text := range strings.SplitSeq(sizes, ",") {
		edges, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil || edges < 1 {
			return fmt.Errorf("-edges: %q is not a number of edges", text)
		}
		result, err := measure(ctx, dir, edges, size, idle)
		if err != nil {
			return errors.Join(err, table(results))
		}
		results = append(results, result)
	}
	return table(results)
}

func measure(ctx context.Context, dir string, edges int, size fleetsim.Size, idle time.Duration) (result fleetsim.Result, err error) {
	t := harness.NewCommand(dir)
	defer func() { err = errors.Join(err, t.End()) }()
	return result, t.Try(func() (err error) {
		trial := &fleetsim.Trial{
			Fleet: harness.NewShipped(t), Size: size, Edges: edges, Idle: idle, Log: t.Logf,
		}
		result, err = trial.Run(ctx)
		return err
	})
}

// rows are what the table tells, in its order.
var rows = []struct {
	name  string
	value func(fleetsim.Result) string
}{
	{"resident per edge after connect / after a rotation", func(r fleetsim.Result) string {
		return fmt.Sprintf("%s / %s", perEdge(r.Connected-r.Base, r), perEdge(r.Rotated-r.Base, r))
	}},
	{"goroutines per edge, their stacks", func(r fleetsim.Result) string {
		return fmt.Sprintf("%.1f, %.0f KB", r.Goroutines, r.Stacks/1000)
	}},
	{"idle CPU; reports of each edge", func(r fleetsim.Result) string {
		return fmt.Sprintf("%.3f s/s; %.0f B/s", r.Idle, r.IdleBytes)
	}},
	{"one-pool change acked by all, p99 / last", func(r fleetsim.Result) string { return seconds(r.AckP99, r.AckLast) }},
	{"CPU for that change; bytes per edge", func(r fleetsim.Result) string {
		return fmt.Sprintf("%s; %.0f", seconds(r.ChangeCPU), r.ChangeBytes)
	}},
	{"rotation: encrypts everywhere / coverage seen / CPU", func(r fleetsim.Result) string {
		return seconds(r.Encrypting, r.Covered, r.RotationCPU)
	}},
	{"first connect of all / CPU", func(r fleetsim.Result) string { return seconds(r.Connect, r.ConnectCPU) }},
	{"all back after a kill / down / CPU", func(r fleetsim.Result) string { return seconds(r.Back, r.Down, r.BackCPU) }},
	{"dials meanwhile, of them failed; refused while down", func(r fleetsim.Result) string {
		return fmt.Sprintf("%d, %d; %d", r.Return.Dials, r.Return.Failed, r.Return.Refused)
	}},
	{"full updates meanwhile; peak memory", func(r fleetsim.Result) string {
		return fmt.Sprintf("%d; %s", r.Return.Full, perEdge(r.Peak-r.Base, r))
	}},
}

func perEdge(bytes int64, r fleetsim.Result) string {
	return fmt.Sprintf("%d KB", bytes/int64(r.Edges)/1000)
}

func seconds(all ...time.Duration) string {
	var texts []string
	for _, d := range all {
		texts = append(texts, fmt.Sprintf("%.2f", d.Seconds()))
	}
	return strings.Join(texts, " / ") + " s"
}

func table(results []fleetsim.Result) error {
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	header := "edges"
	for _, r := range results {
		header += fmt.Sprintf("\t%d", r.Edges)
	}
	fmt.Fprintln(out, header)
	for _, row := range rows {
		line := row.name
		for _, r := range results {
			line += "\t" + row.value(r)
		}
		fmt.Fprintln(out, line)
	}
	return out.Flush()
}
