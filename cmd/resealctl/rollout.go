package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newRolloutCommand(a *app) *cobra.Command {
	return newGroupCommand("rollout", "Watch and steer a change on its way to the edges", `Every change goes to the edges in stages: first to few, then to more, then to
all. A stage must prove itself before the next one begins; when edges refuse the
change, crash with it or do worse, it is stopped and undone by itself. What the
stages are, a RolloutPolicy says (resealctl explain rolloutpolicy).`,
		newRolloutStatusCommand(a),
		newRolloutVerb(a, "pause", "Hold a change where it is, and further ones behind it", true,
			func(ctx context.Context, c *client, reason string) (*resealv1.Rollout, error) {
				answer, err := c.fleet.PauseRollout(ctx, &resealv1.PauseRolloutRequest{Reason: reason})
				return answer.GetRollout(), err
			}),
		newRolloutVerb(a, "resume", "Let a change go on, one that was undone from the first stage", false,
			func(ctx context.Context, c *client, _ string) (*resealv1.Rollout, error) {
				answer, err := c.fleet.ResumeRollout(ctx, &resealv1.ResumeRolloutRequest{})
				return answer.GetRollout(), err
			}),
		newRolloutVerb(a, "undo", "Take a change back from the edges that have it", true,
			func(ctx context.Context, c *client, reason string) (*resealv1.Rollout, error) {
				answer, err := c.fleet.UndoRollout(ctx, &resealv1.UndoRolloutRequest{Reason: reason})
				return answer.GetRollout(), err
			}),
	)
}

func newRolloutStatusCommand(a *app) *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show how far the newest change has come",
		Long:    "Show how far the newest change has come, with -w until it has gone to all edges, or was stopped.\nWith -w it fails when the change was stopped.",
		Example: "  resealctl rollout status\n  resealctl rollout status -w",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show every step until the change is through or stopped")
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		client, err := a.connect()
		if err != nil {
			return err
		}
		if watch {
			return untilInterrupted(a.watchRollout(cmd.Context(), client, format))
		}
		answer, err := client.fleet.GetRollout(cmd.Context(), &resealv1.GetRolloutRequest{})
		if err != nil {
			return err
		}
		return a.printRollout(format, answer.GetRollout())
	}
	return cmd
}

func newRolloutVerb(a *app, verb, short string, reasoned bool, do func(context.Context, *client, string) (*resealv1.Rollout, error)) *cobra.Command {
	var reason string
	cmd := &cobra.Command{Use: verb, Short: short, Args: cobra.NoArgs}
	if reasoned {
		cmd.Flags().StringVarP(&reason, "message", "m", "", "why, for the status")
	}
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		client, err := a.connect()
		if err != nil {
			return err
		}
		rollout, err := do(cmd.Context(), client, reason)
		if err != nil {
			return err
		}
		return a.printRollout(format, rollout)
	}
	return cmd
}

func (a *app) watchRollout(ctx context.Context, client *client, f *format) error {
	stream, err := client.fleet.WatchRollout(ctx, &resealv1.WatchRolloutRequest{})
	if err != nil {
		return err
	}
	last := ""
	for {
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		r := answer.GetRollout()
		if f.structured() {
			err = a.printDocument(f, viewRollout(r))
		} else if line := rolloutLine(r); line != last {
			a.printf("%s\n", line)
			last = line
		}
		if err != nil {
			return err
		}
		if r.GetNewestRevision() > r.GetCandidateRevision() {
			continue // its turn is yet to come
		}
		switch r.GetPhase() {
		case resealv1.Rollout_PHASE_DONE:
			return nil
		case resealv1.Rollout_PHASE_HALTED, resealv1.Rollout_PHASE_UNDONE:
			return fmt.Errorf("revision %d is %s: %s", r.GetCandidateRevision(), resealv1.Label(r.GetPhase()), printable(r.GetReason()))
		}
	}
}

// rolloutLine says in one line where a rollout stands.
func rolloutLine(r *resealv1.Rollout) string {
	line := fmt.Sprintf("revision %d %s", r.GetCandidateRevision(), resealv1.Label(r.GetPhase()))
	if r.GetPhase() == resealv1.Rollout_PHASE_RUNNING {
		line += fmt.Sprintf(", stage %s, on %d of %d edges", rolloutStage(r), r.GetMoved(), r.GetEdges())
		if waits := r.GetWaitingFor(); len(waits) > 0 {
			line += ", waits for " + printable(strings.Join(waits, "; "))
		}
	}
	if r.GetReason() != "" {
		line += ": " + printable(r.GetReason())
	}
	return line
}

