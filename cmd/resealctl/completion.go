package main

import (
	"context"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// completionTimeout bounds how long a shell waits for names.
const completionTimeout = 2 * time.Second

const noFiles = cobra.ShellCompDirectiveNoFileComp

// quietly answers a question of the shell: variables count, but warnings and
// errors would only disturb the line that is being typed.
func (a *app) quietly(cmd *cobra.Command, ask func(ctx context.Context, c *client) []string) []string {
	if a.readVariables(cmd) != nil {
		return nil
	}
	silent := &app{console: a.console, settings: a.settings}
	silent.err = io.Discard
	silent.settings.timeout = completionTimeout
	silent.noRenewal = true // nobody expects that a completion writes files
	client, err := silent.connect()
	if err != nil {
		return nil
	}
	defer silent.close()
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	return ask(ctx, client)
}

func startingWith(words []string, prefix string) []string {
	return slices.DeleteFunc(words, func(word string) bool { return !strings.HasPrefix(word, prefix) })
}

// completeKindsAndNames completes KIND NAME... and KIND/NAME.
func (a *app) completeKindsAndNames(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 && !strings.Contains(args[0], "/") {
		names := a.names(cmd, args[0])
		names = slices.DeleteFunc(names, func(name string) bool { return slices.Contains(args[1:], name) })
		return startingWith(names, typed), noFiles
	}
	if kind, _, found := strings.Cut(typed, "/"); found {
		names := a.names(cmd, kind)
		for i := range names {
			names[i] = kind + "/" + names[i]
		}
		return startingWith(names, typed), noFiles
	}
	words := kindWords()
	if cmd.Name() == "get" {
		words = append(words, kindAll)
	}
	return startingWith(words, typed), noFiles
}

// names are the names of all resources of a kind, or of the edges.
func (a *app) names(cmd *cobra.Command, word string) []string {
	kind, err := kindByName(word)
	if err != nil || kind == kindAll {
		return nil
	}
	return a.quietly(cmd, func(ctx context.Context, c *client) []string {
		var names []string
		if kind == kindEdges {
			list, _ := c.fleet.ListEdges(ctx, &resealv1.ListEdgesRequest{})
			for _, edge := range list.GetEdges() {
				names = append(names, edge.GetId())
			}
			return names
		}
		list, _ := c.admin.List(ctx, &resealv1.ListRequest{Kind: kind})
		for _, r := range list.GetResources() {
			names = append(names, r.GetMetadata().GetName())
		}
		return names
	})
}

func (a *app) completeEdges(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 && cmd.Name() == "drain" {
		return nil, noFiles
	}
	return startingWith(a.names(cmd, "edges"), typed), noFiles
}

func (a *app) completeStats(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return startingWith([]string{"pools", "listeners", "edges"}, typed), noFiles
	case 1:
		return startingWith(a.names(cmd, args[0]), typed), noFiles
	}
	return nil, noFiles
}

func (a *app) completeTokens(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	ids := a.quietly(cmd, func(ctx context.Context, c *client) []string {
		var ids []string
		list, _ := c.enrollment.ListTokens(ctx, &resealv1.ListTokensRequest{})
		for _, token := range list.GetTokens() {
			if !slices.Contains(args, token.GetTokenId()) {
				ids = append(ids, token.GetTokenId())
			}
		}
		return ids
	})
	return startingWith(ids, typed), noFiles
}

func (a *app) completeContexts(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if strings.HasSuffix(cmd.Name(), "-context") && len(args) > 0 || a.readVariables(cmd) != nil {
		return nil, noFiles
	}
	path, err := a.configPath()
	if err != nil {
		return nil, noFiles
	}
	silent := &app{console: a.console}
	silent.err = io.Discard
	file, err := silent.readContexts(path)
	if err != nil {
		return nil, noFiles
	}
	return startingWith(file.names(), typed), noFiles
}

// completeFields completes KIND.FIELD... step by step.
func (a *app) completeFields(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	const unfinished = noFiles | cobra.ShellCompDirectiveNoSpace
	if len(args) > 0 {
		return nil, noFiles
	}
	dot := strings.LastIndexByte(typed, '.')
	if dot < 0 {
		words := make([]string, len(resealv1.Kinds))
		for i, kind := range resealv1.Kinds {
			words[i] = strings.ToLower(kind)
		}
		return startingWith(words, typed), unfinished
	}
	doc, err := manifest.Explain(typed[:dot])
	if err != nil {
		return nil, noFiles
	}
	var words []string
	for _, field := range doc.Fields {
		words = append(words, typed[:dot+1]+field.Name)
	}
	return startingWith(words, typed), unfinished
}

func completeDeeds(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	var words []string
	switch len(args) {
	case 0:
		for _, d := range deeds {
			words = append(words, d.verbs...)
		}
	case 1:
		words = append(kindWords(), "history", "stats", "tokens", "users")
	}
	slices.Sort(words)
	return startingWith(slices.Compact(words), typed), noFiles
}
