package rollout

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// fleetOf are n edges that all serve base.
func fleetOf(n int, base int64) *Fleet {
	f := &Fleet{Cluster: "c1", Newest: base}
	for i := range n {
		f.Edges = append(f.Edges, Edge{ID: fmt.Sprintf("e%03d", i), Touched: true, Connected: true, Sent: base, Acked: base})
	}
	return f
}

// serve has all edges serve what they are to.
func (f *Fleet) serve(r *Record) {
	for i, e := range f.Edges {
		wanted := r.Base
		if r.Has(e.ID, e.Labels) {
			wanted = r.Candidate
		}
		if e.Connected {
			f.Edges[i].Sent, f.Edges[i].Acked = wanted, wanted
		}
	}
}

func (f *Fleet) moved(r *Record) []int {
	var moved []int
	for i, e := range f.Edges {
		if r.Has(e.ID, e.Labels) {
			moved = append(moved, i)
		}
	}
	return moved
}

// run steps until nothing changes for longer than any soak, and returns how many edges
// had the candidate after each change.
func run(r *Record, f *Fleet, now time.Time) (*Record, []int, time.Duration) {
	var sizes []int
	begun, last := now, now
	for now.Sub(last) < 2*mostSoak {
		next := Step(now, r, f)
		if next != r {
			r, last = next, now
			sizes = append(sizes, len(f.moved(r)))
		}
		f.serve(r)
		now = now.Add(250 * time.Millisecond)
	}
	return r, sizes, last.Sub(begun)
}

func TestStages(t *testing.T) {
	seconds := func(n int) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Second) }
	site := func(f *Fleet) {
		for i := range f.Edges {
			if i%10 == 3 {
				f.Edges[i].Labels = map[string]string{"canary": "yes"}
			}
		}
	}
	for _, test := range []struct {
		name   string
		edges  int
		policy *resealv1.RolloutPolicy
		change func(*Fleet)
		sizes  []int // 0 at the end: all, and no candidate any more
		took   time.Duration
	}{
		{"no edge", 0, nil, nil, []int{0}, 0},
		{"one edge", 1, nil, nil, []int{0}, 0},
		{"two edges", 2, nil, nil, []int{1, 0}, 2 * time.Second},
		{"three edges", 3, nil, nil, []int{1, 0}, 3 * time.Second},
		{"thirty", 30, nil, nil, []int{1, 3, 0}, 60 * time.Second},
		{"many", 400, nil, nil, []int{4, 40, 0}, 180 * time.Second},
		{"at once", 400, &resealv1.RolloutPolicy{Stages: []*resealv1.RolloutStage{{Percent: 100}}}, nil, []int{0}, 0},
		{"a last soak", 3, &resealv1.RolloutPolicy{Stages: []*resealv1.RolloutStage{{Percent: 100, Soak: seconds(5)}}}, nil, []int{3, 0}, 5 * time.Second},
		{"labels first", 40, &resealv1.RolloutPolicy{Stages: []*resealv1.RolloutStage{
			{EdgeSelector: &resealv1.EdgeSelector{MatchLabels: map[string]string{"canary": "yes"}}, Soak: seconds(3)}, {Edges: 6, Soak: seconds(2)},
		}}, site, []int{4, 6, 0}, 5 * time.Second},
		{"nobody has the label", 4, &resealv1.RolloutPolicy{Stages: []*resealv1.RolloutStage{
			{EdgeSelector: &resealv1.EdgeSelector{MatchLabels: map[string]string{"canary": "yes"}}}, {Edges: 2, Soak: seconds(2)},
		}}, nil, []int{2, 0}, 2 * time.Second},
		{"now", 400, nil, func(f *Fleet) { f.Now = true }, []int{4, 40, 0}, 4 * time.Second},
		{"touches one of many", 50, nil, func(f *Fleet) {
			for i := range f.Edges {
				f.Edges[i].Touched = i == 7
			}
		}, []int{0}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := fleetOf(test.edges, 10)
			f.Policy = test.policy
			r := Step(start, nil, f)
			if r.Base != 10 || r.Phase != resealv1.Rollout_PHASE_DONE || Step(start, r, f) != r {
				t.Fatalf("without a record: %+v", r)
			}
			f.Newest = 11
			if test.change != nil {
				test.change(f)
			}
			r, sizes, took := run(r, f, start)
			if !slices.Equal(sizes, test.sizes) || took != test.took || r.Base != 11 || r.Phase != resealv1.Rollout_PHASE_DONE {
				t.Errorf("%v in %s, want %v in %s: %+v", sizes, took, test.sizes, test.took, r)
			}
		})
	}
}

