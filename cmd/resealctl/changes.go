package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// changeFlags are the flags of commands that change resources.
type changeFlags struct {
	files            []string
	dryRun           bool
	message          string
	allowLarge       bool
	expectedRevision int64
	now              bool
}

func (f *changeFlags) registerFiles(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&f.files, "filename", "f", nil, "manifest: `file`, directory, or - for standard input; may be given several times")
	_ = cmd.MarkFlagFilename("filename", "yaml", "yml", "json")
}

func (f *changeFlags) registerChange(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "check and report, but change nothing")
	cmd.Flags().StringVarP(&f.message, "message", "m", "", "why, for the history")
	cmd.Flags().BoolVar(&f.now, "now", false, "shorten each stage of the rollout to 2s; the first stage and the gates stay")
	cmd.Flags().BoolVar(&f.allowLarge, "allow-large-change", false, "the change may remove much, or leave a resource to no edge")
	f.registerExpected(cmd)
}

func (f *changeFlags) registerExpected(cmd *cobra.Command) {
	cmd.Flags().Int64Var(&f.expectedRevision, "expected-revision", 0, "fail unless the configuration is at this `revision`")
}

func newApplyCommand(a *app) *cobra.Command {
	var flags changeFlags
	cmd := &cobra.Command{
		Use:   "apply -f FILE|DIR|-",
		Short: "Create and change resources",
		Long: `Create and change resources as manifests say. All of them change at one
revision, or none does. Resources that no manifest names stay as they are.

A change that leaves a resource to none of the live edges, by its edgeSelector,
is refused without --allow-large-change.`,
		Example: "  resealctl apply -f pools.yaml -m 'add a second endpoint'\n  resealctl apply -f deploy/ --dry-run",
		Args:    cobra.NoArgs,
	}
	flags.registerFiles(cmd)
	flags.registerChange(cmd)
	_ = cmd.MarkFlagRequired("filename")
	format := registerFormat(cmd, "table", "name", "json", "yaml")
	impact := registerImpact(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *impact && !flags.dryRun {
			return usagef("--impact goes with --dry-run")
		}
		objects, response, err := a.apply(cmd.Context(), flags)
		if err != nil {
			return err
		}
		var would *resealv1.PreviewChangeResponse
		if *impact {
			if would, err = a.impact(cmd.Context(), flags, objects); err != nil {
				return err
			}
		}
		for _, v := range response.GetWarnings() {
			a.warnf("Warning: a stored resource that this leaves as it is breaks a rule, and edges may hold it back: %s\n", printable(v.Text()))
		}
		a.warnLarge(response, flags)
		if would != nil && format.structured() {
			return a.printDocument(format, withImpact(response, would))
		}
		if err := a.printChanges(format, response.GetChanges(), response.GetRevision(), flags.dryRun); err != nil {
			return err
		}
		if would != nil && format.value != "name" {
			a.printImpact(would)
		}
		return nil
	}
	return cmd
}

// warnLarge says of a dry run what would need a word.
func (a *app) warnLarge(response interface{ GetLargeChange() []string }, flags changeFlags) {
	if !flags.dryRun || flags.allowLarge {
		return
	}
	for _, reason := range response.GetLargeChange() {
		a.warnf("Warning: this is a large change, which needs --allow-large-change: %s\n", printable(reason))
	}
}

// apply loads manifests and applies them. What the control plane refuses is
// named with its place in the files.
func (a *app) apply(ctx context.Context, flags changeFlags) ([]manifest.Object, *resealv1.ApplyResponse, error) {
	objects, err := a.load(manifest.Load, flags.files)
	if err != nil {
		return nil, nil, a.withReferences(ctx, objects, err)
	}
	client, err := a.connect()
	if err != nil {
		return nil, nil, err
	}
	request := &resealv1.ApplyRequest{
		ExpectedRevision: flags.expectedRevision,
		DryRun:           flags.dryRun,
		Message:          flags.message,
		Now:              flags.now,
		AllowLargeChange: flags.allowLarge,
	}
	for _, object := range objects {
		request.Resources = append(request.Resources, object.Resource)
	}
	response, err := client.admin.Apply(ctx, request)
	return objects, response, located(objects, err)
}

// referencesTimeout bounds the question that withReferences asks: what is wrong
// with the files is already known.
const referencesTimeout = 3 * time.Second

