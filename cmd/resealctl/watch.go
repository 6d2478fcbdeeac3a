package main

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// watch shows what there is and then what changes, until a signal or the
// control plane ends it.
func (g *getter) watch(ctx context.Context) error {
	kind := g.selection.kinds[0]
	if len(g.selection.kinds) > 1 {
		return usagef("-w watches one kind, or all")
	}
	// What was asked for by name must exist now.
	if g.selection.named() {
		var err error
		if kind == kindEdges {
			_, err = g.edges(ctx)
		} else {
			_, err = g.resources(ctx, kind)
		}
		if err != nil {
			return err
		}
	}
	if kind == kindEdges {
		return untilInterrupted(g.watchEdges(ctx))
	}
	return untilInterrupted(g.watchResources(ctx, kind))
}

// untilInterrupted treats an end by a signal as a good end.
func untilInterrupted(err error) error {
	switch {
	case errors.Is(err, errInterrupted):
		return nil
	case errors.Is(err, io.EOF):
		return errors.New("the control plane ended the watch")
	}
	return err
}

func (g *getter) watchResources(ctx context.Context, kind string) error {
	request := &resealv1.WatchRequest{Kind: kind, MatchLabels: g.labels}
	if kind == kindAll {
		request.Kind = ""
	}
	stream, err := g.client.admin.Watch(ctx, request)
	if err != nil {
		return err
	}
	w := &resourceWatch{getter: g, kind: kind, shown: make(map[string]*resealv1.Resource)}
	for {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := w.show(response); err != nil {
			return err
		}
	}
}

// resourceWatch writes the changes of a watch.
type resourceWatch struct {
	*getter
	kind      string
	shown     map[string]*resealv1.Resource // by "Kind/name", as last written
	columns   []column
	table     *table
	documents int
}

func (w *resourceWatch) show(response *resealv1.WatchResponse) error {
	deletes := response.GetDeletes()
	if response.GetReset_() {
		deletes = append(deletes, w.forgotten(response.GetResources())...)
	}
	for _, r := range response.GetResources() {
		key := r.Ref().Key()
		old := w.shown[key]
		if !w.selection.wants(r.Kind(), r.GetMetadata().GetName()) || old != nil && proto.Equal(old, r) {
			continue
		}
		w.shown[key] = r
		if err := w.changed(r); err != nil {
			return err
		}
	}
	for _, ref := range deletes {
		old := w.shown[ref.Key()]
		if old == nil {
			continue
		}
		delete(w.shown, ref.Key())
		if err := w.deleted(ref); err != nil {
			return err
		}
	}
	if w.table != nil {
		w.table.flush()
	}
	return nil
}

// forgotten are the shown resources that a reset no longer holds.
func (w *resourceWatch) forgotten(held []*resealv1.Resource) []*resealv1.ResourceRef {
	var refs []*resealv1.ResourceRef
	for key, r := range w.shown {
		if !slices.ContainsFunc(held, func(h *resealv1.Resource) bool { return h.Ref().Key() == key }) {
			refs = append(refs, r.Ref())
		}
	}
	slices.SortFunc(refs, func(a, b *resealv1.ResourceRef) int { return strings.Compare(a.Key(), b.Key()) })
	return refs
}

func (w *resourceWatch) changed(r *resealv1.Resource) error {
	switch w.format.value {
	case "name":
		w.printf("%s\n", refName(r.Ref()))
	case "yaml", "json":
		if w.documents++; w.documents > 1 {
			w.separateDocuments(w.format)
		}
		return w.formatResources(w.format, true, []*resealv1.Resource{r})
	default:
		w.open()
		w.table.add(cellsOf(w.columns, r, w.kind == kindAll)...)
	}
	return nil
}

// deletedView is a deleted resource in a stream of documents.
type deletedView struct {
	APIVersion string      `json:"apiVersion"`
	Kind       string      `json:"kind"`
	Metadata   deletedName `json:"metadata"`
	Deleted    bool        `json:"deleted"`
}

type deletedName struct {
	Name string `json:"name"`
}

func (w *resourceWatch) deleted(ref *resealv1.ResourceRef) error {
	switch w.format.value {
	case "name":
		w.printf("%s deleted\n", refName(ref))
	case "yaml", "json":
		if w.documents++; w.documents > 1 {
			w.separateDocuments(w.format)
		}
		return w.printDocument(w.format, deletedView{manifest.APIVersion, ref.GetKind(), deletedName{ref.GetName()}, true})
	default:
		w.open()
		cells := make([]string, len(w.columns))
		cells[0], cells[1] = ref.GetName(), "<deleted>"
		if w.kind == kindAll {
			cells[0] = refName(ref)
		}
		w.table.add(cells...)
	}
	return nil
}

// open starts the table with the first row. Kinds have different columns, so a
// watch of all shows only what all have.
func (w *resourceWatch) open() {
	if w.table != nil {
		return
	}
	w.columns = columnsOf(w.kind, w.format.value == "wide")
	if w.kind == kindAll {
		w.columns = columnsOf("", true)
	}
	w.table = newTable(w.out, headersOf(w.columns)...)
}

// watchEdges writes an edge again when something in it changed.
func (g *getter) watchEdges(ctx context.Context) error {
	stream, err := g.client.fleet.WatchEdges(ctx, &resealv1.WatchEdgesRequest{MatchLabels: g.labels})
	if err != nil {
		return err
	}
	w := &edgeWatch{getter: g, shown: make(map[string]*resealv1.Edge)}
	for {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := w.show(response.GetEdges()); err != nil {
			return err
		}
	}
}

type edgeWatch struct {
	*getter
	shown     map[string]*resealv1.Edge
	table     *table
	documents int
}

func (w *edgeWatch) show(edges []*resealv1.Edge) error {
	wide := w.format.value == "wide"
	if w.table == nil {
		w.table = newTable(w.out, edgeHeaders(wide)...)
	}
	present := make(map[string]bool)
	for _, edge := range edges {
		id := edge.GetId()
		present[id] = true
		if !w.selection.wants(kindEdges, id) || proto.Equal(w.shown[id], edge) {
			continue
		}
		w.shown[id] = edge
		switch w.format.value {
		case "name":
			w.printf("edge/%s\n", id)
		case "yaml", "json":
			if err := w.document(viewEdge(edge)); err != nil {
				return err
			}
		default:
			w.table.add(edgeCells(edge, wide)...)
		}
	}
	return w.showGone(present, wide)
}

// showGone writes the edges that are no longer live.
func (w *edgeWatch) showGone(present map[string]bool, wide bool) error {
	var gone []string
	for id := range w.shown {
		if !present[id] {
			gone = append(gone, id)
		}
	}
	slices.Sort(gone)
	for _, id := range gone {
		delete(w.shown, id)
		switch w.format.value {
		case "name":
			w.printf("edge/%s deleted\n", id)
		case "yaml", "json":
			if err := w.document(map[string]any{"id": id, "deleted": true}); err != nil {
				return err
			}
		default:
			cells := make([]string, len(edgeHeaders(wide)))
			cells[0], cells[1] = id, "<gone>"
			w.table.add(cells...)
		}
	}
	if !w.format.structured() && w.format.value != "name" && len(w.table.rows) > 0 {
		w.table.flush()
	}
	return nil
}

func (w *edgeWatch) document(v any) error {
	if w.documents++; w.documents > 1 {
		w.separateDocuments(w.format)
	}
	return w.printDocument(w.format, v)
}
