package feed

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// step is something that happens to a fleet.
type step struct {
	kind string
	edge int
	arg  int
	wait time.Duration
}

func drawSteps(t *rapid.T) []step {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
		return step{
			kind: rapid.SampledFrom([]string{
				"apply", "apply", "apply", "delete", "listener", "route", "break edge", "mend edge",
				"restart edge", "wipe edge", "restart plane", "cut", "forget", "drain", "new cluster", "restore",
			}).Draw(t, "kind"),
			edge: rapid.IntRange(0, fleetSize-1).Draw(t, "edge"),
			arg:  rapid.IntRange(0, 3).Draw(t, "arg"),
			wait: time.Duration(rapid.SampledFrom([]int{0, 0, 1, 50, 3000, 20000}).Draw(t, "wait")) * time.Millisecond,
		}
	}), 1, 30).Draw(t, "steps")
}

const fleetSize = 3

// world is a plane with edges to which steps happen.
type world struct {
	t      *testing.T
	source *source
	plane  *plane
	nodes  [fleetSize]*node
	disks  [fleetSize]*disk
	broken [fleetSize]bool
}

func edgeLabels(i int) map[string]string { return map[string]string{"site": fmt.Sprint(i % 2)} }

func (w *world) start(i int) {
	id := fmt.Sprint("e", i)
	w.nodes[i] = w.plane.node(id, edgeLabels(i), w.disks[i], func(n *node) { n.refuse = w.refusal(i) })
}

// refusal makes a broken edge refuse whatever it does not serve yet.
func (w *world) refusal(i int) func(*resealv1.Snapshot) []*resealv1.Violation {
	if !w.broken[i] {
		return nil
	}
	return func(*resealv1.Snapshot) []*resealv1.Violation {
		return []*resealv1.Violation{{Description: "port in use"}}
	}
}

func (w *world) setBroken(i int, broken bool) {
	w.broken[i] = broken
	w.nodes[i].set(func(n *node) { n.refuse = w.refusal(i) })
}

func (w *world) restartPlane() {
	for _, n := range w.nodes {
		n.stop()
	}
	w.plane.stop()
	w.plane = startPlane(w.t, w.source)
	for i := range w.nodes {
		w.start(i)
	}
}

func (w *world) do(s step) {
	src := w.source
	switch s.kind {
	case "apply":
		src.apply(many(pool(fmt.Sprint("p", s.arg), fmt.Sprint("a:", src.Snapshot().Revision()))))
	case "delete":
		src.apply(nil, ref("BackendPool", fmt.Sprint("p", s.arg)))
	case "listener":
		match := map[string]string{"site": fmt.Sprint(s.edge % 2)}
		src.apply(many(listener(fmt.Sprint("l", s.edge), fmt.Sprint("p", s.arg), match)))
	case "route":
		src.apply(many(route(fmt.Sprint("r", s.arg), []string{fmt.Sprint("l", s.edge)}, fmt.Sprint("p", s.arg), "p0")))
	case "break edge", "mend edge":
		w.setBroken(s.edge, s.kind == "break edge")
	case "restart edge":
		w.nodes[s.edge].stop()
		w.start(s.edge)
	case "wipe edge":
		w.nodes[s.edge].stop()
		w.disks[s.edge] = newDisk()
		w.start(s.edge)
	case "restart plane":
		w.restartPlane()
	case "cut":
		// Another stream of the edge ends the edge's own, and leaves.
		stream := w.plane.hello(fmt.Sprint("e", s.edge), &resealv1.Hello{Edge: fmt.Sprint("e", s.edge), BootId: "thief"})
		settle(0)
		if err := stream.CloseSend(); err != nil {
			w.t.Error(err)
		}
	case "forget":
		src.mu.Lock()
		src.history = src.history[len(src.history)-1:]
		src.mu.Unlock()
	case "restore":
		src.mu.Lock()
		oldest := src.history[0].Revision()
		src.mu.Unlock()
		src.restore(max(oldest, 1))
	case "drain":
		// NOT_FOUND while the edge is away.
		_, _ = w.plane.server.DrainEdge(w.t.Context(), &resealv1.DrainEdgeRequest{Id: fmt.Sprint("e", s.edge), Undo: s.arg > 1})
	case "new cluster":
		src.mu.Lock()
		newest := src.history[len(src.history)-1]
		src.history = []*resealv1.Snapshot{resealv1.NewSnapshot(newest.ClusterID()+"+", newest.Revision(), newest.All())}
		src.mu.Unlock()
		w.restartPlane()
	}
	settle(s.wait)
}

// check tells whether every edge has what its labels select.
func (w *world) check() error {
	newest := w.source.Snapshot()
	for i, n := range w.nodes {
		id := fmt.Sprint("e", i)
		if diff := cmp.Diff(chosen(newest, edgeLabels(i)), keys(n.newest())); diff != "" {
			return fmt.Errorf("%s serves: %s", id, diff)
		}
		for _, got := range n.newest().All() {
			want, err := unseal(newest.Get(got.Kind(), got.GetMetadata().GetName()))
			if err != nil {
				return err
			}
			if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
				return fmt.Errorf("%s serves %s: %s", id, got.Ref().Key(), diff)
			}
		}
		edge := w.plane.edge(id)
		if edge.GetAckedRevision() != newest.Revision() || edge.GetNack() != nil || n.feed.Revision() != newest.Revision() {
			return fmt.Errorf("%s is listed as %v at revision %d", id, edge, newest.Revision())
		}
		kept, err := n.feed.LoadLastGood()
		if err != nil || !slices.Equal(keys(kept), keys(n.newest())) {
			return fmt.Errorf("%s keeps %v, %w", id, keys(kept), err)
		}
	}
	return nil
}

// Whatever happens, once it stops every edge serves what the store holds.
func TestConverges(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps := drawSteps(rt)
		var err error
		synctest.Test(t, func(t *testing.T) {
			w := &world{t: t, source: base()}
			w.plane = startPlane(t, w.source)
			for i := range w.nodes {
				w.disks[i] = newDisk()
				w.start(i)
			}
			for _, s := range steps {
				w.do(s)
			}
			for i := range w.nodes {
				w.setBroken(i, false)
			}
			settle(time.Minute)
			err = w.check()
		})
		if err != nil {
			rt.Fatal(err)
		}
	})
}