// withReferences adds to the errors of manifests what the control plane has to say
// about the resources that are sound, such as names that lead nowhere, so that
// everything can be mended at once. That is all it adds: without a control plane
// the errors stand alone.
func (a *app) withReferences(ctx context.Context, sound []manifest.Object, err error) error {
	var found manifest.Errors
	if !errors.As(err, &found) || len(sound) == 0 {
		return err
	}
	var broken []string // as violations write them
	for _, e := range found {
		kind, name, ok := strings.Cut(e.Resource, "/")
		if !ok {
			return err // who knows what else the file should have held
		}
		broken = append(broken, fmt.Sprintf("%s %q", kind, name))
	}
	client, connectErr := a.connect()
	if connectErr != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, referencesTimeout)
	defer cancel()
	request := &resealv1.ApplyRequest{DryRun: true}
	for _, object := range sound {
		request.Resources = append(request.Resources, object.Resource)
	}
	_, applyErr := client.admin.Apply(ctx, request)
	var refused *refusedError
	if !errors.As(applyErr, &refused) {
		return err
	}
	about := slices.DeleteFunc(refused.violations, func(v *resealv1.Violation) bool {
		ofBroken := func(name string) bool { return strings.Contains(v.GetDescription(), name) }
		return v.GetResource() == nil || slices.ContainsFunc(broken, ofBroken)
	})
	return errors.Join(err, manifest.Locate(sound, about))
}

// located gives violations their place in the files.
func located(objects []manifest.Object, err error) error {
	var refused *refusedError
	if !errors.As(err, &refused) {
		return err
	}
	other := &refusedError{}
	var placed []*resealv1.Violation
	for _, violation := range refused.violations {
		if violation.GetResource() == nil {
			other.violations = append(other.violations, violation)
		} else {
			placed = append(placed, violation)
		}
	}
	err = manifest.Locate(objects, placed)
	if len(other.violations) > 0 {
		err = errors.Join(err, other)
	}
	return err
}

// loader is manifest.Load or manifest.LoadNames.
type loader func(paths []string, stdin io.Reader) ([]manifest.Object, error)

func newDeleteCommand(a *app) *cobra.Command {
	var (
		flags         changeFlags
		ignoreMissing bool
	)
	cmd := &cobra.Command{
		Use:   "delete -f FILE|DIR|- | KIND NAME...",
		Short: "Delete resources",
		Long: `Delete resources, named by manifests or by kind and name. All of them must
exist, and nothing that stays may refer to them; otherwise nothing is deleted.

To delete more than 10 resources that are more than half of all, or all of a
kind, takes --allow-large-change.`,
		Example:           "  resealctl delete -f pools.yaml\n  resealctl delete route api web\n  resealctl delete route/api backendpool/api",
		ValidArgsFunction: a.completeKindsAndNames,
	}
	flags.registerFiles(cmd)
	flags.registerChange(cmd)
	cmd.Flags().BoolVar(&ignoreMissing, "ignore-not-found", false, "resources that do not exist are not an error")
	format := registerFormat(cmd, "table", "name", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		refs, objects, err := a.refsToDelete(flags.files, args)
		if err != nil {
			return err
		}
		return a.delete(cmd.Context(), format, flags, refs, objects, ignoreMissing)
	}
	return cmd
}

// refsToDelete reads what is named, by manifests or by arguments.
func (a *app) refsToDelete(files, args []string) ([]*resealv1.ResourceRef, []manifest.Object, error) {
	var refs []*resealv1.ResourceRef
	switch {
	case len(files) > 0 && len(args) > 0:
		return nil, nil, usagef("either -f or KIND NAME..., not both")
	case len(files) > 0:
		objects, err := a.load(manifest.LoadNames, files)
		for _, object := range objects {
			refs = append(refs, object.Resource.Ref())
		}
		return refs, objects, err
	}
	selection, err := parseSelection(args)
	if err != nil {
		return nil, nil, err
	}
	for _, kind := range selection.kinds {
		names := selection.names[kind]
		switch {
		case kind == kindEdges:
			return nil, nil, usagef("edges are not resources: to take one out of service, use: resealctl drain EDGE")
		case len(names) == 0:
			return nil, nil, usagef("name what to delete: resealctl delete %s NAME...", strings.ToLower(kind))
		}
		for _, name := range names {
			refs = append(refs, &resealv1.ResourceRef{Kind: kind, Name: name})
		}
	}
	return refs, nil, nil
}

