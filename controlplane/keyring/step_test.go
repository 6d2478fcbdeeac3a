package keyring

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	prepared = resealv1.EpochState_EPOCH_STATE_PREPARED
	active   = resealv1.EpochState_EPOCH_STATE_ACTIVE
	retired  = resealv1.EpochState_EPOCH_STATE_RETIRED
)

var t0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func at(d time.Duration) time.Time { return t0.Add(d) }

func specWith(rotation, retire time.Duration) *resealv1.Keyring {
	return (&resealv1.Keyring{RotationInterval: durationpb.New(rotation), RetireAfter: durationpb.New(retire)}).WithDefaults()
}

var hourly = specWith(time.Hour, 12*time.Hour)

func edgeWith(id string, encrypts uint64, holds ...uint64) Held {
	return Held{Edge: id, Has: spansOf(holds).has, Active: encrypts}
}

func fleetOf(edges ...Held) Fleet {
	return Fleet{Edges: edges, Since: t0.Add(-time.Hour), Complete: true}
}

func incomplete(since time.Duration, edges ...Held) Fleet {
	return Fleet{Edges: edges, Since: at(since)}
}

// The ring of most tests: epoch 2 replaced epoch 1 at 0.
func twoEpochs(more ...Epoch) Ring {
	ring := Ring{Last: 2, Epochs: append([]Epoch{
		{Number: 1, State: retired, PreparedAt: at(-time.Hour), ActivatedAt: at(-time.Hour), RetiredAt: t0, Settled: true},
		{Number: 2, State: active, PreparedAt: t0, ActivatedAt: t0},
	}, more...)}
	ring.Last += uint64(len(more))
	return ring
}

func preparedAt(d time.Duration) Epoch { return Epoch{Number: 3, State: prepared, PreparedAt: at(d)} }

func text(actions []Action) string {
	words := make([]string, len(actions))
	for i, a := range actions {
		words[i] = fmt.Sprintf("%s %d", a.Verb, a.Epoch)
	}
	return strings.Join(words, ", ")
}

func TestStep(t *testing.T) {
	unsettled := twoEpochs()
	unsettled.Epochs[0].Settled = false
	for name, test := range map[string]struct {
		now   time.Duration
		ring  Ring
		fleet Fleet
		want  string
	}{
		"first epoch, no edges":               {0, Ring{}, fleetOf(), "prepare 1, activate 1"},
		"first epoch, fleet not known yet":    {0, Ring{}, incomplete(0), "prepare 1, activate 1"},
		"first epoch, an edge lives":          {0, Ring{}, fleetOf(edgeWith("a", 0)), "prepare 1"},
		"nothing is due":                      {time.Hour - 1, twoEpochs(), fleetOf(edgeWith("a", 2, 1, 2)), ""},
		"due":                                 {time.Hour, twoEpochs(), fleetOf(edgeWith("a", 2, 1, 2)), "prepare 3"},
		"due, no edges":                       {time.Hour, twoEpochs(), fleetOf(), "prepare 3, retire 2, activate 3, settle 2"},
		"due, fleet not known yet":            {time.Hour, twoEpochs(), incomplete(time.Hour), "prepare 3"},
		"not acked by all":                    {time.Hour, twoEpochs(preparedAt(time.Hour)), fleetOf(edgeWith("a", 2, 1, 2, 3), edgeWith("b", 2, 1, 2)), ""},
		"acked by all":                        {time.Hour, twoEpochs(preparedAt(time.Hour)), fleetOf(edgeWith("a", 2, 1, 2, 3), edgeWith("b", 2, 3)), "retire 2, activate 3"},
		"acked by all who are known":          {time.Hour, twoEpochs(preparedAt(time.Hour)), incomplete(59*time.Minute, edgeWith("a", 2, 3)), ""},
		"before the deadline":                 {time.Hour + 5*time.Minute - 1, twoEpochs(preparedAt(time.Hour)), fleetOf(edgeWith("a", 2, 2)), ""},
		"at the deadline":                     {time.Hour + 5*time.Minute, twoEpochs(preparedAt(time.Hour)), fleetOf(edgeWith("a", 2, 2)), "retire 2, activate 3"},
		"deadline after an outage":            {9 * time.Hour, twoEpochs(preparedAt(time.Hour)), incomplete(9*time.Hour-1, edgeWith("a", 2, 2)), ""},
		"outage of many rotations":            {7 * time.Hour, twoEpochs(), fleetOf(edgeWith("a", 2, 2)), "prepare 3"},
		"outage beyond retireAfter":           {13 * time.Hour, twoEpochs(), fleetOf(edgeWith("a", 2, 2)), "erase 1, prepare 3"},
		"before the erasure":                  {12*time.Hour - 1, twoEpochs(preparedAt(12*time.Hour - 2)), fleetOf(edgeWith("a", 2, 2)), ""},
		"at the erasure":                      {12 * time.Hour, twoEpochs(preparedAt(12*time.Hour - 2)), fleetOf(edgeWith("a", 2, 2)), "erase 1"},
		"an edge still encrypts with it":      {time.Minute, unsettled, fleetOf(edgeWith("a", 1, 1, 2)), ""},
		"an edge that has not spoken yet":     {time.Minute, unsettled, fleetOf(Held{Edge: "a", Unknown: true, Has: spans(nil).has}), ""},
		"nobody encrypts with it":             {time.Minute, unsettled, fleetOf(edgeWith("a", 2, 1, 2)), "settle 1"},
		"still encrypts after the wait":       {5 * time.Minute, unsettled, fleetOf(edgeWith("a", 1, 1, 2)), "settle 1"},
		"the clock went back":                 {-10 * time.Hour, twoEpochs(), fleetOf(edgeWith("a", 2, 1, 2)), "restamp 1, restamp 2"},
		"the clocks of replicas differ":       {-maxSkew, twoEpochs(), fleetOf(edgeWith("a", 2, 1, 2)), ""},
		"the clock went back while preparing": {-time.Hour, twoEpochs(preparedAt(time.Hour)), fleetOf(edgeWith("a", 2, 3)), "restamp 1, restamp 2, restamp 3, retire 2, activate 3"},
	} {
		t.Run(name, func(t *testing.T) {
			before := slices.Clone(test.ring.Epochs)
			actions := Step(at(test.now), hourly, test.ring, test.fleet)
			if got := text(actions); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			if diff := cmp.Diff(before, test.ring.Epochs); diff != "" {
				t.Errorf("the ring was changed in place: %s", diff)
			}
			if again := Step(at(test.now), hourly, test.ring.Do(at(test.now), actions), test.fleet); len(again) > 0 {
				t.Errorf("left to do: %s", text(again))
			}
		})
	}
}