// rolloutStage is "2/3 (10%)".
func rolloutStage(r *resealv1.Rollout) string {
	stage, stages := int(r.GetStage()), r.GetStages()
	if stage < 1 || stage > len(stages) {
		return "<none>"
	}
	return fmt.Sprintf("%d/%d (%s)", stage, len(stages), stages[stage-1])
}

// rolloutView is a rollout as -o json and yaml show it.
type rolloutView struct {
	Phase             string   `json:"phase"`
	BaseRevision      int64    `json:"baseRevision"`
	CandidateRevision int64    `json:"candidateRevision"`
	NewestRevision    int64    `json:"newestRevision"`
	Stage             int32    `json:"stage"`
	Stages            []string `json:"stages"`
	Moved             int32    `json:"moved"`
	Edges             int32    `json:"edges"`
	MovedEdges        []string `json:"movedEdges"`
	StartedAt         string   `json:"startedAt,omitempty"`
	EnteredAt         string   `json:"enteredAt,omitempty"`
	NextAt            string   `json:"nextAt,omitempty"`
	Reason            string   `json:"reason,omitempty"`
	By                string   `json:"by,omitempty"`
	Now               bool     `json:"now"`
	WaitingFor        []string `json:"waitingFor"`
	Leader            string   `json:"leader,omitempty"`
}

func viewRollout(r *resealv1.Rollout) rolloutView {
	list := func(texts []string) []string { return append([]string{}, texts...) }
	return rolloutView{
		Phase: resealv1.Label(r.GetPhase()), BaseRevision: r.GetBaseRevision(), CandidateRevision: r.GetCandidateRevision(),
		NewestRevision: r.GetNewestRevision(), Stage: r.GetStage(), Stages: list(r.GetStages()), Moved: r.GetMoved(), Edges: r.GetEdges(),
		MovedEdges: list(r.GetMovedEdges()), StartedAt: utcStamp(r.GetStartedAt()), EnteredAt: utcStamp(r.GetEnteredAt()),
		NextAt: utcStamp(r.GetNextAt()), Reason: r.GetReason(), By: r.GetBy(), Now: r.GetNow(), WaitingFor: list(r.GetWaitingFor()), Leader: r.GetLeader(),
	}
}

func (a *app) printRollout(f *format, r *resealv1.Rollout) error {
	if f.structured() {
		return a.printDocument(f, viewRollout(r))
	}
	d := describer{w: a.out}
	d.line(0, "Phase", strings.ToUpper(resealv1.Label(r.GetPhase())))
	if r.GetReason() != "" {
		d.line(0, "Reason", printable(r.GetReason()))
	}
	d.line(0, "Candidate", fmt.Sprint(r.GetCandidateRevision()))
	d.line(0, "Base", fmt.Sprint(r.GetBaseRevision()))
	if r.GetNewestRevision() != r.GetCandidateRevision() {
		d.line(0, "Newest", fmt.Sprintf("%d, waits for its turn", r.GetNewestRevision()))
	}
	d.line(0, "Stage", rolloutStage(r))
	d.line(0, "Edges", fmt.Sprintf("%d of %d have the candidate", r.GetMoved(), r.GetEdges()))
	if names := r.GetMovedEdges(); len(names) > 0 {
		d.line(0, "On", printable(joinSome(names, 20)))
	}
	d.line(0, "By", orNone(printable(r.GetBy())))
	d.line(0, "Since", ago(r.GetEnteredAt()))
	if next := r.GetNextAt(); next != nil {
		d.line(0, "Next", nextStage(next))
	}
	for _, text := range r.GetWaitingFor() {
		d.line(0, "Waits for", printable(text))
	}
	d.flush()
	return nil
}

// nextStage is when the next stage begins, at the earliest.
func nextStage(at *timestamppb.Timestamp) string {
	if left := time.Until(at.AsTime()); left > 0 {
		return "in " + shortDuration(left)
	}
	return "at once"
}
