package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const fleetStatusLong = `Show the replicas of the control plane, the room in its store, and how many edges
stand where. What does not work, or will not for long, is named under "Problems".`

// fleetStatus is the state of a fleet as -o json and yaml show it.
type fleetStatus struct {
	AnsweredBy string         `json:"answeredBy"`
	Leader     string         `json:"leader"`
	Store      storeView      `json:"store"`
	Replicas   []replicaView  `json:"replicas"`
	Edges      map[string]int `json:"edges"`
	// Draining are the edges that are out of service by order.
	Draining []string `json:"draining"`
	Problems []string `json:"problems"`
}

type storeView struct {
	Embedded   bool   `json:"embedded"`
	SizeBytes  int64  `json:"sizeBytes"`
	UsedBytes  int64  `json:"usedBytes"`
	QuotaBytes int64  `json:"quotaBytes"`
	Problem    string `json:"problem,omitempty"`
}

type replicaView struct {
	ID        string `json:"id"`
	State     string `json:"state"`
	Address   string `json:"address"`
	Version   string `json:"version"`
	StartedAt string `json:"startedAt,omitempty"`
	Edges     int32  `json:"edges"`
	Problem   string `json:"problem,omitempty"`

	uptime string
}

func newFleetStatusCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show the control plane's replicas, its store and the edges",
		Long:    fleetStatusLong,
		Example: "  resealctl status\n  resealctl status -o json",
		Args:    cobra.NoArgs,
	}
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		client, err := a.connect()
		if err != nil {
			return err
		}
		status, err := client.status(cmd.Context())
		if err != nil {
			return err
		}
		if format.structured() {
			return a.printDocument(format, status)
		}
		a.printStatus(status)
		return nil
	}
	return cmd
}

// status asks for all that there is to say.
func (c *client) status(ctx context.Context) (*fleetStatus, error) {
	list, err := c.fleet.ListReplicas(ctx, &resealv1.ListReplicasRequest{})
	if err != nil {
		return nil, err
	}
	edges, err := c.fleet.ListEdges(ctx, &resealv1.ListEdgesRequest{})
	if err != nil {
		return nil, err
	}
	keyrings, err := resealv1.NewKeyringServiceClient(c.conn).Status(ctx, &resealv1.StatusRequest{})
	if err != nil {
		return nil, err
	}
	store := list.GetStore()
	status := &fleetStatus{
		AnsweredBy: list.GetAnsweredBy(), Leader: keyrings.GetLeader(),
		Store:    storeView{store.GetEmbedded(), store.GetSizeBytes(), store.GetUsedBytes(), store.GetQuotaBytes(), store.GetProblem()},
		Replicas: []replicaView{}, Edges: map[string]int{}, Draining: []string{}, Problems: []string{},
	}
	var drifted []string
	for _, e := range edges.GetEdges() {
		status.Edges[resealv1.Label(e.GetState())]++
		if e.GetDraining() {
			status.Draining = append(status.Draining, e.GetId())
		}
		if e.GetDrifted() {
			drifted = append(drifted, e.GetId())
		}
	}
	if len(drifted) > 0 {
		status.Problems = append(status.Problems, fmt.Sprintf("edges that serve something else than they acked, and are sent it again: %s", joinSome(drifted, 10)))
	}
	if store.GetProblem() != "" {
		status.Problems = append(status.Problems, "store: "+store.GetProblem())
	}
	for _, r := range list.GetReplicas() {
		status.Replicas = append(status.Replicas, replicaView{
			ID: r.GetId(), State: resealv1.Label(r.GetState()), Address: r.GetAddress(), Version: r.GetVersion(),
			StartedAt: utcStamp(r.GetStartedAt()), Edges: r.GetEdges(), Problem: r.GetProblem(), uptime: age(r.GetStartedAt()),
		})
		if r.GetProblem() != "" && r.GetProblem() != store.GetProblem() {
			status.Problems = append(status.Problems, fmt.Sprintf("replica %s: %s", r.GetId(), r.GetProblem()))
		}
	}
	if keyrings.GetLeader() == "" {
		status.Problems = append(status.Problems, "keyrings: no replica rotates them now")
	}
	for _, k := range keyrings.GetKeyrings() {
		if k.GetProblem() != "" {
			status.Problems = append(status.Problems, fmt.Sprintf("keyring %s: %s", k.GetName(), k.GetProblem()))
		}
	}
	return status, nil
}

func (a *app) printStatus(status *fleetStatus) {
	d := describer{w: a.out}
	d.line(0, "Store", storeText(status.Store))
	d.line(0, "Edges", edgeCounts(status.Edges))
	if len(status.Draining) > 0 {
		d.line(0, "Draining", joinSome(status.Draining, 10))
	}
	d.line(0, "Leader", orNone(status.Leader))
	if len(status.Problems) > 0 {
		d.heading(0, "Problems")
		for _, problem := range status.Problems {
			d.text(1, problem)
		}
	}
	d.flush()
	a.printf("\n")
	t := newTable(a.out, "REPLICA", "STATE", "EDGES", "VERSION", "UPTIME", "ADDRESS")
	for _, r := range status.Replicas {
		t.add(r.ID, strings.ToUpper(r.State), fmt.Sprint(r.Edges), orNone(r.Version), r.uptime, r.Address)
	}
	t.flush()
}

// storeText says how much of the store is used.
func storeText(s storeView) string {
	where := "external etcd"
	if s.Embedded {
		where = "embedded"
	}
	switch {
	case s.SizeBytes == 0:
		return where + ", size unknown"
	case s.QuotaBytes == 0:
		return fmt.Sprintf("%s, %s", where, bytesText(s.SizeBytes))
	}
	return fmt.Sprintf("%s, %s of %s (%.0f%%), %s in use", where, bytesText(s.SizeBytes), bytesText(s.QuotaBytes),
		100*float64(s.SizeBytes)/float64(s.QuotaBytes), bytesText(s.UsedBytes))
}

// edgeCounts is "3 live: 2 synced, 1 refused".
func edgeCounts(counts map[string]int) string {
	total := 0
	var parts []string
	for state, n := range counts {
		total += n
		parts = append(parts, fmt.Sprintf("%d %s", n, state))
	}
	if total == 0 {
		return "none"
	}
	slices.Sort(parts)
	return fmt.Sprintf("%d live: %s", total, strings.Join(parts, ", "))
}

func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