func TestFullRingDoesNotRotate(t *testing.T) {
	ring := Ring{}
	for range MaxEpochs {
		ring.Last++
		ring.Epochs = append(ring.Epochs, Epoch{Number: ring.Last, State: retired, PreparedAt: t0, ActivatedAt: t0, RetiredAt: t0, Settled: true})
	}
	ring.Epochs[MaxEpochs-1] = Epoch{Number: ring.Last, State: active, PreparedAt: t0, ActivatedAt: t0}
	if got := text(Step(at(2*time.Hour), hourly, ring, fleetOf())); got != "" {
		t.Errorf("got %q", got)
	}
	if got := Rotate(ring); got != nil {
		t.Errorf("an operator can rotate: %s", text(got))
	}
	ring.Epochs[0].RetiredAt = at(-12 * time.Hour)
	if got := text(Step(at(time.Hour-1), hourly, ring, fleetOf())); got != "erase 1" {
		t.Errorf("got %q", got)
	}
}

func TestRevoke(t *testing.T) {
	three := twoEpochs(preparedAt(time.Minute))
	for name, test := range map[string]struct {
		ring    Ring
		numbers []uint64
		want    string
		active  uint64
	}{
		"retired":                     {three, []uint64{1}, "erase 1", 2},
		"prepared":                    {three, []uint64{3}, "erase 3", 2},
		"active, one is prepared":     {three, []uint64{2}, "erase 2, activate 3", 3},
		"active and prepared":         {three, []uint64{2, 3}, "erase 2, erase 3, prepare 4, activate 4", 4},
		"active, none is prepared":    {twoEpochs(), []uint64{2}, "erase 2, prepare 3, activate 3", 3},
		"all":                         {three, []uint64{1, 2, 3}, "erase 1, erase 2, erase 3, prepare 4, activate 4", 4},
		"unknown":                     {three, []uint64{9}, "", 2},
		"first, nothing encrypts yet": {Ring{Last: 1, Epochs: []Epoch{{Number: 1, State: prepared, PreparedAt: t0}}}, []uint64{1}, "erase 1", 0},
	} {
		t.Run(name, func(t *testing.T) {
			actions := Revoke(test.ring, test.numbers)
			if got := text(actions); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			if got, _ := test.ring.Do(at(time.Minute), actions).Active(); got.Number != test.active {
				t.Errorf("epoch %d is active, want %d", got.Number, test.active)
			}
		})
	}
}

