package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// exitDiffers is the exit code of a diff that found something.
const exitDiffers = 1

func newDiffCommand(a *app) *cobra.Command {
	var flags changeFlags
	cmd := &cobra.Command{
		Use:   "diff -f FILE|DIR|-",
		Short: "Show what apply would change",
		Long: `Show what apply would change, as a unified diff. Of private keys it only says
that they change.

Exit codes: 0 nothing differs, 1 something differs, 2 it failed.`,
		Example: "  resealctl diff -f pools.yaml",
		Args:    cobra.NoArgs,
	}
	flags.registerFiles(cmd)
	flags.registerExpected(cmd)
	_ = cmd.MarkFlagRequired("filename")
	impact := registerImpact(cmd)
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if format.structured() && !*impact {
			return usagef("-o %s goes with --impact", format.value)
		}
		flags.dryRun = true
		objects, response, err := a.apply(cmd.Context(), flags)
		if err != nil {
			return &exitError{code: exitUsage, err: err}
		}
		a.warnLarge(response, flags)
		var would *resealv1.PreviewChangeResponse
		if *impact {
			if would, err = a.impact(cmd.Context(), flags, objects); err != nil {
				return &exitError{code: exitUsage, err: err}
			}
		}
		return a.printDiff(format, response, would)
	}
	return cmd
}

// printDiff writes a diff, and what it would do to the fleet unless would is nil.
func (a *app) printDiff(f *format, response *resealv1.ApplyResponse, would *resealv1.PreviewChangeResponse) error {
	differs := slices.ContainsFunc(response.GetChanges(), func(c *resealv1.Change) bool {
		return c.GetAction() != resealv1.Change_ACTION_UNCHANGED
	})
	if f.structured() {
		if err := a.printDocument(f, withImpact(response, would)); err != nil {
			return &exitError{code: exitUsage, err: err}
		}
	} else {
		a.printDiffs(response.GetChanges())
		if would != nil {
			a.printImpact(would)
		}
	}
	if differs {
		return &exitError{code: exitDiffers}
	}
	return nil
}

// printDiffs writes what each change does and says whether any does something.
func (a *app) printDiffs(changes []*resealv1.Change) bool {
	differs := false
	for _, c := range changes {
		if c.GetAction() == resealv1.Change_ACTION_UNCHANGED {
			continue
		}
		differs = true
		text := manifest.Diff(c.GetBefore(), c.GetAfter(), c.GetChangedSecrets()...)
		for line := range strings.Lines(text) {
			steer(a.out, a.coloured(resealv1.VisibleLines(strings.TrimRight(line, "\n")))+"\n")
		}
	}
	return differs
}

// coloured gives a line of a diff its colour on a terminal.
func (a *app) coloured(line string) string {
	if !a.colour() {
		return line
	}
	const (
		reset = "\x1b[0m"
		bold  = "\x1b[1m"
		red   = "\x1b[31m"
		green = "\x1b[32m"
		cyan  = "\x1b[36m"
	)
	switch {
	case strings.HasPrefix(line, "--- "), strings.HasPrefix(line, "+++ "):
		return bold + line + reset
	case strings.HasPrefix(line, "@@"):
		return cyan + line + reset
	case strings.HasPrefix(line, "-"):
		return red + line + reset
	case strings.HasPrefix(line, "+"):
		return green + line + reset
	}
	return line
}