// begun is a rollout of 11 over 10 whose first stage is served.
func begun(t testing.TB, edges int, policy *resealv1.RolloutPolicy) (*Record, *Fleet, int) {
	f := fleetOf(edges, 10)
	f.Policy = policy
	r := Step(start, nil, f)
	f.Newest = 11
	r = Step(start, r, f)
	f.serve(r)
	moved := f.moved(r)
	if len(moved) == 0 {
		t.Fatalf("nobody has it: %+v", r)
	}
	return r, f, moved[0]
}

func TestGates(t *testing.T) {
	bad := func(moved, past, others Share) *Shares {
		return &Shares{Errors: []Compared{{What: "requests failed", Moved: moved, Past: past, Others: others, FromNothing: true}}}
	}
	for _, test := range []struct {
		name  string
		spoil func(*Fleet, *Edge)
		want  string // a part of the reason, "" when it goes on
	}{
		{"nothing", func(*Fleet, *Edge) {}, ""},
		{"a refusal", func(_ *Fleet, e *Edge) { e.Refused = "port in use" }, "refused it: port in use"},
		{"a crash", func(_ *Fleet, e *Edge) { e.Crashes, e.Started = 1, start.Add(time.Second) }, "crashed with it"},
		{"away for a moment", func(_ *Fleet, e *Edge) { e.Connected, e.Away = false, time.Second }, ""},
		{"away for long", func(_ *Fleet, e *Edge) { e.Connected, e.Away = false, 11*time.Second }, "away for more than 10s"},
		{"errors", func(f *Fleet, _ *Edge) { f.Shares = bad(Share{30, 100}, Share{0, 100}, Share{1, 100}) }, "30.0% of 100 requests failed"},
		{"errors with nothing to compare", func(f *Fleet, _ *Edge) { f.Shares = bad(Share{30, 100}, Share{}, Share{}) }, "30.0% of 100"},
		{"few errors", func(f *Fleet, _ *Edge) { f.Shares = bad(Share{4, 100}, Share{0, 100}, Share{0, 100}) }, ""},
		{"errors everywhere", func(f *Fleet, _ *Edge) { f.Shares = bad(Share{30, 100}, Share{0, 100}, Share{29, 100}) }, ""},
		{"errors as before", func(f *Fleet, _ *Edge) { f.Shares = bad(Share{30, 100}, Share{29, 100}, Share{0, 100}) }, ""},
		{"too few to tell", func(f *Fleet, _ *Edge) { f.Shares = bad(Share{19, 19}, Share{0, 100}, Share{0, 100}) }, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, pause := range []bool{false, true} {
				r, f, i := begun(t, 3, &resealv1.RolloutPolicy{})
				if pause {
					r.Policy.OnFailure = resealv1.RolloutPolicy_ON_FAILURE_PAUSE
				}
				test.spoil(f, &f.Edges[i])
				next := Step(start.Add(time.Second), r, f)
				wanted := resealv1.Rollout_PHASE_UNDONE
				if pause {
					wanted = resealv1.Rollout_PHASE_HALTED
				}
				switch {
				case test.want == "" && next != r:
					t.Errorf("stopped: %+v", next)
				case test.want != "" && (next.Phase != wanted || !strings.Contains(next.Reason, test.want)):
					t.Errorf("%s: %q", next.Phase, next.Reason)
				case test.want != "" && !strings.Contains(next.Verdict(11), test.want):
					t.Errorf("the history says %q", next.Verdict(11))
				case test.want != "" && pause == (len(f.moved(next)) == 0):
					t.Errorf("%d edges have it", len(f.moved(next)))
				}
			}
		})
	}
}