func TestTicketAge(t *testing.T) {
	ring := twoEpochs(preparedAt(time.Minute))
	for number, want := range map[uint64]time.Duration{1: 3 * time.Hour, 2: 2 * time.Hour, 3: 0} {
		if got := ticketAge(at(2*time.Hour), ring, []uint64{number}); got != want {
			t.Errorf("epoch %d: %s, want %s", number, got, want)
		}
	}
	if got := ticketAge(at(2*time.Hour), ring, []uint64{3, 1, 2}); got != 3*time.Hour {
		t.Errorf("all: %s", got)
	}
}

// world is a keyring and its fleet under random events.
type world struct {
	now      time.Time
	spec     *resealv1.Keyring
	ring     Ring
	edges    map[string]*edgeModel
	complete bool
	since    time.Time
}

// edgeModel holds what it acked, or nothing yet.
type edgeModel struct {
	acked  bool
	held   []uint64
	active uint64
}

func (w *world) fleet() Fleet {
	fleet := Fleet{Since: w.since, Complete: w.complete}
	for _, id := range []string{"a", "b", "c"} {
		if e := w.edges[id]; e != nil {
			fleet.Edges = append(fleet.Edges, Held{Edge: id, Unknown: !e.acked, Has: spansOf(e.held).has, Active: e.active})
		}
	}
	return fleet
}

func (w *world) ack(id string) {
	e := &edgeModel{acked: true}
	for _, epoch := range w.ring.Epochs {
		e.held = append(e.held, epoch.Number)
		if epoch.State == active {
			e.active = epoch.Number
		}
	}
	w.edges[id] = e
}

// check compares a ring with the one before.
func (w *world) check(t *rapid.T, before Ring, actions []Action) {
	w.checkShape(t, before)
	fleet := w.fleet()
	for _, e := range w.ring.Epochs {
		old, existed := before.Find(e.Number)
		if existed && e.State < old.State {
			t.Fatalf("epoch %d went from %s back to %s", e.Number, old.State, e.State)
		}
		if !existed && e.Number <= before.Last {
			t.Fatalf("epoch %d came again", e.Number)
		}
		if e.State == active && old.State != active {
			w.checkActivation(t, before, e, fleet)
		}
	}
	for _, old := range before.Epochs {
		if _, kept := w.ring.Find(old.Number); kept {
			continue
		}
		if slices.ContainsFunc(actions, func(a Action) bool { return (a.Verb == Settle || a.Verb == Restamp) && a.Epoch == old.Number }) {
			// Its time was set to now.
			if w.spec.GetRetireAfter().AsDuration() > 0 {
				t.Fatalf("epoch %d was erased without retireAfter", old.Number)
			}
			continue
		}
		if old.State != retired || !old.Settled || w.now.Before(old.EraseAt(w.spec)) {
			t.Fatalf("epoch %d was erased at %s: %+v", old.Number, w.now, old)
		}
	}
	for _, e := range w.ring.Epochs {
		if e.State == retired && e.Settled && !w.now.Before(e.EraseAt(w.spec)) {
			t.Fatalf("epoch %d outlived %s: %+v", e.Number, w.now, e)
		}
	}
	if again := Step(w.now, w.spec, w.ring, fleet); len(again) > 0 {
		t.Fatalf("after %s there is left to do: %s", text(actions), text(again))
	}
}

func (w *world) checkShape(t *rapid.T, before Ring) {
	count := map[resealv1.EpochState]int{}
	var last uint64
	for _, e := range w.ring.Epochs {
		count[e.State]++
		if e.Number <= last || e.Number > w.ring.Last {
			t.Fatalf("numbers don't grow: %+v", w.ring)
		}
		last = e.Number
		if e.State >= active && e.ActivatedAt.Before(e.PreparedAt) || e.State == retired && e.RetiredAt.Before(e.ActivatedAt) {
			t.Fatalf("times are out of order: %+v", e)
		}
	}
	_, wasActive := before.Active()
	if count[active] > 1 || count[prepared] > 1 || wasActive && count[active] != 1 {
		t.Fatalf("%d active, %d prepared: %+v", count[active], count[prepared], w.ring)
	}
	if w.ring.Last < before.Last {
		t.Fatalf("the last number went from %d to %d", before.Last, w.ring.Last)
	}
}

