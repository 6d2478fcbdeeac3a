package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/reflect/protoreflect"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newDescribeCommand(a *app) *cobra.Command {
	var labels string
	cmd := &cobra.Command{
		Use:   "describe KIND [NAME...]",
		Short: "Show everything about resources and edges",
		Long: `Show everything about resources and edges: all fields with the defaults that
apply, who refers to a resource, and which edges refuse it and why.`,
		Example:           "  resealctl describe pool jetty\n  resealctl describe edge edge-1",
		ValidArgsFunction: a.completeKindsAndNames,
	}
	cmd.Flags().StringVarP(&labels, "selector", "l", "", "only what has these `labels`: k=v,...")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		selection, err := parseSelection(args)
		if err != nil {
			return err
		}
		want, err := parseLabels(labels)
		if err != nil {
			return err
		}
		client, err := a.connect()
		if err != nil {
			return err
		}
		g := &getter{app: a, client: client, selection: selection, labels: want}
		return g.describe(cmd.Context())
	}
	return cmd
}

func (g *getter) describe(ctx context.Context) error {
	var missing []error
	shown := 0
	between := func() {
		if shown++; shown > 1 {
			g.printf("\n\n")
		}
	}
	for _, kind := range g.selection.kinds {
		var err error
		if kind == kindEdges {
			var edges []*resealv1.Edge
			edges, err = g.edges(ctx)
			for _, edge := range edges {
				between()
				g.describeEdge(edge)
			}
		} else {
			var resources []*resealv1.Resource
			resources, err = g.resources(ctx, kind)
			around := g.surroundings(ctx, len(resources))
			for _, r := range resources {
				between()
				g.describeResource(r, around, g.connectionBudget(ctx, r))
			}
		}
		if errors.Is(err, errNotFound) {
			missing = append(missing, err)
		} else if err != nil {
			return err
		}
	}
	if shown == 0 && len(missing) == 0 {
		g.warnf("No resources found.\n")
	}
	return errors.Join(missing...)
}

// surroundings are the other resources and the edges, to say what a resource
// has to do with them.
type surroundings struct {
	resources []*resealv1.Resource
	edges     []*resealv1.Edge
}

// surroundings asks for them. Without an answer there is just less to show.
func (g *getter) surroundings(ctx context.Context, described int) surroundings {
	var around surroundings
	if described == 0 {
		return around
	}
	if list, err := g.client.admin.List(ctx, &resealv1.ListRequest{}); err == nil {
		around.resources = list.GetResources()
	}
	if list, err := g.client.fleet.ListEdges(ctx, &resealv1.ListEdgesRequest{}); err == nil {
		around.edges = list.GetEdges()
	}
	return around
}

func (a *app) describeResource(r *resealv1.Resource, around surroundings, budget *connectionBudget) {
	d := describer{w: a.out}
	meta := r.GetMetadata()
	d.line(0, "Name", meta.GetName())
	d.line(0, "Kind", r.Kind())
	d.labels("Labels", meta.GetLabels())
	d.labels("Annotations", meta.GetAnnotations())
	d.line(0, "UID", meta.GetUid())
	d.line(0, "Generation", fmt.Sprint(meta.GetGeneration()))
	d.line(0, "Revision", fmt.Sprint(meta.GetRevision()))
	d.line(0, "Created", ago(meta.GetCreatedAt()))
	d.line(0, "Updated", ago(meta.GetUpdatedAt()))
	if users := usersOf(r, around.resources); len(users) > 0 {
		d.line(0, "Used by", strings.Join(users, ", "))
	}
	if c := r.GetCertificate(); c.GetCertificatePem() != "" {
		d.certificate(c)
	}
	d.heading(0, "Spec")
	if spec := r.SpecMessage(); spec != nil {
		d.message(1, spec, withDefaults(r))
	}
	if budget != nil {
		d.line(0, "Connection Budget", budget.String())
	}
	for _, edge := range around.edges {
		for _, v := range edge.GetNack().GetViolations() {
			if v.GetResource().Key() == r.Ref().Key() {
				d.line(0, "Refused by", fmt.Sprintf("edge %s at revision %d: %s", edge.GetId(), edge.GetNack().GetRevision(), v.Text()))
			}
		}
	}
	d.flush()
}

// withDefaults is the spec as edges see it.
func withDefaults(r *resealv1.Resource) protoreflect.Message {
	switch {
	case r.GetBackendPool() != nil:
		return r.GetBackendPool().WithDefaults().ProtoReflect()
	case r.GetTlsPolicy() != nil:
		return r.GetTlsPolicy().WithDefaults().ProtoReflect()
	case r.GetListener() != nil:
		return r.GetListener().WithDefaults().ProtoReflect()
	case r.GetRoute() != nil:
		return r.GetRoute().WithDefaults().ProtoReflect()
	case r.GetKeyring() != nil:
		return r.GetKeyring().WithDefaults().ProtoReflect()
	}
	return r.SpecMessage()
}

// usersOf are the resources that refer to r.
func usersOf(r *resealv1.Resource, all []*resealv1.Resource) []string {
	var users []string
	for _, other := range all {
		if slices.Contains(referencesOf(other), r.Ref().Key()) {
			users = append(users, refName(other.Ref()))
		}
	}
	return users
}

// referencesOf are the resources, "Kind/name", that r names.
func referencesOf(r *resealv1.Resource) []string {
	var refs []string
	add := func(kind string, names ...string) {
		for _, name := range names {
			if name != "" {
				refs = append(refs, kind+"/"+name)
			}
		}
	}
	add("Certificate", r.GetBackendPool().GetTls().GetClientCertificate())
	add("TLSPolicy", r.GetBackendPool().GetTls().GetPolicy())
	add("Certificate", r.GetListener().GetCertificates()...)
	add("TLSPolicy", r.GetListener().GetTlsPolicy())
	add("BackendPool", r.GetListener().GetPool())
	add("Listener", r.GetRoute().GetListeners()...)
	for _, pool := range r.GetRoute().GetPools() {
		add("BackendPool", pool.GetName())
	}
	if policy := r.GetTlsPolicy(); policy != nil {
		add("Keyring", policy.WithDefaults().GetResumption().GetKeyring())
	}
	return refs
}
