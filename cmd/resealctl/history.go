package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newHistoryCommand(a *app) *cobra.Command {
	var (
		limit    int32
		revision int64
	)
	cmd := &cobra.Command{
		Use:     "history",
		Short:   "Show who changed what, when and why",
		Long:    "Show the kept revisions, newest first, or with --revision what one of them changed.",
		Example: "  resealctl history -n 5\n  resealctl history --revision 42",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().Int32VarP(&limit, "limit", "n", 20, "at most this many `revisions`, 0 for all that are kept")
	cmd.Flags().Int64Var(&revision, "revision", 0, "show what this `revision` changed")
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if limit < 0 || revision < 0 {
			return usagef("--limit and --revision can't be negative")
		}
		client, err := a.connect()
		if err != nil {
			return err
		}
		if revision > 0 {
			return a.showRevision(cmd.Context(), client, format, revision)
		}
		return a.listRevisions(cmd.Context(), client, format, limit)
	}
	return cmd
}

func (a *app) listRevisions(ctx context.Context, client *client, f *format, limit int32) error {
	list, err := client.admin.ListRevisions(ctx, &resealv1.ListRevisionsRequest{Limit: limit})
	if err != nil {
		return err
	}
	if f.structured() {
		views := make([]revisionView, len(list.GetRevisions()))
		for i, r := range list.GetRevisions() {
			if views[i], err = viewRevision(r, false); err != nil {
				return err
			}
		}
		return a.printDocument(f, map[string]any{"revisions": views})
	}
	if len(list.GetRevisions()) == 0 {
		a.warnf("No revisions yet.\n")
		return nil
	}
	t := newTable(a.out, "REVISION", "TIME", "AUTHOR", "MESSAGE", "CHANGES")
	for _, r := range list.GetRevisions() {
		t.add(fmt.Sprint(r.GetRevision()), stamp(r.GetTime()), orNone(r.GetAuthor()), revisionMessage(r), summarize(r.GetChanges()))
	}
	t.flush()
	return nil
}

func (a *app) showRevision(ctx context.Context, client *client, f *format, revision int64) error {
	list, err := client.admin.ListRevisions(ctx, &resealv1.ListRevisionsRequest{Revision: revision})
	if err != nil {
		return describeMissingRevision(err, revision)
	}
	if len(list.GetRevisions()) == 0 {
		return describeMissingRevision(&missingError{}, revision)
	}
	r := list.GetRevisions()[0]
	if f.structured() {
		view, err := viewRevision(r, true)
		if err != nil {
			return err
		}
		return a.printDocument(f, view)
	}
	d := describer{w: a.out}
	d.line(0, "Revision", fmt.Sprint(r.GetRevision()))
	d.line(0, "Time", ago(r.GetTime()))
	d.line(0, "Author", orNone(r.GetAuthor()))
	d.line(0, "Message", revisionMessage(r))
	d.line(0, "Changes", summarize(r.GetChanges()))
	if r.GetLargeChangeAllowed() {
		d.line(0, "Large change", "allowed by --allow-large-change")
	}
	d.flush()
	a.printf("\n")
	a.printDiffs(r.GetChanges())
	return nil
}

// describeMissingRevision says how to find the revisions that are kept.
func describeMissingRevision(err error, revision int64) error {
	if errors.Is(err, errNotFound) {
		return fmt.Errorf("revision %d is not kept: see resealctl history -n 0", revision)
	}
	return err
}

// revisionView is a revision as -o json and yaml show it.
type revisionView struct {
	Revision     int64  `json:"revision"`
	Time         string `json:"time"`
	Author       string `json:"author"`
	Message      string `json:"message"`
	RolledBackTo int64  `json:"rolledBackTo,omitempty"`
	// LargeChangeAllowed is set when the change needed --allow-large-change.
	LargeChangeAllowed bool `json:"largeChangeAllowed,omitempty"`
	// Rollout is what became of it on its way to the edges, if that is worth telling.
	Rollout string       `json:"rollout,omitempty"`
	Now     bool         `json:"now,omitempty"`
	Changes []changeView `json:"changes"`
}

