package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const getExample = `  resealctl get pools
  resealctl get backendpool jetty -o yaml
  resealctl get listeners,routes -o wide
  resealctl get edges -l zone=eu -w
  resealctl get all`

// getter is one run of get.
type getter struct {
	*app
	client    *client
	selection *selection
	labels    map[string]string
	format    *format

	unanswered []*resealv1.UnansweredReplica // whose edges are missing
}

func newGetCommand(a *app) *cobra.Command {
	var (
		labels string
		watch  bool
	)
	cmd := &cobra.Command{
		Use:   "get KIND [NAME...]",
		Short: "Show resources and edges",
		Long: "Show resources and edges.\n\nKinds: " + kindList() + `. Several are joined by commas; KIND/NAME works too.
Private keys are never shown.`,
		Example:           getExample,
		ValidArgsFunction: a.completeKindsAndNames,
	}
	cmd.AddCommand(newGetFailuresCommand(a))
	format := registerFormat(cmd, "table", "wide", "yaml", "json", "name")
	cmd.Flags().StringVarP(&labels, "selector", "l", "", "only what has these `labels`: k=v,...")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "stay and show what changes")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		selection, err := parseSelection(args)
		if err != nil {
			return err
		}
		want, err := parseLabels(labels)
		if err != nil {
			return err
		}
		if len(want) > 0 && selection.named() {
			return usagef("either names or -l, not both")
		}
		if format.structured() && len(selection.kinds) > 1 && slices.Contains(selection.kinds, kindEdges) {
			return usagef("edges are not resources: ask for them alone with -o %s", format)
		}
		client, err := a.connect()
		if err != nil {
			return err
		}
		g := &getter{app: a, client: client, selection: selection, labels: want, format: format}
		if watch {
			return g.watch(cmd.Context())
		}
		return g.get(cmd.Context())
	}
	return cmd
}

// get shows what there is. Names that do not exist are reported after the others
// have been shown.
func (g *getter) get(ctx context.Context) error {
	var (
		resources []*resealv1.Resource
		edges     []*resealv1.Edge
		missing   []error
	)
	for _, kind := range g.selection.kinds {
		var err error
		if kind == kindEdges {
			edges, err = g.edges(ctx)
		} else {
			var found []*resealv1.Resource
			found, err = g.resources(ctx, kind)
			resources = append(resources, found...)
		}
		if errors.Is(err, errNotFound) {
			missing = append(missing, err)
		} else if err != nil {
			return err
		}
	}
	err := g.print(resources, edges, len(missing) > 0)
	return errors.Join(append(missing, err)...)
}

// resources fetches those of one kind. An error that wraps errNotFound comes
// with the ones that were found.
func (g *getter) resources(ctx context.Context, kind string) ([]*resealv1.Resource, error) {
	names := g.selection.names[kind]
	if len(names) == 0 {
		if kind == kindAll {
			kind = ""
		}
		list, err := g.client.admin.List(ctx, &resealv1.ListRequest{Kind: kind, MatchLabels: g.labels})
		return list.GetResources(), err
	}
	var (
		found   []*resealv1.Resource
		missing []error
	)
	for _, name := range names {
		ref := &resealv1.ResourceRef{Kind: kind, Name: name}
		got, err := g.client.admin.Get(ctx, &resealv1.GetRequest{Resource: ref})
		switch {
		case errors.Is(err, errNotFound):
			missing = append(missing, resourceNotFound(ref))
		case err != nil:
			return nil, err
		default:
			found = append(found, got.GetResource())
		}
	}
	return found, errors.Join(missing...)
}

// edges fetches the edges, like resources.
func (g *getter) edges(ctx context.Context) ([]*resealv1.Edge, error) {
	list, err := g.client.fleet.ListEdges(ctx, &resealv1.ListEdgesRequest{MatchLabels: g.labels})
	if err != nil {
		return nil, err
	}
	g.unanswered = list.GetUnanswered()
	byID := make(map[string]*resealv1.Edge)
	var found []*resealv1.Edge
	for _, edge := range list.GetEdges() {
		byID[edge.GetId()] = edge
		if g.selection.wants(kindEdges, edge.GetId()) {
			found = append(found, edge)
		}
	}
	var missing []error
	for _, name := range g.selection.names[kindEdges] {
		if byID[name] == nil {
			missing = append(missing, notFound("edge", name))
		}
	}
	return found, errors.Join(missing...)
}