func TestSupersede(t *testing.T) {
	r, f, i := begun(t, 3, nil)
	f.Newest = 12
	r = Step(start.Add(time.Second), r, f)
	if r.Candidate != 12 || r.Base != 10 || !slices.Equal(f.moved(r), []int{i}) || r.Entered != start.Add(time.Second) {
		t.Fatalf("a further change, on %v: %+v", f.moved(r), r)
	}
	// If changes never stop, one of them gets through all the same.
	now := start.Add(time.Second)
	for r.Base == 10 {
		if now = now.Add(time.Second); now.Sub(start) > 2*time.Minute {
			t.Fatal("changes without end reach nobody but the first stage")
		}
		f.serve(r)
		f.Newest++
		r = Step(now, r, f)
	}

	// While an operator holds one, further ones wait.
	r, f, _ = begun(t, 3, nil)
	r, err := r.Pause(start, "me", "lunch")
	if err != nil {
		t.Fatal(err)
	}
	f.Newest = 12
	if next := Step(start.Add(time.Hour), r, f); next != r {
		t.Errorf("goes on while paused: %+v", next)
	}
	if r, err = r.Resume(start, "me"); err != nil {
		t.Fatal(err)
	}
	if r = Step(start, r, f); r.Candidate != 12 {
		t.Errorf("resumed: %+v", r)
	}
}

func TestVerbs(t *testing.T) {
	r, f, _ := begun(t, 3, nil)
	undone, err := r.Undo(start, "me", "")
	if err != nil || len(f.moved(undone)) > 0 || undone.Verdict(11) != "undone: undone by me" {
		t.Fatalf("%+v: %v", undone, err)
	}
	if next := Step(start.Add(time.Hour), undone, f); next != undone {
		t.Errorf("begins again by itself: %+v", next)
	}
	if _, err := undone.Undo(start, "me", ""); err == nil {
		t.Error("undone twice")
	}
	if _, err := undone.Pause(start, "me", ""); err == nil {
		t.Error("paused when undone")
	}
	again, err := undone.Resume(start.Add(time.Minute), "me")
	if err != nil || len(f.moved(again)) > 0 {
		t.Fatalf("%+v: %v", again, err)
	}
	again, sizes, _ := run(again, f, start.Add(time.Minute))
	if !slices.Equal(sizes, []int{1, 0}) || again.Base != 11 || again.Verdict(11) != "" {
		t.Errorf("%v: %+v", sizes, again)
	}
}

// A replica that does not answer is no proof that all is well, unless all edges that
// matter are connected elsewhere.
func TestMissingReplica(t *testing.T) {
	r, f, i := begun(t, 3, nil)
	f.Missing = []string{"r2"}
	late := start.Add(time.Minute)
	if next := Step(late, r, f); next.Phase != resealv1.Rollout_PHASE_DONE {
		t.Errorf("waits for a replica that has none of the edges: %v", next.waits(f))
	}
	f.Edges = slices.Delete(f.Edges, i, i+1)
	if next := Step(late, r, f); next != r || len(r.waits(f)) == 0 {
		t.Errorf("goes on without the edge: %+v", next)
	}
	f = fleetOf(1, 10)
	r = Step(start, nil, f)
	f.Newest, f.Missing = 11, []string{"r2"}
	if r = Step(start, r, f); r.All || len(f.moved(r)) != 1 {
		t.Errorf("edges that are not seen get it at once: %+v", r)
	}
}

func TestRestoredStore(t *testing.T) {
	r, f, _ := begun(t, 3, nil)
	f.Cluster, f.Newest, f.Rebased = "c2", 5, 4
	next := Step(start, r, f)
	if next.Base != 4 || next.Candidate != 5 || next.Phase != resealv1.Rollout_PHASE_UNDONE || next.Cluster != "c2" {
		t.Errorf("%+v", next)
	}
	f.Rebased = 0
	if next := Step(start, r, f); next.Base != 5 || next.Phase != resealv1.Rollout_PHASE_DONE {
		t.Errorf("%+v", next)
	}
}

func TestRecordIsKept(t *testing.T) {
	r, f, _ := begun(t, 40, nil)
	data, err := r.encode()
	if err != nil || len(data) > 2000 {
		t.Fatalf("%d bytes: %v", len(data), err)
	}
	again, err := decode(data)
	if err != nil || !slices.Equal(f.moved(again), f.moved(r)) || again.Soak != r.Soak || len(again.Policy.GetStages()) != 3 {
		t.Errorf("%s: %+v, %v", data, again, err)
	}
	for _, broken := range []string{"", "{}", `{"format":1,"base":1,"phase":9}`, `{"format":2}`, `{"format":1,"base":0,"phase":1}`} {
		if _, err := decode([]byte(broken)); err == nil {
			t.Errorf("%s is taken", broken)
		}
	}
}

