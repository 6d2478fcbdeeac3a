package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newTopCommand(a *app) *cobra.Command {
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show rates of pools and edges as they change",
		Long: `Show requests, handshakes and errors per second of every pool, listener and edge,
again and again until Ctrl-C. When the output is not a terminal: once.`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().DurationVar(&interval, "interval", 2*time.Second, "time over which rates are measured")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if interval < 100*time.Millisecond {
			return usagef("--interval must be at least 100ms")
		}
		client, err := a.connect()
		if err != nil {
			return err
		}
		t := &topRun{app: a, client: client, interval: interval}
		return untilInterrupted(t.run(cmd.Context()))
	}
	return cmd
}

// topRun compares each sample with the one before.
type topRun struct {
	*app
	client   *client
	interval time.Duration
}

// sample is the fleet at one time.
type sample struct {
	at    time.Time
	stats *resealv1.GetStatsResponse
	edges []*resealv1.Edge
}

func (t *topRun) run(ctx context.Context) error {
	before, err := t.sample(ctx)
	if err != nil {
		return err
	}
	if t.terminal {
		t.redraw(t.draw(before, before))
	}
	ticker := time.NewTicker(t.interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now, err := t.sample(ctx)
		switch {
		case err != nil && (!t.terminal || errors.Is(err, errInterrupted)):
			return err
		case err != nil:
			// A screen that is left open outlives a restarted control plane.
			t.redraw(append(t.draw(before, before), "\n"+err.Error()+"\n"...))
			continue
		}
		frame := t.draw(before, now)
		if !t.terminal {
			t.noteGaps(now.stats, 0)
			_, err := t.out.Write(frame)
			return err
		}
		t.redraw(frame)
		before = now
	}
}

func (t *topRun) sample(ctx context.Context) (*sample, error) {
	stats, err := t.client.tally.GetStats(ctx, &resealv1.GetStatsRequest{})
	if err != nil {
		return nil, err
	}
	edges, err := t.client.fleet.ListEdges(ctx, &resealv1.ListEdgesRequest{})
	if err != nil {
		return nil, err
	}
	return &sample{at: time.Now(), stats: stats, edges: edges.GetEdges()}, nil
}

// redraw replaces the screen's content in one write, so that it does not flicker.
func (t *topRun) redraw(frame []byte) {
	const home, clearLine, clearBelow = "\x1b[H", "\x1b[K\n", "\x1b[J"
	steer(t.out, home+strings.ReplaceAll(resealv1.VisibleLines(string(frame)), "\n", clearLine)+clearBelow)
}

// draw writes a frame.
func (t *topRun) draw(before, now *sample) []byte {
	var frame bytes.Buffer
	elapsed := now.at.Sub(before.at).Seconds()
	fmt.Fprintf(&frame, "%s   %s   rates over %s\n\n", now.at.Local().Format(time.TimeOnly), t.client.target, t.interval)
	drawRates(&frame, "POOL", before.stats.GetPools(), now.stats.GetPools(), elapsed)
	frame.WriteByte('\n')
	drawRates(&frame, "LISTENER", before.stats.GetListeners(), now.stats.GetListeners(), elapsed)
	frame.WriteByte('\n')
	t.drawEdges(&frame, before, now, elapsed)
	if stale := now.stats.GetStaleEdges(); len(stale) > 0 && t.terminal {
		fmt.Fprintf(&frame, "\nNo new report from %s; their newest one is counted.\n", joinSome(stale, 10))
	}
	return frame.Bytes()
}

func drawRates(frame *bytes.Buffer, what string, before, now []*resealv1.Stats, elapsed float64) {
	old := make(map[string]*resealv1.Stats)
	for _, s := range before {
		old[s.GetName()] = s
	}
	table := newTable(frame, what, "REQUESTS/S", "FULL/S", "RESUMED/S", "RESUMED", "OPENED/S", "ERRORS/S", "ACTIVE", "IDLE")
	for _, s := range now {
		o := old[s.GetName()]
		table.add(s.GetName(),
			rate(o.GetRequests(), s.GetRequests(), elapsed),
			rate(o.GetHandshakes().GetFull(), s.GetHandshakes().GetFull(), elapsed),
			rate(resumedTotal(o.GetHandshakes()), resumedTotal(s.GetHandshakes()), elapsed),
			resumedText(s.GetHandshakes()),
			rate(o.GetConnections().GetOpened(), s.GetConnections().GetOpened(), elapsed),
			rate(total(o.GetErrors()), total(s.GetErrors()), elapsed),
			fmt.Sprint(s.GetConnections().GetActive()), fmt.Sprint(s.GetConnections().GetIdle()))
	}
	table.flush()
}

func (t *topRun) drawEdges(frame *bytes.Buffer, before, now *sample, elapsed float64) {
	old, current := sumByEdge(before.stats), sumByEdge(now.stats)
	table := newTable(frame, "EDGE", "STATE", "REVISION", "REQUESTS/S", "FULL/S", "RESUMED/S", "ERRORS/S", "REASON")
	for _, e := range now.edges {
		o, s := old[e.GetId()], current[e.GetId()]
		table.add(e.GetId(), edgeState(e), edgeRevision(e),
			rate(o.requests, s.requests, elapsed), rate(o.full, s.full, elapsed),
			rate(o.resumed, s.resumed, elapsed), rate(o.errors, s.errors, elapsed), edgeReason(e))
	}
	table.flush()
}

// edgeSum is an edge's traffic: requests as clients see them, handshakes and
// errors of the backend leg.
type edgeSum struct{ requests, full, resumed, errors uint64 }

func sumByEdge(stats *resealv1.GetStatsResponse) map[string]edgeSum {
	sums := make(map[string]edgeSum)
	for _, edge := range stats.GetEdges() {
		var sum edgeSum
		for _, l := range edge.GetListeners() {
			sum.requests += l.GetRequests()
		}
		for _, p := range edge.GetPools() {
			sum.full += p.GetHandshakes().GetFull()
			sum.resumed += resumedTotal(p.GetHandshakes())
			sum.errors += total(p.GetErrors())
		}
		sums[edge.GetEdge()] = sum
	}
	return sums
}

// rate is the growth per second. Counters fall when an edge starts again; what
// they lost is not a rate.
func rate(before, now uint64, elapsed float64) string {
	if now <= before || elapsed <= 0 {
		return "0"
	}
	perSecond := float64(now-before) / elapsed
	if perSecond < 10 {
		return fmt.Sprintf("%.1f", perSecond)
	}
	return fmt.Sprintf("%.0f", perSecond)
}
