package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const diagnoseLong = `Say why a pool makes full TLS handshakes: how many more than needed, the main
reason with its evidence, and what to change.

One full handshake is needed for each endpoint on each edge; with sessions.scope:
pool, one for each edge; with sessions.sharing: fleet, one for each endpoint. Where
spec.tls.serverName is empty, each further host name needs as many again.`

// diagnoseRun is one run of diagnose.
type diagnoseRun struct {
	*app
	pool   string
	edge   string
	since  time.Duration
	format *format
}

func newDiagnoseCommand(a *app) *cobra.Command {
	d := &diagnoseRun{app: a}
	cmd := &cobra.Command{
		Use:               "diagnose pool NAME",
		Short:             "Say why a pool makes full handshakes and what to change",
		Long:              diagnoseLong,
		Example:           "  resealctl diagnose pool jetty\n  resealctl diagnose pool jetty --since 5m -o json",
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: a.completeDiagnose,
	}
	cmd.Flags().DurationVar(&d.since, "since", 0, "only this far back, at most 1h (default since each edge's start)")
	cmd.Flags().StringVar(&d.edge, "edge", "", "only this edge")
	_ = cmd.RegisterFlagCompletionFunc("edge", a.completeEdges)
	d.format = registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := d.parse(args); err != nil {
			return err
		}
		client, err := a.connect()
		if err != nil {
			return err
		}
		return d.run(cmd.Context(), client)
	}
	return cmd
}

func (a *app) completeDiagnose(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return startingWith([]string{"pool"}, typed), noFiles
	case 1:
		return startingWith(a.names(cmd, "pool"), typed), noFiles
	}
	return nil, noFiles
}

func (d *diagnoseRun) parse(args []string) error {
	if len(args) == 1 {
		kind, name, found := strings.Cut(args[0], "/")
		if !found || name == "" {
			return usagef("name a pool: diagnose pool NAME")
		}
		args = []string{kind, name}
	}
	if kind, err := kindByName(args[0]); err != nil || kind != "BackendPool" {
		return usagef("only pools can be diagnosed, not %q", args[0])
	}
	if d.since < 0 || d.since > maxSince {
		return usagef("--since must be between 0 and %s", configured(durationpb.New(maxSince)))
	}
	d.pool = args[1]
	return nil
}

func (d *diagnoseRun) run(ctx context.Context, client *client) error {
	ref := &resealv1.ResourceRef{Kind: "BackendPool", Name: d.pool}
	pool, err := client.admin.Get(ctx, &resealv1.GetRequest{Resource: ref})
	if err != nil {
		return describeMissing(err, ref)
	}
	request := &resealv1.GetStatsRequest{Name: d.pool, Edge: d.edge}
	since := ""
	if d.since > 0 {
		request.Since = durationpb.New(d.since)
		since = configured(request.Since)
	}
	stats, err := client.tally.GetStats(ctx, request)
	if err != nil {
		return err
	}
	d.noteGaps(stats, d.since)
	result := diagnose(d.pool, since, pool.GetResource().GetBackendPool(), stats)
	if d.format.structured() {
		return d.printDocument(d.format, result)
	}
	d.print(result)
	return nil
}

func (d *diagnoseRun) print(result *diagnosis) {
	d.paragraph("", strings.Join(result.Sentences, " "))
	if len(result.Reasons) > 0 {
		d.printf("\n")
		t := newTable(d.out, "WHY FULL", "COUNT", "NEEDED", "SHARE", "EDGES")
		for _, r := range result.Reasons {
			t.add(r.Reason, fmt.Sprint(r.Count), fmt.Sprint(r.Needed), percent(r.Count, max(result.Full, r.Count))+"%", counted0(r.Edges))
		}
		t.flush()
	}
	if len(result.Closes) > 0 {
		d.printf("\n")
		t := newTable(d.out, "CLOSED BY", "COUNT", "EDGES", "MEANS")
		for _, c := range result.Closes {
			t.add(c.Kind, fmt.Sprint(c.Count), counted0(c.Edges), c.Meaning)
		}
		t.flush()
	}
	d.printOthers(result)
}

// printOthers explains the reasons besides the main one.
func (d *diagnoseRun) printOthers(result *diagnosis) {
	first := true
	for _, r := range result.Reasons {
		if r.Reason == result.MainReason || r.Excess == 0 {
			continue
		}
		if first {
			d.printf("\nThe other reasons:\n")
			first = false
		}
		d.printf("  %s\n", r.Reason)
		d.paragraph("    ", r.Meaning+" "+r.Advice)
	}
}