func (g *getter) print(resources []*resealv1.Resource, edges []*resealv1.Edge, someMissing bool) error {
	if g.format.structured() {
		return g.printStructured(resources, edges, someMissing)
	}
	if len(resources)+len(edges) == 0 {
		if !someMissing {
			g.warnf("No resources found.\n")
		}
		return nil
	}
	if g.format.value == "name" {
		for _, r := range resources {
			g.printf("%s\n", refName(r.Ref()))
		}
		for _, e := range edges {
			g.printf("edge/%s\n", e.GetId())
		}
		return nil
	}
	g.printTables(resources, edges)
	return nil
}

// printStructured writes one document: the resource itself when one was asked
// for by name, otherwise a list.
func (g *getter) printStructured(resources []*resealv1.Resource, edges []*resealv1.Edge, someMissing bool) error {
	one := len(g.selection.kinds) == 1 && len(g.selection.names[g.selection.kinds[0]]) == 1
	if one && someMissing {
		return nil
	}
	if g.onlyEdges() {
		if one {
			return g.printDocument(g.format, viewEdge(edges[0]))
		}
		return g.printDocument(g.format, viewEdges(edges, g.unanswered))
	}
	return g.formatResources(g.format, one, resources)
}

// edgesView is a list of edges as -o json and yaml show it.
type edgesView struct {
	Edges      []edgeView       `json:"edges"`
	Unanswered []unansweredView `json:"unanswered,omitempty"`
}

func viewEdges(edges []*resealv1.Edge, unanswered []*resealv1.UnansweredReplica) edgesView {
	views := make([]edgeView, len(edges))
	for i, edge := range edges {
		views[i] = viewEdge(edge)
	}
	return edgesView{views, viewUnanswered(unanswered)}
}

func (g *getter) onlyEdges() bool {
	return len(g.selection.kinds) == 1 && g.selection.kinds[0] == kindEdges
}

// formatResources writes resources as manifests: one, or a list. In YAML a list
// is one document for each.
func (a *app) formatResources(f *format, one bool, resources []*resealv1.Resource) error {
	if f.value == "yaml" {
		return manifest.FormatYAML(a.out, resources...)
	}
	if one {
		var data bytes.Buffer
		if err := manifest.FormatJSON(&data, resources...); err != nil {
			return err
		}
		return a.writeJSON(data.Bytes())
	}
	items := make([]json.RawMessage, len(resources))
	for i, r := range resources {
		var err error
		if items[i], err = resourceJSON(r); err != nil {
			return err
		}
	}
	return a.printDocument(f, listView{manifest.APIVersion, "List", items})
}

type listView struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Items      []json.RawMessage `json:"items"`
}

// resourceJSON is a resource as a manifest in JSON, "null" for none.
func resourceJSON(r *resealv1.Resource) (json.RawMessage, error) {
	if r == nil {
		return json.RawMessage("null"), nil
	}
	var data bytes.Buffer
	err := manifest.FormatJSON(&data, r)
	return data.Bytes(), err
}

// printTables writes one table per kind, with the kind before the names when
// there are several.
func (g *getter) printTables(resources []*resealv1.Resource, edges []*resealv1.Edge) {
	wide := g.format.value == "wide"
	qualified := len(g.selection.kinds) > 1 || g.selection.kinds[0] == kindAll
	tables := 0
	begin := func(headers []string) *table {
		if tables++; tables > 1 {
			g.printf("\n")
		}
		return newTable(g.out, headers...)
	}
	for _, kind := range resealv1.Kinds {
		rows := ofKind(resources, kind)
		if len(rows) == 0 {
			continue
		}
		columns := columnsOf(kind, wide)
		t := begin(headersOf(columns))
		for _, r := range rows {
			t.add(cellsOf(columns, r, qualified)...)
		}
		t.flush()
	}
	if len(edges) > 0 {
		t := begin(edgeHeaders(wide))
		for _, e := range edges {
			cells := edgeCells(e, wide)
			if qualified {
				cells[0] = "edge/" + cells[0]
			}
			t.add(cells...)
		}
		t.flush()
	}
}

func ofKind(resources []*resealv1.Resource, kind string) []*resealv1.Resource {
	var found []*resealv1.Resource
	for _, r := range resources {
		if r.Kind() == kind {
			found = append(found, r)
		}
	}
	return found
}

func headersOf(columns []column) []string {
	headers := make([]string, len(columns))
	for i, c := range columns {
		headers[i] = c.header
	}
	return headers
}

func cellsOf(columns []column, r *resealv1.Resource, qualified bool) []string {
	cells := make([]string, len(columns))
	for i, c := range columns {
		cells[i] = c.cell(r)
	}
	if qualified {
		cells[0] = strings.ToLower(r.Kind()) + "/" + cells[0]
	}
	return cells
}