// Whatever happens: a change has no more edges than its stage allows, one that was
// stopped gets no more, one that was undone has none, and the base is one that went to
// all.
func TestNeverMoreThanAllowed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 60).Draw(t, "edges")
		f := fleetOf(n, 10)
		now := start
		r := Step(now, nil, f)
		reached := map[int64]bool{10: true}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 40_000).Draw(t, "ms")) * time.Millisecond)
			before := f.moved(r)
			old := r
			i := rapid.IntRange(0, n-1).Draw(t, "edge")
			var err error
			switch rapid.IntRange(0, 9).Draw(t, "event") {
			case 0:
				f.Newest++
			case 1:
				f.Edges[i].Connected = !f.Edges[i].Connected
				f.Edges[i].Away = time.Duration(rapid.IntRange(0, 20).Draw(t, "away")) * time.Second
			case 2:
				f.Edges[i].Refused = rapid.SampledFrom([]string{"", "no"}).Draw(t, "refused")
			case 3:
				r, err = r.Pause(now, "me", "")
			case 4:
				r, err = r.Resume(now, "me")
			case 5:
				r, err = r.Undo(now, "me", "")
			case 6:
				f.Missing = rapid.SampledFrom([][]string{nil, {"r2"}}).Draw(t, "missing")
			default:
				f.serve(r)
			}
			if err != nil {
				r = old
			}
			next := Step(now, r, f)
			moved := f.moved(next)
			switch allowed := (n + 9) / 10; {
			case next.Phase == resealv1.Rollout_PHASE_UNDONE && len(moved) > 0:
				t.Fatalf("undone, and %d have it", len(moved))
			case next.underWay() && !next.All && len(moved) > allowed+1:
				t.Fatalf("%d of %d in stage %d", len(moved), n, next.Stage)
			case next.Stage == 1 && !next.All && len(moved) > 1:
				t.Fatalf("%d of %d in the first stage", len(moved), n)
			case next.Phase != resealv1.Rollout_PHASE_RUNNING && next.underWay() && next == r && len(moved) > len(before):
				t.Fatalf("%s, and %d have it instead of %d", next.Phase, len(moved), len(before))
			case next.Base != r.Base && !r.All && next.Base == next.Candidate && r.Candidate == next.Candidate && len(r.waits(f)) > 0:
				t.Fatalf("went on though it waited for %v", r.waits(f))
			}
			if next.Phase == resealv1.Rollout_PHASE_DONE {
				reached[next.Candidate] = true
			}
			if !reached[next.Base] {
				t.Fatalf("base %d did not go to all", next.Base)
			}
			r = next
		}
	})
}

// TestSilentEdge: an edge that was out of reach when it was sent a change is not taken
// for one that the change did harm to, and another one proves it instead. Two are.
func TestSilentEdge(t *testing.T) {
	r, f, i := begun(t, 10, nil)
	silence := func(i int) {
		f.Edges[i].Connected, f.Edges[i].Sent, f.Edges[i].Acked = false, 11, 10
		f.Edges[i].Silent, f.Edges[i].Away = true, awayFor+time.Second
	}
	silence(i)
	now := start.Add(40 * time.Second)
	r = Step(now, r, f)
	f.serve(r)
	moved := f.moved(r)
	if r.Phase != resealv1.Rollout_PHASE_RUNNING || r.Stage != 1 || len(moved) != 2 || !r.Entered.Equal(now) {
		t.Fatalf("it is not replaced: %v have it, %+v", moved, r)
	}
	if next := Step(now.Add(time.Second), r, f); next != r {
		t.Errorf("it goes on before the other one has proved itself: %+v", next)
	}
	if next, _, _ := run(r, f, now); next.Phase != resealv1.Rollout_PHASE_DONE {
		t.Errorf("it does not go on: %+v", next)
	}
	for _, i := range moved {
		silence(i)
	}
	if next := Step(now.Add(40*time.Second), r, f); next.Phase != resealv1.Rollout_PHASE_UNDONE || !strings.Contains(next.Reason, "fell silent") {
		t.Errorf("two fell silent: %+v", next)
	}
}

// TestEdgeOfStageLeaves: the first stage is proved by an edge that is there.
func TestEdgeOfStageLeaves(t *testing.T) {
	r, f, i := begun(t, 4, nil)
	f.Edges = slices.Delete(f.Edges, i, i+1)
	r = Step(start.Add(time.Minute), r, f)
	f.serve(r)
	if moved := f.moved(r); r.Phase != resealv1.Rollout_PHASE_RUNNING || r.Stage != 1 || len(moved) != 1 {
		t.Errorf("%v have it: %+v", moved, r)
	}
}