func viewRevision(r *resealv1.Revision, resources bool) (revisionView, error) {
	view := revisionView{
		Revision: r.GetRevision(), Time: utcStamp(r.GetTime()), Author: r.GetAuthor(),
		Message: r.GetMessage(), RolledBackTo: r.GetRolledBackTo(), LargeChangeAllowed: r.GetLargeChangeAllowed(),
		Rollout: r.GetRollout(), Now: r.GetNow(), Changes: viewChanges(r.GetChanges()),
	}
	for i, c := range r.GetChanges() {
		if !resources {
			break
		}
		before, err := resourceJSON(c.GetBefore())
		if err != nil {
			return view, err
		}
		after, err := resourceJSON(c.GetAfter())
		if err != nil {
			return view, err
		}
		view.Changes[i].Before, view.Changes[i].After = &before, &after
	}
	return view, nil
}

func revisionMessage(r *resealv1.Revision) string {
	message := r.GetMessage()
	if to := r.GetRolledBackTo(); to > 0 {
		message = strings.TrimSpace(fmt.Sprintf("rollback to %d %s", to, message))
	}
	if r.GetNow() {
		message = strings.TrimSpace(message + " (--now)")
	}
	if text := r.GetRollout(); text != "" {
		message = strings.TrimSpace(message + " [" + printable(text) + "]")
	}
	return orNone(message)
}

// summarize names a single change, and counts several.
func summarize(changes []*resealv1.Change) string {
	if len(changes) == 1 {
		return refName(changes[0].GetResource()) + " " + resealv1.Label(changes[0].GetAction())
	}
	counts := make(map[resealv1.Change_Action]int)
	for _, c := range changes {
		counts[c.GetAction()]++
	}
	var parts []string
	for _, action := range []resealv1.Change_Action{resealv1.Change_ACTION_CREATED, resealv1.Change_ACTION_CONFIGURED,
		resealv1.Change_ACTION_DELETED, resealv1.Change_ACTION_UNCHANGED} {
		if n := counts[action]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, resealv1.Label(action)))
		}
	}
	return orNone(strings.Join(parts, ", "))
}

func newRollbackCommand(a *app) *cobra.Command {
	var (
		flags changeFlags
		to    int64
	)
	cmd := &cobra.Command{
		Use:   "rollback",
		Short: "Make the configuration what it was",
		Long: `Make the configuration what it was at a kept revision, as a new revision.
Without --to it undoes the newest revision. Private keys come back too. What
delete takes --allow-large-change for, rollback does too.`,
		Example: "  resealctl rollback --dry-run\n  resealctl rollback --to 42 -m 'the new pool is slow'",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().Int64Var(&to, "to", 0, "`revision` to go back to (default the one before the current)")
	flags.registerChange(cmd)
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if to < 0 {
			return usagef("--to can't be negative")
		}
		return a.rollback(cmd.Context(), format, flags, to)
	}
	return cmd
}

func (a *app) rollback(ctx context.Context, f *format, flags changeFlags, to int64) error {
	client, err := a.connect()
	if err != nil {
		return err
	}
	response, err := client.admin.Rollback(ctx, &resealv1.RollbackRequest{
		ToRevision:       to,
		ExpectedRevision: flags.expectedRevision,
		DryRun:           flags.dryRun,
		Message:          flags.message,
		Now:              flags.now,
		AllowLargeChange: flags.allowLarge,
	})
	if err != nil {
		if to == 0 {
			return err
		}
		return describeMissingRevision(err, to)
	}
	a.warnLarge(response, flags)
	if f.structured() {
		return a.printDocument(f, changesView{Revision: response.GetRevision(), RolledBackTo: response.GetRolledBackTo(),
			DryRun: flags.dryRun, Changes: viewChanges(response.GetChanges())})
	}
	if flags.dryRun {
		a.printDiffs(response.GetChanges())
	}
	a.printActions(response.GetChanges(), flags.dryRun)
	if flags.dryRun {
		a.printf("would roll back to revision %d (dry run: nothing was changed)\n", response.GetRolledBackTo())
		return nil
	}
	a.printf("rolled back to revision %d\nrevision %d\n", response.GetRolledBackTo(), response.GetRevision())
	return nil
}