// checkActivation: nothing encrypts before it is covered or its deadline is over.
func (w *world) checkActivation(t *rapid.T, before Ring, e Epoch, fleet Fleet) {
	old, was := before.Find(e.Number)
	if was && old.PreparedAt.Before(e.PreparedAt) {
		t.Fatalf("epoch %d was prepared again", e.Number)
	}
	if !w.now.Before(Deadline(w.spec, e.PreparedAt, fleet)) {
		return
	}
	for _, held := range fleet.Edges {
		if !held.Has(e.Number) {
			t.Fatalf("epoch %d became active before edge %s had it", e.Number, held.Edge)
		}
	}
	if _, replaces := before.Active(); replaces && !fleet.Complete {
		t.Fatalf("epoch %d became active before the fleet was known", e.Number)
	}
}

func TestStepHoldsItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{now: t0, spec: specWith(time.Hour, 3*time.Hour), edges: map[string]*edgeModel{}, complete: true, since: t0}
		step := func(t *rapid.T) {
			before := w.ring
			actions := Step(w.now, w.spec, w.ring, w.fleet())
			w.ring = w.ring.Do(w.now, actions)
			w.check(t, before, actions)
		}
		id := rapid.SampledFrom([]string{"a", "b", "c"})
		t.Repeat(map[string]func(*rapid.T){
			"time passes": func(t *rapid.T) {
				w.now = w.now.Add(rapid.SampledFrom([]time.Duration{time.Millisecond, time.Second, time.Minute, 6 * time.Minute, 50 * time.Minute, 5 * time.Hour}).Draw(t, "by"))
				step(t)
			},
			"the clock is set": func(t *rapid.T) {
				w.now = w.now.Add(time.Duration(rapid.Int64Range(-int64(30*24*time.Hour), int64(30*24*time.Hour)).Draw(t, "by")))
				w.since = w.now.Add(-time.Minute)
				step(t)
			},
			"an edge comes": func(t *rapid.T) { w.edges[id.Draw(t, "id")] = &edgeModel{}; step(t) },
			"an edge goes":  func(t *rapid.T) { delete(w.edges, id.Draw(t, "id")); step(t) },
			"an edge acks":  func(t *rapid.T) { w.ack(id.Draw(t, "id")); step(t) },
			"all edges ack": func(t *rapid.T) {
				for id := range w.edges {
					w.ack(id)
				}
				step(t)
			},
			"the leader dies": func(t *rapid.T) {
				w.complete, w.since = rapid.Bool().Draw(t, "known"), w.now
				step(t)
			},
			"the operator rotates": func(t *rapid.T) { w.ring = w.ring.Do(w.now, Rotate(w.ring)); step(t) },
			"the operator revokes": func(t *rapid.T) {
				var numbers []uint64
				for _, e := range w.ring.Epochs {
					if rapid.Bool().Draw(t, "revoked") {
						numbers = append(numbers, e.Number)
					}
				}
				before := w.ring
				w.ring = w.ring.Do(w.now, Revoke(w.ring, numbers))
				w.checkShape(t, before)
				for _, number := range numbers {
					if _, ok := w.ring.Find(number); ok {
						t.Fatalf("epoch %d survived", number)
					}
				}
				step(t)
			},
			"the operator applies": func(t *rapid.T) {
				w.spec = specWith(rapid.SampledFrom([]time.Duration{time.Minute, time.Hour}).Draw(t, "rotation"),
					rapid.SampledFrom([]time.Duration{0, time.Minute, 3 * time.Hour}).Draw(t, "retire"))
				step(t)
			},
		})
	})
}

// TestRotationGoesOn: with a fleet that acks and a sound clock, rotation goes
// on for ever and no epoch lives longer than it should.
func TestRotationGoesOn(t *testing.T) {
	w := &world{now: t0, spec: specWith(time.Hour, 3*time.Hour), edges: map[string]*edgeModel{"a": {}, "b": {}}, complete: true, since: t0}
	erased := map[uint64]time.Time{}
	const tick = 20 * time.Second
	for w.now.Before(at(100 * time.Hour)) {
		actions := Step(w.now, w.spec, w.ring, w.fleet())
		for _, a := range actions {
			if a.Verb == Erase {
				erased[a.Epoch] = w.now
			}
		}
		w.ring = w.ring.Do(w.now, actions)
		w.now = w.now.Add(tick)
		w.ack("a")
		w.ack("b")
	}
	if w.ring.Last < 98 || len(w.ring.Epochs) != 4 {
		t.Errorf("after 100 hours: %d epochs were made, %d are kept", w.ring.Last, len(w.ring.Epochs))
	}
	// Epoch 1 is active from the first tick on, for an hour and the tick that its
	// successor takes to be acked; one more until nobody encrypts with it.
	if want := at(tick + time.Hour + tick + tick + 3*time.Hour); !erased[1].Equal(want) {
		t.Errorf("epoch 1 was erased at %s, want %s", erased[1], want)
	}
}