func (a *app) delete(ctx context.Context, f *format, flags changeFlags, refs []*resealv1.ResourceRef, objects []manifest.Object, ignoreMissing bool) error {
	client, err := a.connect()
	if err != nil {
		return err
	}
	if ignoreMissing {
		if refs, err = client.existing(ctx, refs); err != nil || len(refs) == 0 {
			return err
		}
	}
	response, err := client.admin.Delete(ctx, &resealv1.DeleteRequest{
		Resources:        refs,
		ExpectedRevision: flags.expectedRevision,
		DryRun:           flags.dryRun,
		Message:          flags.message,
		Now:              flags.now,
		AllowLargeChange: flags.allowLarge,
	})
	if err != nil {
		return describeMissing(located(objects, err), refs...)
	}
	a.warnLarge(response, flags)
	return a.printChanges(f, response.GetChanges(), response.GetRevision(), flags.dryRun)
}

// existing returns the refs whose resources exist.
func (c *client) existing(ctx context.Context, refs []*resealv1.ResourceRef) ([]*resealv1.ResourceRef, error) {
	list, err := c.admin.List(ctx, &resealv1.ListRequest{})
	if err != nil {
		return nil, err
	}
	have := make(map[string]bool)
	for _, r := range list.GetResources() {
		have[r.Ref().Key()] = true
	}
	var found []*resealv1.ResourceRef
	for _, ref := range refs {
		if have[ref.Key()] {
			found = append(found, ref)
		}
	}
	return found, nil
}

// changesView is what -o json and yaml show of a change.
type changesView struct {
	Revision     int64        `json:"revision"`
	RolledBackTo int64        `json:"rolledBackTo,omitempty"`
	DryRun       bool         `json:"dryRun"`
	Changes      []changeView `json:"changes"`
	Impact       *protoView   `json:"impact,omitempty"`
}

// withImpact is a dry run with what it would do to the fleet.
func withImpact(response *resealv1.ApplyResponse, impact *resealv1.PreviewChangeResponse) changesView {
	return changesView{
		Revision: response.GetRevision(), DryRun: true, Changes: viewChanges(response.GetChanges()),
		Impact: &protoView{impact.ProtoReflect()},
	}
}

type changeView struct {
	Kind           string           `json:"kind"`
	Name           string           `json:"name"`
	Action         string           `json:"action"`
	ChangedSecrets []string         `json:"changedSecrets,omitempty"`
	Before         *json.RawMessage `json:"before,omitempty"`
	After          *json.RawMessage `json:"after,omitempty"`
}

func viewChanges(changes []*resealv1.Change) []changeView {
	views := make([]changeView, len(changes))
	for i, c := range changes {
		views[i] = changeView{Kind: c.GetResource().GetKind(), Name: c.GetResource().GetName(),
			Action: resealv1.Label(c.GetAction()), ChangedSecrets: c.GetChangedSecrets()}
	}
	return views
}

// printChanges says what became of each resource, and the revision.
func (a *app) printChanges(f *format, changes []*resealv1.Change, revision int64, dryRun bool) error {
	if f.structured() {
		return a.printDocument(f, changesView{Revision: revision, DryRun: dryRun, Changes: viewChanges(changes)})
	}
	if f.value == "name" {
		for _, c := range changes {
			a.printf("%s\n", refName(c.GetResource()))
		}
		return nil
	}
	a.printActions(changes, dryRun)
	if dryRun {
		a.printf("revision %d (dry run: nothing was changed)\n", revision)
	} else {
		a.printf("revision %d\n", revision)
	}
	return nil
}

func (a *app) printActions(changes []*resealv1.Change, dryRun bool) {
	suffix := ""
	if dryRun {
		suffix = " (dry run)"
	}
	for _, c := range changes {
		a.printf("%s %s%s\n", refName(c.GetResource()), resealv1.Label(c.GetAction()), suffix)
	}
}

// load reads manifests; none at all is an error.
func (a *app) load(load loader, files []string) ([]manifest.Object, error) {
	stdins := 0
	for _, file := range files {
		if file == "-" {
			stdins++
		}
	}
	if stdins > 1 {
		return nil, usagef("-f - may be given once")
	}
	objects, err := load(files, a.in)
	if err == nil && len(objects) == 0 {
		err = fmt.Errorf("%s: holds no resource", strings.Join(files, ", "))
	}
	return objects, err
}
