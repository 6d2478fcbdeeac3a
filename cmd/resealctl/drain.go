package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// drainPoll is the time between two looks at a draining edge.
const drainPoll = 500 * time.Millisecond

// drainRun is one run of drain.
type drainRun struct {
	*app
	client  *client
	edge    string
	undo    bool
	wait    bool
	timeout time.Duration
}

func newDrainCommand(a *app) *cobra.Command {
	d := &drainRun{app: a}
	cmd := &cobra.Command{
		Use:   "drain EDGE",
		Short: "Take an edge out of service, or put it back",
		Long: `Take an edge out of service: it tells its clients to go elsewhere (GOAWAY,
Connection: close), its /readyz fails, and after the timeout it closes what is
left. It stays out of service, whatever restarts, until --undo takes it back. An
edge that is not connected is told when it is.`,
		Example:           "  resealctl drain edge-1 --timeout 30s --wait\n  resealctl drain edge-1 --undo",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeEdges,
	}
	cmd.Flags().BoolVar(&d.undo, "undo", false, "take it back into service")
	cmd.Flags().BoolVar(&d.wait, "wait", false, "return when no client is left (with --undo: when it serves)")
	// In this command --timeout is the clients' time.
	cmd.Flags().DurationVar(&d.timeout, "timeout", 0, "how long clients may take (default each listener's timeouts.drain)")
	cmd.MarkFlagsMutuallyExclusive("undo", "timeout")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if d.timeout < 0 {
			return usagef("--timeout can't be negative")
		}
		d.edge = args[0]
		var err error
		if d.client, err = a.connect(); err != nil {
			return err
		}
		return d.run(cmd.Context())
	}
	return cmd
}

func (d *drainRun) run(ctx context.Context) error {
	request := &resealv1.DrainEdgeRequest{Id: d.edge, Undo: d.undo}
	if d.timeout > 0 {
		request.Timeout = durationpb.New(d.timeout)
	}
	answer, err := d.client.fleet.DrainEdge(ctx, request)
	if err != nil {
		if errors.Is(err, errNotFound) {
			return notFound("edge", d.edge)
		}
		return err
	}
	switch {
	case !answer.GetTold() && d.wait:
		return fmt.Errorf("edge %q is not connected; it is told when it is", d.edge)
	case !answer.GetTold():
		d.printf("edge/%s is not connected; it is told when it is\n", d.edge)
	case d.wait:
		return d.waitUntilDone(ctx)
	case d.undo:
		d.printf("edge/%s is taken back into service\n", d.edge)
	default:
		d.printf("edge/%s is draining\n", d.edge)
	}
	return nil
}

// waitUntilDone looks at the edge until it has no client, or serves again.
func (d *drainRun) waitUntilDone(ctx context.Context) error {
	// Listeners may allow long drains, so without --timeout the bound is wide.
	bound := 10 * time.Minute
	if d.timeout > 0 {
		bound = d.timeout + 15*time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	ticker := time.NewTicker(drainPoll)
	defer ticker.Stop()
	for {
		done, open, err := d.look(ctx)
		if done || err != nil && ctx.Err() == nil {
			return err
		}
		if d.terminal && err == nil {
			steer(d.err, fmt.Sprintf("\r%d client connections left \x1b[K", open))
		}
		select {
		case <-ctx.Done():
			d.clearProgress()
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return errInterrupted
			}
			return fmt.Errorf("edge %q still has %d client connections after %s", d.edge, open, bound)
		case <-ticker.C:
		}
	}
}

// clearProgress removes the line that shows it.
func (d *drainRun) clearProgress() {
	if d.terminal {
		steer(d.err, "\r\x1b[K")
	}
}

// look says whether the edge is where it should be, and how many client
// connections it has.
func (d *drainRun) look(ctx context.Context) (done bool, open int64, err error) {
	list, err := d.client.fleet.ListEdges(ctx, &resealv1.ListEdgesRequest{Id: d.edge})
	if err != nil {
		return false, 0, err
	}
	var edge *resealv1.Edge
	for _, e := range list.GetEdges() {
		if e.GetId() == d.edge {
			edge = e
		}
	}
	switch {
	case edge == nil || edge.GetState() == resealv1.Edge_STATE_DISCONNECTED:
		return false, 0, fmt.Errorf("edge %q is no longer connected", d.edge)
	case d.undo && !edge.GetDraining():
		d.printf("edge/%s is back in service\n", d.edge)
		return true, 0, nil
	case d.undo || !edge.GetDraining():
		return false, 0, nil
	}
	stats, err := d.client.tally.GetStats(ctx, &resealv1.GetStatsRequest{Edge: d.edge})
	if err != nil {
		return false, 0, err
	}
	for _, e := range stats.GetEdges() {
		if e.GetEdge() != d.edge {
			continue
		}
		for _, l := range e.GetListeners() {
			open += l.GetConnections().GetActive() + l.GetConnections().GetIdle()
		}
		if open == 0 && !e.GetStale() {
			d.clearProgress()
			d.printf("edge/%s is drained\n", d.edge)
			return true, 0, nil
		}
	}
	return false, open, nil
}
